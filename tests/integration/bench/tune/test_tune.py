"""Tuning: what is measured is kept through kills and failures, and what is concluded is what was measured."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.load.endpoint import Endpoint
from bench.run.boot import Abort, Start
from bench.tune import measure as module
from bench.tune.config import TuneConfig
from bench.tune.journal import FP16, Journal, Trial
from bench.tune.measure import tune
from bench.tune.profile import profile_of, recommendation, table_rows
from serve.plan import candidates as catalogue
from serve.settings.engine import EngineSettings
from serve.settings.profiles import Key
from tests.support.fake_server import Behaviour, serving
from toolkit.cli import app
from toolkit.errors import BenchError, QvlError, ServerError

CONFIG = TuneConfig(concurrencies=(1, 8), requests=4)
CANDIDATES: dict[str, dict[str, Any]] = {"vllm": {}, "marlin": {"kernel": "marlin"}, "odd": {"ngram": 3}}


class Bench:
    """Servers that start at once and figures from a table; notes what was booted and measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, figures: dict[tuple[str, int], float]) -> None:
        self.figures = figures
        self.booted: list[str] = []
        self.stopped: list[str] = []
        self.measured: list[tuple[str, int]] = []
        self.broken: dict[str, str] = {}

        async def discover(url: str, key: str | None = None) -> Endpoint:
            return Endpoint(url, "m")

        monkeypatch.setattr(module, "discover", discover)

    def boot(self, name: str) -> tuple[Start, Abort]:
        def start() -> Any:
            self.booted.append(name)
            if name in self.broken:
                raise ServerError(self.broken[name])
            return SimpleNamespace(url=name, api_key=None, stop=lambda: self.stopped.append(name))

        return start, lambda: None

    def measure(self, end: Endpoint, config: TuneConfig, load: int) -> dict[str, float]:
        self.measured.append((end.url, load))
        figure = self.figures[end.url, load]
        if figure < 0:
            raise BenchError("2 requests failed (load): HTTP 500")
        return {"output_tokens_per_s": figure, "tpot_ms": 1.0, "ttft_ms": 1.0, "requests": 4.0}


FIGURES = {("vllm", 1): 10.0, ("vllm", 8): 70.0, ("marlin", 1): 12.0, ("marlin", 8): 60.0}
FIGURES |= {("odd", 1): 5.0, ("odd", 8): 5.0, (FP16, 1): 11.0, (FP16, 8): 90.0}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch, dict(FIGURES))


def journal(path: Path, **about: Any) -> Journal:
    return Journal(path / "tune.json", {"model": "m", **about})


def run(bench: Bench, found: Journal, candidates: dict[str, dict[str, Any]] = CANDIDATES, seconds: float = 60) -> bool:
    return tune(candidates, CONFIG, bench.boot, found, seconds=seconds, measure=bench.measure)


def test_everything_is_measured_once(bench: Bench, tmp_path: Path) -> None:
    assert run(bench, journal(tmp_path))
    assert bench.booted == bench.stopped == list(CANDIDATES)
    assert bench.measured == [(name, load) for name in CANDIDATES for load in (1, 8)]
    again = journal(tmp_path)
    assert run(bench, again) and len(bench.booted) == 3
    assert again.trials["marlin"].figures[8]["output_tokens_per_s"] == 60.0


def test_a_kill_costs_one_load(bench: Bench, tmp_path: Path) -> None:
    calls = 0

    def killed(end: Endpoint, config: TuneConfig, load: int) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return bench.measure(end, config, load)

    with pytest.raises(KeyboardInterrupt):
        tune(CANDIDATES, CONFIG, bench.boot, journal(tmp_path), seconds=60, measure=killed)
    assert bench.stopped == ["vllm", "marlin"]  # no server is left behind
    bench.measured.clear()
    assert run(bench, journal(tmp_path))
    assert bench.measured == [("marlin", 8), ("odd", 1), ("odd", 8)]


def test_what_does_not_boot_is_recorded_and_skipped(bench: Bench, tmp_path: Path) -> None:
    bench.broken["marlin"] = "vLLM died: no such kernel"
    found = journal(tmp_path)
    assert run(bench, found)
    assert found.trials["marlin"].failed == "vLLM died: no such kernel"
    assert set(found.trials["odd"].figures) == {1, 8}
    bench.booted.clear()
    assert run(bench, journal(tmp_path)) and bench.booted == []


def test_requests_that_fail_end_a_candidate(bench: Bench, tmp_path: Path) -> None:
    bench.figures["vllm", 8] = -1
    found = journal(tmp_path)
    assert run(bench, found)
    assert found.trials["vllm"].failed and set(found.trials["vllm"].figures) == {1}
    assert bench.stopped == list(CANDIDATES)


def test_out_of_time(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    real = bench.measure

    def slow(end: Endpoint, config: TuneConfig, load: int) -> dict[str, float]:
        now[0] += 25
        return real(end, config, load)

    found = journal(tmp_path)
    assert not tune(CANDIDATES, CONFIG, bench.boot, found, seconds=60, measure=slow)
    assert bench.measured == [("vllm", 1), ("vllm", 8), ("marlin", 1)]
    assert bench.stopped == ["vllm", "marlin"]
    assert not tune(CANDIDATES, CONFIG, bench.boot, journal(tmp_path), seconds=0, measure=slow)
    monkeypatch.setattr(module.time, "monotonic", time.perf_counter)
    assert run(bench, journal(tmp_path))


@pytest.mark.parametrize("spoil", ["{", "[]", '{"schema": 2}', '{"schema": 1, "about": {"model": "m"}, "trials": [3]}'])
def test_a_spoilt_journal_is_begun_anew(bench: Bench, tmp_path: Path, spoil: str) -> None:
    (tmp_path / "tune.json").write_text(spoil)
    assert run(bench, journal(tmp_path)) and len(bench.booted) == 3


def test_other_settings_or_another_model_are_measured_anew(bench: Bench, tmp_path: Path) -> None:
    run(bench, journal(tmp_path))
    bench.booted.clear()
    run(bench, journal(tmp_path), {**CANDIDATES, "odd": {"ngram": 4}})
    assert bench.booted == ["odd"]
    run(bench, journal(tmp_path, plan="other"))
    assert bench.booted == ["odd", *CANDIDATES]
    assert Journal(tmp_path / "tune.json", {"model": "m", "plan": "other"}, fresh=True).trials == {}


def conclude(bench: Bench, tmp_path: Path) -> list[str]:
    settings = {**CANDIDATES, FP16: {}}
    found = journal(tmp_path)
    run(bench, found, settings)
    profile = profile_of(Key("card", "shape", "awq-g128", "0.32.0"), CONFIG, found, settings, "qvl tune")
    assert profile is not None
    assert FP16 not in profile.candidates
    return recommendation(profile)


def test_the_winner_and_fp16_are_named(bench: Bench, tmp_path: Path) -> None:
    lines = conclude(bench, tmp_path)
    assert lines[0] == "1 in flight: marlin (kernel marlin), 1.20x vLLM's own settings, 1.09x fp16"
    assert lines[1] == "8 in flight: vllm (none), 0.78x fp16"
    assert lines[2].startswith("fp16 is faster at 8 in flight: serve it there")
    assert lines[3] == "--profile latency: marlin, throughput: vllm, auto: marlin"


def test_where_awq_always_loses(bench: Bench, tmp_path: Path) -> None:
    bench.figures[FP16, 1] = 20.0
    assert "fp16 is faster at every load" in "\n".join(conclude(bench, tmp_path))


def test_nothing_measured_is_no_profile(bench: Bench, tmp_path: Path) -> None:
    bench.broken = dict.fromkeys(CANDIDATES, "no")
    found = journal(tmp_path)
    run(bench, found)
    assert profile_of(Key("c", "s", "f", "v"), CONFIG, found, CANDIDATES, "qvl tune") is None


def test_the_table() -> None:
    trials = [
        Trial("a", {}, {1: {"output_tokens_per_s": 12.5}}, "died\nof this"),
        Trial(FP16, {}, {1: {"output_tokens_per_s": 99.0}}),
    ]
    assert table_rows(trials, (1, 8)) == [("a", ["12.5*", "", "died"]), (FP16, ["99", "", ""])]


def test_no_load() -> None:
    with pytest.raises(BenchError, match="tuning needs loads"):
        TuneConfig(concurrencies=())
    with pytest.raises(BenchError, match="--output-tokens of at least 2"):
        TuneConfig(output_tokens=1)


def test_a_load_on_a_server_of_known_speed() -> None:
    """Eight tokens, the first after 20 ms and one each 10 ms: two in flight give 2 x 8 tokens in 90 ms."""
    config = TuneConfig(concurrencies=(2,), requests=6, output_tokens=8, image_sizes=((56, 56),))
    with serving(Behaviour(first_s=0.02, gap_s=0.01)) as server:
        found = module.measure_load(Endpoint(server.url, "fake"), config, 2)
        assert len(server.bodies) == 2 + 2 + 6
        assert len({str(body["messages"]) for body in server.bodies}) == 10  # no cache could help
    assert found["requests"] == 6
    assert 0 < found["output_tokens_per_s"] < 178  # a busy machine only ever takes longer
    assert found["tpot_ms"] > 9.9 and found["ttft_ms"] > 19.9


def test_questions_are_the_same_for_all_and_answered_to_their_end(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    lines = [
        {"id": str(i), "task": "t", "question": f"Question {i}?", "images": [], "answers": ["a"]} for i in range(9)
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    config = TuneConfig(concurrencies=(2,), requests=6, output_tokens=8, questions=file)
    seen = []
    for _ in range(2):
        with serving(Behaviour()) as server:
            module.measure_load(Endpoint(server.url, "fake"), config, 2)
            assert not any(body.get("ignore_eos") for body in server.bodies)
            seen.append(sorted(str(body["messages"]) for body in server.bodies))
    assert seen[0] == seen[1] and len(set(seen[0])) > 4


def test_a_load_that_fails() -> None:
    config = TuneConfig(concurrencies=(1,), requests=3, output_tokens=8, image_sizes=(None,))
    with serving(Behaviour(fail_after=4)) as server, pytest.raises(BenchError, match=r"requests failed at 1 in flight"):
        module.measure_load(Endpoint(server.url, "fake"), config, 1)


class TestCandidates:
    def test_hopper(self) -> None:
        found = catalogue.candidates("gpu", "NVIDIA H100 80GB HBM3", True)
        assert next(iter(found)) == "vllm" and found["vllm"] == EngineSettings()
        assert found["marlin"].kernel == "marlin" and "ngram" not in found
        assert {settings.kernel for settings in found.values()} == {None, "qvl", "marlin", "humming"}
        assert found["encoder-graphs"].encoder_graphs and found["shared-image-cache"].mm_cache_type == "shm"
        text = catalogue.candidates("gpu", "NVIDIA H100", True, text=True)
        assert text["marlin-ngram"].ngram == 3 and text["marlin-ngram-gpu"].ngram_gpu == 3
        assert not [s for s in found.values() if s.kv_cache_dtype]  # changes answers
        assert "fp8-cache" in catalogue.candidates("gpu", "NVIDIA H100", True, lossy=True)

    def test_no_kernel_where_there_is_no_choice(self) -> None:
        assert "marlin" not in catalogue.candidates("gpu", "NVIDIA L4", True)
        assert not [s for s in catalogue.candidates("gpu", "NVIDIA H100", False).values() if s.kernel]

    def test_a_cpu_has_neither_kernels_nor_graphs(self) -> None:
        for settings in catalogue.candidates("cpu", "Xeon", True).values():
            assert settings.kernel is None and settings.cudagraph_mode is None and settings.performance_mode is None

    @pytest.mark.parametrize("backend", ["cpu", "gpu"])
    def test_all_differ(self, backend: Any) -> None:
        found = list(catalogue.candidates(backend, "H100", True, text=True, lossy=True).values())
        assert all(a != b for i, a in enumerate(found) for b in found[:i])


class TestBusyGpu:
    def answer(self, monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
        def run(*arguments: Any, **settings: Any) -> Any:
            if text is None:
                raise FileNotFoundError("nvidia-smi")
            return SimpleNamespace(stdout=text)

        monkeypatch.setattr("serve.settings.backend.subprocess.run", run)

    def test_who_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer(monkeypatch, "999999999, python train.py, 20480 MiB\n1, [Not Found], [N/A]\n")
        with pytest.raises(ServerError) as caught:
            catalogue.refuse_busy_gpu()
        assert "python train.py (pid 999999999, 20480 MiB)" in str(caught.value) and "--shared" in str(caught.value)

    @pytest.mark.parametrize("text", ["", "\n", None])
    def test_a_free_one(self, monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
        self.answer(monkeypatch, text)
        catalogue.refuse_busy_gpu()


class TestVerb:
    """What is refused before anything boots."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QVL_CACHE", str(tmp_path))

    def refusal(self, *arguments: str) -> str:
        result = CliRunner().invoke(app, ["tune", *arguments])
        assert isinstance(result.exception, QvlError), result.output
        return str(result.exception)

    def test_settings_that_can_not_be(self) -> None:
        assert "--only magic: no such candidate here. There are vllm" in self.refusal("demo", "--only", "magic")
        assert "--concurrency" in self.refusal("demo", "--concurrency", "none")
        assert "don't divide by 3" in self.refusal("demo", "--tp", "3")
        assert "no such directory" in self.refusal("/nowhere")
        assert "no such file of questions" in self.refusal("demo", "--questions", "/nowhere.jsonl")
        assert "--only ngram: no such candidate" in self.refusal("demo", "--only", "ngram")

    def test_a_gpu_that_others_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("serve.settings.backend.require_vllm", lambda backend: "0.32.0")
        answer = SimpleNamespace(stdout="999999999, python train.py, 20480 MiB\n")
        monkeypatch.setattr("serve.settings.backend.subprocess.run", lambda *a, **k: answer)
        assert "python train.py" in self.refusal("demo", "--backend", "gpu")

    def test_nothing_that_boots(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(*arguments: Any, **settings: Any) -> None:
            raise ServerError("vLLM died")

        monkeypatch.setattr("serve.process.lifecycle.start", start)
        said = self.refusal("demo", "--backend", "cpu", "--only", "vllm,compiled", "--fp16", "demo")
        assert said == "nothing was measured: vllm: vLLM died\ncompiled: vLLM died\nfp16: vLLM died"
        said = self.refusal("demo", "--backend", "cpu", "--only", "few-sequences", "--minutes", "0")
        assert said == "nothing was measured: the time was up before the first load"
        late = ["tune", "demo", "--backend", "cpu", "--only", "few-sequences", "--minutes", "0", "--fail-if-left"]
        assert CliRunner().invoke(app, late).exit_code == 3  # as when only a part was measured
        said = self.refusal("demo", "--backend", "cpu", "--only", "vllm", "--fail-if-left")
        assert said == "nothing was measured: vllm: vLLM died"
