from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from serve.guard.keys import Keys, read_keys
from toolkit.errors import ServerError


def test_a_file_may_hold_comments_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ann\nkey-of-ann\n\n  key-of-bob  \r\n#key-of-eve\n")
    assert read_keys(file) == ["key-of-ann", "key-of-bob"]
    keys = Keys(file)
    assert keys.name_of(b"key-of-ann") and keys.name_of(b"key-of-bob")
    assert keys.name_of(b"key-of-ann") != keys.name_of(b"key-of-bob")
    for wrong in (b"key-of-eve", b"", b"# ann", b"key-of-an", b"key-of-ann ", b"\xff"):
        assert keys.name_of(wrong) is None


@pytest.mark.parametrize("text", ["", "# nothing\n\n", "two words\n", "k\u00e9y\n", "good\nbad\tone\n"])
def test_files_without_a_usable_key(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ServerError, match="--api-key-file"):
        Keys(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="can't be read"):
        read_keys(tmp_path / "keys")


def test_no_message_holds_a_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("hunter2 hunter2\n")
    with pytest.raises(ServerError) as caught:
        read_keys(file)
    assert "hunter2" not in str(caught.value)
    file.write_text("hunter2\n")
    keys = Keys(file, look_seconds=0)
    file.write_text("hunter3 hunter3\n")
    assert keys.name_of(b"hunter2")
    assert "hunter" not in caplog.text
    assert "hunter" not in repr(vars(keys))


def test_keys_change_while_the_server_runs(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first\n")
    keys = Keys(file, "fixed", look_seconds=0)
    new = tmp_path / "new"
    new.write_text("other\n")  # as many bytes
    os.utime(new, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    new.replace(file)  # the way it should be done: never half a file
    assert keys.name_of(b"other")
    assert keys.name_of(b"first") is None
    assert keys.name_of(b"fixed")
    file.write_text("third-key\n")  # in place
    assert keys.name_of(b"third-key")
    assert keys.name_of(b"other") is None


@pytest.mark.parametrize("spoil", ["remove", "empty", "directory", "garbage"])
def test_a_spoiled_file_keeps_the_keys_before(tmp_path: Path, spoil: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = tmp_path / "keys"
    file.write_text("first\n")
    keys = Keys(file, look_seconds=0)
    file.unlink()
    if spoil == "directory":
        file.mkdir()
    elif spoil != "remove":
        file.write_bytes(b"" if spoil == "empty" else b"\xff\xfe\0")
    for _ in range(5):
        assert keys.name_of(b"first")
    assert caplog.text.count("keys before stay in force") == 1
    if spoil == "directory":
        file.rmdir()
    file.write_text("second\n")
    assert keys.name_of(b"second")
    assert keys.name_of(b"first") is None


def test_a_mounted_secret_is_a_link_to_a_link(tmp_path: Path) -> None:
    """Kubernetes swaps a directory behind a symbolic link."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(f"key-{name}\n")
    (tmp_path / "data").symlink_to("one")
    (tmp_path / "keys").symlink_to("data/keys")
    keys = Keys(tmp_path / "keys", look_seconds=0)
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(tmp_path / "data")
    assert keys.name_of(b"key-two")
    assert keys.name_of(b"key-one") is None


def test_the_file_is_not_looked_at_on_every_request(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first\n")
    keys = Keys(file, look_seconds=60)
    file.write_text("second\n")
    assert keys.name_of(b"first")
    assert keys.name_of(b"second") is None
