"""What shares say: shown once, kept for the report, and heard when it is the end."""

from __future__ import annotations

import pickle
from concurrent.futures import Future

import pytest

from toolkit.errors import ResourceError
from toolkit.quantize.events import Captured, Ended, Failed, LayerDone, Note
from toolkit.quantize.progress import RunProgress
from toolkit.quantize.shares import _Listener

LAYER = LayerDone(3, 0.01, {"load": 0.5, "total": 2.0}, 10**9)


@pytest.fixture
def listener() -> _Listener:
    progress = RunProgress()
    progress.layers(0, 4)
    return _Listener(progress, Future())


def test_what_is_kept_and_shown(listener: _Listener, capsys: pytest.CaptureFixture[str]) -> None:
    ended = Ended("CPU, 2 threads", {"embed": 1.0, "layers": 2.0}, 0, 10**9)
    for event in (Captured(1), Note("less memory"), LAYER, ended):
        listener.hear(event)
    assert listener.layers == [LAYER] and listener.ends == [ended]
    told = capsys.readouterr().err
    assert "less memory" in told and "layer 3: output error 0.0100, 2.0 s, peak 1.0 GB (1/4)" in told


def test_all_shares_pass_the_same_samples(listener: _Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    monkeypatch.setattr(listener.progress, "advance", shown.append)
    listener.hear(Captured(5), rank=1)
    listener.hear(Captured(7), rank=0)
    assert shown == [7]


def test_a_share_that_failed_ends_the_run(listener: _Listener) -> None:
    with pytest.raises(ResourceError, match="out of memory on cuda:1"):
        listener.hear(Failed(ResourceError("out of memory on cuda:1")), rank=1)


def test_a_full_disk_beside_the_search_ends_it(listener: _Listener) -> None:
    listener.copying.set_exception(ResourceError("the disk is full"))
    with pytest.raises(ResourceError, match="the disk is full"):
        listener.hear(LAYER)


@pytest.mark.parametrize("event", [Captured(1), Note("x"), LAYER, Ended("CPU", {"embed": 1.0}, 0, 1)])
def test_events_pass_between_processes(event: object) -> None:
    assert pickle.loads(pickle.dumps(event)) == event
    failed = pickle.loads(pickle.dumps(Failed(ResourceError("no memory"))))
    assert isinstance(failed.error, ResourceError) and str(failed.error) == "no memory"
