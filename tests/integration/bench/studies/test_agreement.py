from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.load.endpoint import Endpoint, discover
from bench.studies import agreement
from bench.studies.agreement import METRICS, Agreement, Figures, Load, measure, table
from bench.studies.settings import AgreementSettings
from tests.support.fake_server import Behaviour, serving
from toolkit.errors import BenchError

LOAD = Load(concurrency=2, requests=6, size=None, prompt_words=16, output_tokens=8)


def test_ratios_are_of_medians_over_rounds() -> None:
    ours = [Figures(10.0, 1.0, 100.0), Figures(12.0, 1.0, 100.0), Figures(90.0, 1.0, 100.0)]
    theirs = [Figures(10.0, 2.0, 100.0), Figures(10.0, 2.0, 110.0), Figures(10.0, 2.0, 90.0)]
    found = Agreement(LOAD, ours, theirs)
    assert [found.ratio(metric) for metric in METRICS] == [1.2, 0.5, 1.0]
    assert found.spread("ttft_ms") == pytest.approx(80 / 12)
    assert found.spread("tpot_ms") == 0.0
    assert found.spread("output_tokens_per_s") == pytest.approx(0.2)
    lines = table([found]).splitlines()
    assert len(lines) == 5 and "1.200" in lines[2] and "0.500" in lines[3]


class FakeTool:
    """Stands for `vllm bench serve`: notes how it was called, and claims figures."""

    def __init__(self, **result: Any) -> None:
        self.calls: list[tuple[dict[str, str], list[dict[str, Any]]]] = []
        self.result = result

    def __call__(self, command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        options = {
            name: command[index + 1] if index + 1 < len(command) and not command[index + 1].startswith("--") else ""
            for index, name in enumerate(command)
            if name.startswith("--")
        }
        lines = [json.loads(line) for line in Path(options["--dataset-path"]).read_text().splitlines()]
        self.calls.append((options, lines))
        requests = int(options["--num-prompts"])
        found = {
            "completed": requests,
            "total_output_tokens": requests * int(options["--custom-output-len"]),
            "median_ttft_ms": 20.0,
            "median_tpot_ms": 2.0,
            "output_throughput": 500.0,
        }
        result = Path(options["--result-dir"]) / options["--result-filename"]
        if self.result.get("code", 0) == 0:
            result.write_text(json.dumps(found | self.result))
        return subprocess.CompletedProcess(
            command, self.result.get("code", 0), "", "Traceback\nOSError: no tokenizer\n"
        )


def test_both_tools_get_equal_loads_and_no_equal_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = FakeTool()
    monkeypatch.setattr(agreement.subprocess, "run", tool)
    with serving(Behaviour(first_s=0.01, gap_s=0.001)) as server:
        endpoint = asyncio.run(discover(server.url))
        found = measure(endpoint, "dir", [LOAD, Load(1, 3, (56, 56), 16, 8)], rounds=2)
        sent = list(server.bodies)
    assert [len(one.ours) for one in found] == [2, 2] == [len(one.theirs) for one in found]
    assert found[0].ours[0].ttft_ms >= 10.0 and found[0].theirs[0].ttft_ms == 20.0
    prompts = [body["messages"][0]["content"][-1]["text"] for body in sent]
    for options, lines in tool.calls:
        assert options["--backend"] == "openai-chat" and options["--temperature"] == "0" and "--ignore-eos" in options
        assert len(lines) == int(options["--num-prompts"])
        prompts += [line.get("prompt") or line["content"][-1]["text"] for line in lines]
    assert len(set(prompts)) == len(prompts) == 2 * 6 + 2 * 2 + 2 * 6 + 2 * 3 + 2 + 2 * 3
    assert {len(prompt.split()) for prompt in prompts} == {16}
    text, image = tool.calls[0], tool.calls[-1]
    assert (text[0]["--dataset-name"], image[0]["--dataset-name"]) == ("custom", "custom_image")
    assert image[1][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    for body in sent:
        assert body["temperature"] == 0 and body["ignore_eos"] and body["max_tokens"] == 8


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"code": 1}, "ended with 1: OSError: no tokenizer"),
        ({"completed": 2}, "completed 2 of 6 requests"),
        ({"total_output_tokens": 5}, "counted 5 output tokens, not 48"),
    ],
)
def test_a_tool_that_fails_is_no_figure(monkeypatch: pytest.MonkeyPatch, result: dict[str, Any], words: str) -> None:
    monkeypatch.setattr(agreement.subprocess, "run", FakeTool(**result))
    with serving(Behaviour()) as server, pytest.raises(BenchError, match="vllm bench serve") as caught:
        measure(asyncio.run(discover(server.url)), "dir", [LOAD], rounds=1)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("behaviour", "words"), [(Behaviour(status=500), "requests failed: http"), (Behaviour(usage=False), "count tokens")]
)
def test_a_server_that_fails_is_no_figure(monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour, words: str) -> None:
    monkeypatch.setattr(agreement.subprocess, "run", FakeTool())
    with serving(behaviour) as server, pytest.raises(BenchError, match=words):
        measure(Endpoint(server.url, "fake"), "dir", [LOAD], rounds=1)


def test_a_limit_leaves_rounds_out_and_what_was_measured_is_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]

    class SlowTool(FakeTool):
        def __call__(self, command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
            if "--dataset-path" not in command:  # who asks for the machine's GPUs
                raise FileNotFoundError
            clock[0] += 30.0
            written.append(json.loads(out.read_text()) if out.exists() else None)
            return super().__call__(command, **settings)

    out, written = tmp_path / "new" / "agreement.json", list[Any]()
    monkeypatch.setattr(agreement.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(agreement.subprocess, "run", SlowTool())
    with serving(Behaviour()) as server:
        settings = AgreementSettings(
            url=server.url, tokenizer="dir", concurrency="1,2", requests=3, image_sizes="text", limit_s=100.0, out=out
        )
        agreement.run(settings)
    saved = json.loads(out.read_text())
    assert [len(load["theirs"]) for load in saved["loads"]] == [2, 1]  # 90 s: a fourth would have ended after 120
    assert written[0] is None and [len(each["loads"]) for each in written[1:]] == [1, 2]  # after each pair
    assert "the time of 100 s was over" in capsys.readouterr().out
    assert saved["loads"][0]["ratios"].keys() == set(METRICS)


def test_no_time_for_a_single_round_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(command: list[str], **settings: Any) -> None:
        raise subprocess.TimeoutExpired(command, settings["timeout"])

    monkeypatch.setattr(agreement.subprocess, "run", late)
    with serving(Behaviour()) as server:
        endpoint = asyncio.run(discover(server.url))
        with pytest.raises(BenchError, match=r"not over within (20|19) s"):
            measure(endpoint, "dir", [LOAD], rounds=1, limit_s=20.0)
