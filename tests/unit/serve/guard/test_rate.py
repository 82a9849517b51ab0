from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.guard.rate import Clients
from serve.http.errors import Refusal


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def admitted(clients: Clients, name: str = "a") -> bool:
    try:
        clients.enter(name)
    except Refusal:
        return False
    clients.leave(name)
    return True


@given(
    st.floats(1, 6000),
    st.lists(st.floats(0, 30), min_size=1, max_size=60),
)
def test_never_more_than_the_rate_and_the_burst(rate: float, pauses: list[float]) -> None:
    clock = Clock()
    clients = Clients(rate, 10, clock)
    passed = 0
    for pause in pauses:
        clock.now += pause
        passed += admitted(clients)
    allowed = max(1.0, rate / 6) + sum(pauses) * rate / 60
    assert passed <= allowed + 1e-6
    if rate >= 60 * 60:  # more than anyone asked for
        assert passed == len(pauses)


def test_whoever_waits_as_told_gets_in() -> None:
    clock = Clock()
    clients = Clients(7, 10, clock)
    assert admitted(clients)
    for _ in range(10):
        with pytest.raises(Refusal) as caught:
            clients.enter("a")
        wait = int(dict(caught.value.headers)[b"retry-after"])
        clock.now += wait
        assert admitted(clients)


def test_a_refusal_costs_nothing() -> None:
    clock = Clock()
    clients = Clients(60, 1, clock)
    clients.enter("a")
    for _ in range(100):
        with pytest.raises(Refusal) as caught:
            clients.enter("a")
        assert caught.value.reason == "concurrency"
    clients.leave("a")
    assert sum(admitted(clients) for _ in range(20)) == 9
    assert clients.running() == 0


def test_clients_are_told_apart() -> None:
    clients = Clients(6, 1, Clock())
    assert admitted(clients, "a")
    assert not admitted(clients, "a")
    assert admitted(clients, "b")


def test_only_idle_clients_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.guard.rate._MOST_CLIENTS", 100)
    clients = Clients(6, 1, Clock())
    clients.enter("busy")
    for number in range(1000):
        assert admitted(clients, str(number))
    assert len(clients._clients) <= 101
    assert clients.running() == 1
    clients.leave("busy")
    assert clients.running() == 0
