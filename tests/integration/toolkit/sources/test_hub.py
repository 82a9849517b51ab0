"""Fetching from a hub served on 127.0.0.1: what is fetched, what is resumed, and what each failure says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support import tiny
from tests.support.paths import ROOT
from tests.support.small_hub import COMMIT, SmallHub, model_files, serve
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import HubError, ResourceError
from toolkit.sources.directory import resolve
from toolkit.sources.hub import fetch
from toolkit.units import human_bytes

NAME = "someone/tiny-qwen2-vl"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    """A hub with one model in two shards, and files that are none of a server's business."""
    from huggingface_hub import constants

    files = model_files(tiny.write(tmp_path / "repo", shards=2))
    files |= {"README.md": b"# card", "pytorch_model.bin": b"x" * 100, "onnx/model.safetensors": b"y", "LICENSE": b"z"}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.chdir(tmp_path)
    with serve(SmallHub(NAME, files)) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served


def wanted(hub: SmallHub) -> list[str]:
    return sorted(
        name for name in hub.files if name not in ("README.md", "pytorch_model.bin", "onnx/model.safetensors")
    )


def test_a_model_is_fetched_and_opens(hub: SmallHub) -> None:
    path = fetch(NAME)
    assert sorted(tiny.files(path)) == wanted(hub) == hub.fetched()
    checkpoint = Checkpoint.open(path)
    expected = tiny.tensors()
    assert all(torch.equal(checkpoint.get(name), tensor) for name, tensor in expected.items())


def test_resolve_fetches(hub: SmallHub) -> None:
    assert resolve(NAME) == fetch(NAME)


def test_what_is_cached_is_not_fetched_again(hub: SmallHub) -> None:
    first = fetch(NAME)
    hub.downloads.clear()
    assert fetch(NAME) == first
    assert hub.downloads == []


@pytest.mark.parametrize("revision", ["v1.0", COMMIT])
def test_a_revision(hub: SmallHub, revision: str) -> None:
    assert fetch(NAME, revision).name == COMMIT
    assert any(revision in request for request in hub.requests)


def test_what_will_be_fetched_is_said(hub: SmallHub, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(NAME)
    said = " ".join(capsys.readouterr().err.split())
    size = human_bytes(sum(len(hub.files[name]) for name in wanted(hub)))
    assert f"fetching {NAME}: {len(wanted(hub))} files, {size}, to" in said
    fetch(NAME)
    assert "fetching" not in capsys.readouterr().err


class TestInterrupted:
    def test_a_dropped_connection_goes_on_where_it_broke(self, hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what is written at a time, 10 MiB otherwise
        shard = "model-00002-of-00002.safetensors"
        hub.cut[shard] = 50_000
        path = fetch(NAME)
        ranges = [asked for name, asked in hub.downloads if name == shard]
        assert len(ranges) == 2
        begin = int(ranges[1].removeprefix("bytes=").rstrip("-"))
        assert 0 < begin <= 50_000
        assert (path / shard).read_bytes() == hub.files[shard]

    def test_after_a_kill_whole_files_are_kept(self, hub: SmallHub, tmp_path: Path) -> None:
        shard = "model-00002-of-00002.safetensors"
        hub.stall.add(shard)
        env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        script = "import sys; from toolkit.sources.hub import fetch; fetch(sys.argv[1])"
        root = ROOT
        process = subprocess.Popen([sys.executable, "-c", script, NAME], env=env, cwd=root, stderr=subprocess.DEVNULL)
        snapshot = tmp_path / "cache" / "models--someone--tiny-qwen2-vl" / "snapshots" / COMMIT
        try:
            deadline = time.monotonic() + 60
            while len(list(snapshot.glob("*"))) < len(wanted(hub)) - 1:
                assert time.monotonic() < deadline, "the other files did not arrive"
                assert process.poll() is None
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
        with pytest.raises(Exception, match="half-downloaded"):
            Checkpoint.open(snapshot)
        hub.stall.clear()
        hub.downloads.clear()
        Checkpoint.open(fetch(NAME))
        assert hub.fetched() == [shard]


WHY = {True: "is not asked, as HF_HUB_OFFLINE is set", False: "can't be reached"}


class TestOutOfReach:
    @pytest.mark.parametrize("offline", [False, True])
    def test_a_whole_snapshot_is_used(self, hub: SmallHub, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        path = fetch(NAME)
        self.cut_off(offline, monkeypatch)
        assert fetch(NAME) == path
        assert fetch(NAME, COMMIT) == path

    @pytest.mark.parametrize("offline", [False, True])
    def test_half_a_snapshot_is_not(self, hub: SmallHub, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        path = fetch(NAME)
        (path / "model-00001-of-00002.safetensors").unlink()
        self.cut_off(offline, monkeypatch)
        with pytest.raises(HubError, match=rf"not \(completely\) in the cache, and .*{WHY[offline]}.*kept"):
            fetch(NAME)

    @pytest.mark.parametrize("offline", [False, True])
    def test_nothing_cached(self, hub: SmallHub, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cut_off(offline, monkeypatch)
        with pytest.raises(HubError, match=WHY[offline]):
            fetch(NAME)

    def cut_off(self, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        if offline:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        else:
            monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # nothing listens there


class TestRefused:
    def expect(self, message: str, hub_id: str = NAME, revision: str | None = None) -> None:
        with pytest.raises(HubError, match=message) as caught:
            fetch(hub_id, revision)
        assert "\n" not in str(caught.value)

    def test_no_such_model(self, hub: SmallHub) -> None:
        self.expect(
            "someone/else is neither a directory here nor a model on http.*spelling.*hf auth login", "someone/else"
        )

    def test_no_such_revision(self, hub: SmallHub) -> None:
        self.expect("has no revision v9: give a branch, tag or full commit hash", revision="v9")

    def test_gated(self, hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.gated_for = "the-right-token"
        self.expect(f"is gated: ask for access at {hub.url}/{NAME}.*HF_TOKEN")
        monkeypatch.setenv("HF_TOKEN", "the-right-token")
        Checkpoint.open(fetch(NAME))

    def test_token_of_the_login(self, hub: SmallHub, tmp_path: Path) -> None:
        hub.gated_for = "the-right-token"
        (tmp_path / "token").write_text("the-right-token")
        Checkpoint.open(fetch(NAME))

    @pytest.mark.parametrize("status", [400, 403, 429, 500, 503])
    def test_a_hub_in_trouble(self, hub: SmallHub, status: int) -> None:
        hub.status = status
        self.expect(f"{hub.url} answers with status {status}. Run again when that has")
        hub.status = None
        path = fetch(NAME)
        hub.status = status
        assert fetch(NAME) == path

    @pytest.mark.parametrize("hub_id", ["a/b--c", "x..y/z"])
    def test_names_the_hub_does_not_allow(self, hub: SmallHub, hub_id: str) -> None:
        self.expect("can't be fetched: ", hub_id)
        assert hub.requests == []

    def test_too_small_a_disk(self, hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
        free = type("usage", (), {"free": 1000})()
        monkeypatch.setattr("shutil.disk_usage", lambda path: free)
        with pytest.raises(ResourceError, match=r"needs \d+ KiB more in .*which has 1000 B free.*HF_HOME"):
            fetch(NAME)
        assert hub.downloads == []
