"""What a user may name: a directory, a hub id, demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tiny
from toolkit.errors import CheckpointError, HubError
from toolkit.sources.directory import resolve


class TestResolve:
    def test_demo_is_the_embedded_model(self) -> None:
        assert (resolve("demo") / "config.json").exists()

    def test_what_exists_is_a_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tiny.write(tmp_path / "org" / "name")
        monkeypatch.chdir(tmp_path)
        assert resolve("org/name") == Path("org/name")
        assert resolve(str(tmp_path / "org")) == tmp_path / "org"

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "m").mkdir()
        assert resolve("~/m") == tmp_path / "m"

    @pytest.mark.parametrize("model", ["./x", "../x", "/nowhere/x", "~/nowhere-at-all", "x", "a/b/c", "a b/c"])
    def test_what_is_no_hub_name_must_exist(self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match="no such directory"):
            resolve(model)

    @pytest.mark.parametrize("model", ["", " "])
    def test_nothing(self, model: str) -> None:
        with pytest.raises(CheckpointError, match="no model was given"):
            resolve(model)

    def test_org_and_name_is_looked_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # nothing listens there
        with pytest.raises(HubError, match=r"org/name is no directory here.*127\.0\.0\.1:1 can't be reached"):
            resolve("org/name")

    @pytest.mark.parametrize("model", ["demo", "."])
    def test_a_revision_needs_a_hub(self, model: str) -> None:
        with pytest.raises(CheckpointError, match="--revision main only applies"):
            resolve(model, "main")
