from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve.guard.keyfile import concerns, key_of
from serve.guard.keys import Keys, check_key, check_model, read_keys
from serve.http.errors import Refusal
from toolkit.errors import ServerError


@pytest.fixture(autouse=True)
def lines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is logged, which is the same lines whatever the format of vLLM's log is."""
    written: list[dict[str, Any]] = []
    monkeypatch.setattr("serve.guard.keys.write", lambda text: written.append(json.loads(text)))
    return written


def said(lines: list[dict[str, Any]]) -> str:
    return "\n".join(f"{line['level']} {line['logger']} {line['message']}" for line in lines)


def test_a_file_may_hold_comments_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ann\nkey-of-ann\n\n  key-of-bob  \r\n#key-of-eve\n")
    assert [(key.line, key.short) for key in read_keys(file)] == [(2, True), (4, True)]
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


@pytest.mark.parametrize(("kind", "words"), [("pipe", "a pipe"), ("directory", "a directory"), ("device", "a device")])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, words: str) -> None:
    """Reading a pipe would wait for a writer, a device might never end. In a process, lest a failure hang."""
    path = Path("/dev/zero") if kind == "device" else tmp_path / "keys"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    code = (
        "import sys; from pathlib import Path; from serve.guard.keyfile import read_keys; read_keys(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert f"ServerError: --api-key-file {path}: it can't be read (it is {words}" in done.stderr


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="can't be read"):
        read_keys(tmp_path / "keys")


def test_no_message_holds_a_key(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    file = tmp_path / "keys"
    file.write_text("hunter2 hunter2\n")
    with pytest.raises(ServerError) as caught:
        read_keys(file)
    assert "hunter2" not in str(caught.value)
    file.write_text("hunter2\n")
    keys = Keys(file, look_seconds=0)
    file.write_text("hunter3 hunter3\n")
    assert keys.name_of(b"hunter2")
    assert lines and "hunter" not in said(lines)
    assert "hunter" not in repr(vars(keys))


def test_keys_change_while_the_server_runs(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
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
    assert said(lines).count(f"warning qvl.guard --api-key-file {file} changed: 2 keys in force") == 2


@pytest.mark.parametrize("spoil", ["remove", "empty", "comments", "directory", "pipe", "garbage", "attribute"])
def test_a_spoiled_file_keeps_the_keys_before(tmp_path: Path, spoil: str, lines: list[dict[str, Any]]) -> None:
    """An emptied file revokes nothing in silence, and opens nothing."""
    file = tmp_path / "keys"
    file.write_text("first\n")
    keys = Keys(file, look_seconds=0)
    file.unlink()
    if spoil == "directory":
        file.mkdir()
    elif spoil == "pipe":
        os.mkfifo(file)
    elif spoil != "remove":
        content = {"empty": b"", "comments": b"#first\n\n", "attribute": b"first nmae=ann\n"}
        file.write_bytes(content.get(spoil, b"\xff\xfe\0"))
    for _ in range(5):
        assert keys.name_of(b"first")
        assert keys.name_of(b"") is None and keys.name_of(b"#first") is None
    assert said(lines).count("keys before stay in force") == 1
    if spoil == "directory":
        file.rmdir()
    elif spoil == "pipe":
        file.unlink()
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


def test_attributes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(
        "first\n"
        "second name=prometheus scope=metrics\n"
        "third  name=alice\texpires=2027-01-31 scope=models:7b-awq,charts tokens-per-day=2000000\n"
        "fourth expires=2027-01-31T12:00+01:00 scope=models\n"
        "zm9v== name=bob\n"
    )
    first, second, third, fourth, fifth = read_keys(file)
    assert first == replace(key_of("first"), line=1)
    assert first.name == first.digest.hex()[:8] and (first.scope, first.models) == ("all", None)
    assert (second.name, second.scope) == ("prometheus", "metrics")
    assert (third.name, third.scope, third.tokens_per_day) == ("alice", "models", 2_000_000)
    assert third.models == {"7b-awq", "charts"}
    assert third.expires == 1801440000.0  # the end of the day that is given
    assert fourth.expires == 1801440000.0 - 13 * 3600 and fourth.models is None
    assert fifth.name == "bob" and fifth.digest == key_of("zm9v==").digest  # padding of base64 is no attribute


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ("nmae=ann", "name=, expires=, scope=, tokens-per-day="),
        ("hunter2=", "after the key come attributes"),
        ("ann", "A key has no spaces"),
        ("name=", "name= takes"),
        ("name=a,b", "name= takes"),
        ("name=0123abcd", "not eight hex digits"),
        ("name=ann name=bob", "name= is there twice"),
        ("expires=tomorrow", "the last day, such as 2027-01-31"),
        ("expires=2027-02-30", "the last day"),
        ("expires=2027-01-31T12:00", "or a time, such as 2027-01-31T12:00Z"),
        ("scope=admin", "scope= takes metrics, models, or models:NAME"),
        ("scope=models:", "scope= takes"),
        ("scope=models:a,", "scope= takes"),
        ("scope=metrics:a", "scope= takes"),
        ("tokens-per-day=0", "tokens-per-day= takes"),
        ("tokens-per-day=1e6", "tokens-per-day= takes"),
        ("tokens-per-day=" + "9" * 5000, "tokens-per-day= takes"),
    ],
)
def test_a_line_that_is_not_understood_is_named_and_not_repeated(tmp_path: Path, attributes: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# keys\ngood\nhunter1 {attributes}\n")
    with pytest.raises(ServerError) as caught:
        read_keys(file)
    assert f"--api-key-file {file}, line 3: " in str(caught.value) and message in str(caught.value)
    assert "hunter" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(file))


def test_a_key_that_is_there_twice_must_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one name=ann\n\none name=ann\n")
    assert len(read_keys(file)) == 1
    file.write_text("one name=ann\n\none\n")
    with pytest.raises(ServerError, match="line 3: the key of line 1 again"):
        read_keys(file)


def test_an_operator_is_told_of_short_and_expired_keys(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{'x' * 15}\n{'y' * 16}\n{'z' * 16} expires=2020-01-01\n")
    keys = Keys(file, "short", look_seconds=0)
    told = said(lines)
    assert told.count("fewer than 16 characters") == 2 and "the key in line 1 has fewer" in told
    assert "the key in line 3 has expired (2020-01-02T00:00+00:00)" in told
    assert keys.name_of(b"x" * 15)  # it is in force all the same
    lines.clear()
    file.write_text(f"{'w' * 9}\n")
    assert keys.name_of(b"w" * 9)
    assert "the key in line 1 has fewer" in said(lines)
    assert list(concerns([key_of("y" * 16)], 0)) == []


def test_a_key_ends_when_it_says_so() -> None:
    key = replace(key_of("k"), expires=1000.0)
    check_key(key, "/v1/models", clock=lambda: 999.9)
    with pytest.raises(Refusal) as caught:
        check_key(key, "/v1/models", clock=lambda: 1000.0)
    assert (caught.value.status, caught.value.reason) == (401, "key_expired")


@pytest.mark.parametrize(
    ("scope", "may", "may_not"),
    [
        ("metrics", ("/metrics", "/version", "/v1/models"), ("/v1/chat/completions", "/v1/completions", "/tokenize")),
        ("models", ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize"), ("/metrics", "/version")),
        ("all", ("/v1/chat/completions", "/metrics", "/version", "/tokenize"), ()),
    ],
)
def test_a_scope_opens_some_routes(scope: Any, may: tuple[str, ...], may_not: tuple[str, ...]) -> None:
    key = replace(key_of("k"), scope=scope)
    for path in may:
        check_key(key, path)
    for path in may_not:
        with pytest.raises(Refusal) as caught:
            check_key(key, path)
        assert (caught.value.status, caught.value.reason) == (403, "scope")


def test_a_key_may_be_for_some_models_only() -> None:
    key = replace(key_of("k"), scope="models", models=frozenset({"a", "b"}))
    check_model(key, {"model": "b"})
    check_model(key_of("k"), {})
    for request in ({"model": "c"}, {"model": None}, {}, {"model": "A"}):
        with pytest.raises(Refusal, match="for the model a, b") as caught:
            check_model(key, request)
        assert (caught.value.status, caught.value.param) == (403, "model")
