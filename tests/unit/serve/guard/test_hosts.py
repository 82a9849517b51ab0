from __future__ import annotations

import socket

import pytest

from serve.guard.hosts import Hosts
from serve.http.errors import Refusal

HOSTS = Hosts(("qvl.example.com",), ("https://app.example.com",))


def check(host: str | None = None, origin: str | None = None) -> None:
    headers = [(name, value.encode()) for name, value in ((b"host", host), (b"origin", origin)) if value is not None]
    HOSTS.check({"headers": headers})


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "localhost:8000", "LOCALHOST:8000", "localhost.", "a.localhost:1", "127.0.0.1", "127.0.0.1:8000",
        "[::1]:8000", "10.244.1.7:8000", "192.168.1.5:9000", "qvl.example.com", "QVL.example.com:443", None, "",
        socket.gethostname(), "[fe80::1%eth0]:80",
    ],
)  # fmt: skip
def test_addresses_and_names_of_this_machine_pass(host: str | None) -> None:
    """Probes of Kubernetes have the pod's address, published ports of Docker that of its host or localhost."""
    check(host)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "a@localhost", "x.com:0",
     "notlocalhost", "qvl.example.com.evil.example", "2130706433", "[evil.example]"],
)  # fmt: skip
def test_other_names_are_refused(host: str) -> None:
    with pytest.raises(Refusal) as caught:
        check(host)
    assert (caught.value.status, caught.value.reason) == (403, "host")
    assert "evil" not in caught.value.message


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("qvl.example.com", "https://qvl.example.com"),
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("localhost:8000", "https://app.example.com"),
    ],
)
def test_the_servers_own_page_and_named_origins_pass(host: str, origin: str) -> None:
    check(host, origin)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", "http://localhost", "x"])
def test_pages_of_other_origins_are_refused(origin: str) -> None:
    with pytest.raises(Refusal) as caught:
        check("localhost:8000", origin)
    assert (caught.value.status, caught.value.reason) == (403, "host")


def test_two_hosts_are_none() -> None:
    with pytest.raises(Refusal):
        HOSTS.check({"headers": [(b"host", b"localhost"), (b"host", b"evil.example")]})
