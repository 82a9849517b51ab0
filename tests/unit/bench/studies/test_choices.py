"""The choices of the study: their manifests, whose tokens count, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.studies import choices
from bench.studies.settings import ChoicesSettings
from toolkit.errors import FormatError
from toolkit.fidelity.answers import answer_tokens
from toolkit.fidelity.turns import Turns


def rows(path: Path) -> list[Any]:
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def test_manifests_are_what_they_are_called(tmp_path: Path) -> None:
    made = {name: rows(choice.write(tmp_path / name, 16, 3)) for name, choice in choices.CHOICES.items()}
    assert all(len(chats) == 16 for chats in made.values())
    with_image = {name: sum(isinstance(chat[0]["content"], list) for chat in chats) for name, chats in made.items()}
    assert (with_image["default"], with_image["texts"], with_image["images"]) == (14, 0, 16)
    assert {len(chat) for chat in made["questions"]} == {1}
    assert made["questions"] == [chat[:1] for chat in made["default"]]


def test_an_answers_tokens_count_more_in_the_block_alone() -> None:
    from toolkit.quantize import run
    from toolkit.quantize.stream.passing import LayerStream

    before = LayerStream.capture, run._sensitivity, Turns.of
    with choices._answers_counting(16):
        assert run._sensitivity is not before[1]

        class Two:
            num_layers = 2

        # the quantizer squares it: other tokens then weigh a sixteenth
        assert run._sensitivity(Two(), None, None) == pytest.approx([0.25, 0.25])  # type: ignore[arg-type]
    assert (LayerStream.capture, run._sensitivity) == before[:2]


def test_answers_are_found_in_a_chat() -> None:
    turns = Turns((7, 8), 9)
    ids = torch.tensor([1, 7, 8, 2, 3, 9, 4, 7, 8, 5, 9, 6])
    assert answer_tokens(ids, turns).nonzero().flatten().tolist() == [3, 4, 5, 9, 10]
    assert answer_tokens(torch.tensor([7, 8, 2]), turns).tolist() == [False, False, True]  # cut off


def test_unknown_choices_and_other_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="unknown choices nonsense"):
        choices.run(ChoicesSettings(only="nonsense", out=tmp_path))
    (tmp_path / "choices.json").write_text('{"settings": {"per_task": 1}, "sums": {}}')
    with pytest.raises(FormatError, match="choose another --out"):
        choices.run(ChoicesSettings(only="texts", out=tmp_path))


def test_the_table_holds_each_choice_against_the_default() -> None:
    found = {
        "sums": {"default/1": [1.0, 2.0, 4.0, 8.0], "texts/1": [2.0, 4.0, 8.0, 16.0], "images/1": [1.0, 2.0, 4.0, 8.0]},
        "right": {"fp16": "1111", "default/1": "1111", "texts/1": "1101", "images/1": "1111"},
        "settings": {"per_task": 2, "held_out": "7"},
        "device": "cpu",
        "versions": {"torch": "2"},
        "tokens": [1, 2, 3, 4],
        "tasks": ["a", "a", "b", "b"],
    }
    table = choices._table(found)
    assert "| 128 chats without images | 2.00 [2.00, 2.00] |" in table
    assert "| 128 chats, all with an image | 1.00 [1.00, 1.00] |" in table
    assert "75.0%" in table and "fp16 answers 100.0% right" in table
    assert "one in eight without an image | 1 | 1 | 1 |" in table


def test_tasks_that_are_worse_than_fp16_are_named() -> None:
    after = "1" * 200 + "10" * 100
    said = choices._verdicts("1" * 400, after, ["a"] * 200 + ["b"] * 200)
    assert said == "no worse: 0 of 2 tasks; worse: b"
    assert choices._verdicts("1" * 2000, "1" * 2000, ["a"] * 1000 + ["b"] * 1000) == "no worse: 2 of 2 tasks"
