"""A certificate and its key are looked at before the boot, not by the first client."""

from __future__ import annotations

import os
import ssl
from datetime import timedelta
from pathlib import Path

import pytest

from serve.settings.arguments import vllm_arguments
from serve.settings.config import ServerConfig
from serve.settings.tls import Tls, _handshake, _server, pinned
from tests.support.certificates import certificate
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ServerError


def tls(files: tuple[str, str]) -> Tls:
    return Tls(ssl_certfile=files[0], ssl_keyfile=files[1])


def test_a_pair_that_fits(tmp_path: Path, demo: Checkpoint) -> None:
    files = certificate(tmp_path)
    assert tls(files).check() == []
    config = ServerConfig(backend="cpu", port=8443, tls=tls(files))
    assert config.url == "https://127.0.0.1:8443"
    words = vllm_arguments(config, demo, "m")
    assert words[words.index("--ssl-certfile") + 1] == files[0] and words[words.index("--ssl-keyfile") + 1] == files[1]
    plain = ServerConfig(backend="cpu")
    assert plain.url.startswith("http:") and not any(
        word.startswith("--ssl") for word in vllm_arguments(plain, demo, "m")
    )


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = certificate(tmp_path)
    assert tls(("cert.pem", "key.pem")).files == files


@pytest.mark.parametrize("given", ["ssl_certfile", "ssl_keyfile"])
def test_half_of_it_is_refused(given: str) -> None:
    with pytest.raises(ServerError, match=r"--ssl-\w+ without --ssl-\w+: TLS takes both"):
        Tls(**{given: "x.pem"})


@pytest.mark.parametrize(
    ("begins", "ends", "said"),
    [
        (-90, -1, "has expired"),
        (1, 90, "is not valid yet"),
        (-90, 3, "in 3 days: renew it"),
    ],
)
def test_a_certificate_out_of_its_time_is_warned_of(tmp_path: Path, begins: int, ends: int, said: str) -> None:
    files = certificate(tmp_path, begins=timedelta(days=begins), ends=timedelta(days=ends, hours=1))
    (warning,) = tls(files).check()
    assert said in warning and files[0] in warning


def test_files_that_are_of_no_use_are_named(tmp_path: Path) -> None:
    good, other = certificate(tmp_path / "a"), certificate(tmp_path / "b")
    locked = certificate(tmp_path / "c", passphrase="hunter2")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("hello\n")
    pipe, text, missing = str(tmp_path / "pipe"), str(tmp_path / "text"), str(tmp_path / "missing")
    for files, message in (
        ((missing, good[1]), f"--ssl-certfile {missing}: there is no such file"),
        ((good[0], missing), f"--ssl-keyfile {missing}: there is no such file"),
        ((str(tmp_path), good[1]), f"--ssl-certfile {tmp_path}: it is no file"),
        ((pipe, good[1]), f"--ssl-certfile {pipe}: it is no file"),
        ((text, good[1]), f"--ssl-certfile {text} holds no certificate"),
        ((good[1], good[0]), f"--ssl-certfile {good[1]} holds no certificate"),
        ((good[0], text), f"--ssl-keyfile {text} holds no private key"),
        ((good[0], other[1]), f"--ssl-keyfile {other[1]} is not the key of --ssl-certfile {good[0]}"),
        (locked, f"--ssl-keyfile {locked[1]} is locked with a passphrase"),
    ):
        with pytest.raises(ServerError) as caught:
            tls(files).check()
        assert message in str(caught.value), str(caught.value)


def test_pinned_trusts_one_certificate_only(tmp_path: Path) -> None:
    good, other = certificate(tmp_path / "a"), certificate(tmp_path / "b")
    # A chain in the file is sent along, and not trusted.
    chain = tmp_path / "chain.pem"
    chain.write_text(Path(good[0]).read_text() + Path(other[0]).read_text())
    _handshake(_server(*good), pinned(str(chain)))
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(_server(*other), pinned(str(chain)))


@pytest.mark.parametrize("flag", ["--ssl-certfile=x", "--ssl_keyfile"])
def test_vllms_own_flags_are_refused_with_a_hint(flag: str) -> None:
    with pytest.raises(ServerError, match=r"after -- : use qvl's own --ssl-"):
        ServerConfig(extra=(flag, "x"))


def test_certificates_of_clients_are_a_proxys() -> None:
    with pytest.raises(ServerError, match=r"--ssl-cert-reqs after -- can't be: .* proxy"):
        ServerConfig(extra=("--ssl-cert-reqs", "2"))
