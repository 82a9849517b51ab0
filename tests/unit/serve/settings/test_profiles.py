"""Which settings are served with, and why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from serve.settings import profiles
from serve.settings.backend import Gpu
from serve.settings.engine import EngineSettings
from serve.settings.profiles import Key, Measured, Profile, choose, key_for, save
from tests.support import tiny
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ServerError

KEY = Key("NVIDIA H100 80GB HBM3", "28x3584x18944", "awq-g128", "0.32.0")
CANDIDATES = {"a": EngineSettings(kernel="marlin"), "b": EngineSettings(max_num_seqs=64), "c": EngineSettings(ngram=3)}
LOADS = (
    Measured(1, {"a": 10.0, "b": 8.0, "c": 9.9}, fp16=9.0),
    Measured(32, {"a": 50.0, "b": 60.0, "c": 59.0}, fp16=70.0),
    Measured(128, {"a": 60.0, "b": 90.0}),
)
PROFILE = Profile(KEY, CANDIDATES, LOADS)


class TestChoice:
    def test_by_load(self) -> None:
        assert [PROFILE.winner(n) for n in (1, 4, 20, 1000)] == ["a", "a", "b", "b"]

    def test_by_mode(self) -> None:
        assert PROFILE.chosen("latency") == "a" and PROFILE.chosen("throughput") == "b"
        assert PROFILE.chosen("auto") == "b"  # at worst 1.25 times slower; a is 1.5 times, c is not known at 128

    def test_times_are_better_when_less(self) -> None:
        times = Profile(KEY, CANDIDATES, (Measured(1, {"a": 4.0, "b": 5.0}, fp16=6.0),), "tpot_ms")
        assert times.chosen("latency") == "a"
        assert times.against_fp16("a") == {1: 1.5}

    def test_against_fp16(self) -> None:
        assert PROFILE.against_fp16("b") == {1: pytest.approx(8 / 9), 32: pytest.approx(60 / 70)}

    def test_the_users_own_comes_first(self, tmp_path: Path) -> None:
        own, shipped = tmp_path / "own", tmp_path / "shipped"
        save(PROFILE, shipped)
        save(replace(PROFILE, candidates={**CANDIDATES, "b": EngineSettings(max_num_seqs=7)}), own)
        assert choose("auto", KEY, [own, shipped]).settings == EngineSettings(max_num_seqs=7)
        assert choose("auto", KEY, [shipped]).settings == EngineSettings(max_num_seqs=64)
        assert choose("off", KEY, [own]) == profiles.Choice(EngineSettings())

    def test_it_says_so(self, tmp_path: Path) -> None:
        save(PROFILE, tmp_path)
        notes = choose("latency", KEY, [tmp_path]).notes
        assert "profile latency: a (kernel marlin), measured on NVIDIA H100" in notes[0]
        assert notes[1].startswith("measured beside the 16-bit model: ") and "0.71x at 32" in notes[1]
        assert "16-bit model was measured faster than this one (0.71x at 32 in flight)" in notes[2]

    def test_what_is_as_good_is_decided_by_the_other_loads(self) -> None:
        loads = (Measured(1, {"a": 200.0, "b": 100.0}), Measured(128, {"a": 990.0, "b": 1000.0}))
        near = replace(PROFILE, loads=loads)
        assert near.winner(128) == "b" and near.chosen("throughput") == "a"
        far = replace(PROFILE, loads=(loads[0], Measured(128, {"a": 970.0, "b": 1000.0})))
        assert far.chosen("throughput") == "b"

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"vllm": "0.25.1"}, "measured on vLLM 0.25.1, this is NVIDIA H100 80GB HBM3 with vLLM 0.32.0"),
            ({"card": "NVIDIA L4"}, "measured on NVIDIA L4,"),
            ({"tp": 2}, "measured on 2 GPUs,"),
        ],
    )
    def test_one_for_something_else_is_ignored(self, tmp_path: Path, change: dict[str, str], words: str) -> None:
        save(replace(PROFILE, key=replace(KEY, **change)), tmp_path)
        found = choose("auto", KEY, [tmp_path])
        assert found.settings == EngineSettings(kernel="qvl")  # as without any profile
        assert words in found.notes[0] and "qvl tune" in found.notes[1]

    @pytest.mark.parametrize(("card", "form"), [("NVIDIA L4", "awq-g128"), (KEY.card, "fp16")])
    def test_nothing_known(self, tmp_path: Path, card: str, form: str) -> None:
        save(replace(PROFILE, key=replace(KEY, model="1x2x3")), tmp_path)
        key = replace(KEY, card=card, format=form)
        assert choose("auto", key, [tmp_path]) == profiles.Choice(EngineSettings())
        assert "qvl tune" in choose("latency", key, [tmp_path]).notes[0]

    def test_on_hopper_never_vllms_own_kernel(self, tmp_path: Path) -> None:
        kernels = {mode: choose(mode, KEY, [tmp_path]).settings.kernel for mode in profiles.MODES}
        assert kernels == {"auto": "qvl", "latency": "qvl", "throughput": "qvl", "off": None}
        (note,) = choose("auto", KEY, [tmp_path]).notes
        assert "our kernel" in note and "compiles" in note and "--profile off" in note

    def test_a_damaged_one_is_named_and_left(self, tmp_path: Path) -> None:
        (tmp_path / "A.json").write_text("{")
        (tmp_path / "B.json").write_text(PROFILE.dumps().replace('"schema": 1', '"schema": 9'))
        (tmp_path / "C.json").write_bytes(b"\xff\xfe")
        save(PROFILE, tmp_path)
        found = choose("latency", KEY, [tmp_path])
        assert found.settings == CANDIDATES["a"]
        assert [note.startswith("profile ignored") for note in found.notes] == [True, True, True, False, False, False]

    def test_no_mode(self) -> None:
        with pytest.raises(ServerError, match="--profile fast: one of auto, latency, throughput, off"):
            choose("fast", KEY)  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    path = save(PROFILE, tmp_path)
    assert Profile.loads_text(path.read_text(), "x") == PROFILE
    assert save(PROFILE, tmp_path) == path and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"metric": "joy"},
        {"loads": []},
        {"loads": [{"concurrency": 1, "figures": {}}]},
        {"loads": [{"concurrency": 1, "figures": {"z": 1.0}}]},
        {"candidates": {"a": {"kernal": "marlin"}}},
        {"candidates": {"a": {"kernel": "warlin"}}},
        {"key": {"card": "x"}},
        {"candidates": []},
    ],
)
def test_what_is_no_profile(change: dict[str, object]) -> None:
    text = json.dumps({**json.loads(PROFILE.dumps()), **change})
    with pytest.raises(ServerError, match=r"f\.json is no profile"):
        Profile.loads_text(text, "f.json")


class TestShipped:
    FILES = sorted((Path(profiles.__file__).parent / "profiles").glob("*.json"))

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    def test_can_be_read_and_say_where_they_come_from(self, path: Path) -> None:
        found = Profile.loads_text(path.read_text(), path.name)
        assert found.provenance["what"] and found.provenance["when"]

    def test_what_was_measured(self) -> None:
        found = {p.key.model: p for p in (Profile.loads_text(f.read_text(), f.name) for f in self.FILES)}
        seven, two = found["28x3584x18944"], found["28x1536x8960"]
        assert {each.chosen(wish) for each in (seven, two) for wish in ("auto", "latency", "throughput")} == {"qvl"}
        assert seven.against_fp16("qvl")[1] > 1.9 and min(seven.against_fp16("qvl").values()) > 1
        assert all((factor > 1) == (load <= 8) for load, factor in two.against_fp16("qvl").items())


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "find_gpus", lambda: [Gpu("NVIDIA L4", 1, 1)])
    monkeypatch.setattr(profiles, "installed_vllm", lambda: ("gpu", "0.33.0"))
    plain = Checkpoint.open(tiny.write(tmp_path / "a"))
    packed = Checkpoint.open(tiny.write(tmp_path / "b", version="gemm"))
    mixed = Checkpoint.open(tiny.write(tmp_path / "c", version="gemm", left=frozenset({(0, "mlp.down_proj")})))
    assert key_for(plain, "gpu") == Key("NVIDIA L4", "2x128x256", "fp16", "0.33.0")
    assert [key_for(each, "gpu").format for each in (packed, mixed)] == ["awq-g64", "awq-g64+16"]
    assert "cores" in key_for(plain, "cpu", 2).card and key_for(plain, "cpu", 2).tp == 2
