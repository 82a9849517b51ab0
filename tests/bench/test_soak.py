"""The soak's accounts: what does not add up is said."""

from __future__ import annotations

import pytest

from bench.soak import Report, _difference


def sound() -> Report:
    return Report(
        minutes=1,
        workers=1,
        seed=0,
        sent={"good": 10, "hostile": 3, "leaves before the answer": 2},
        seen_status={"200": 10, "400": 2, "401": 1},
        counted_status={"200": 11, "499": 1, "400": 2, "401": 1},
        seen_reason={"n": 2, "key": 1},
        counted_reason={"n": 2, "key": 1},
        in_flight={"vllm:num_requests_running": 0.0},
        memory_warm=100.0,
        memory_end=104.0,
    )


def test_a_sound_soak_has_no_problems() -> None:
    assert sound().problems() == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("wrong", ["a good request got 500"], "500"),
        ("counted_reason", {"n": 2}, "key"),
        ("counted_reason", {"n": 3, "key": 1}, "3 were counted"),
        ("counted_status", {"200": 10, "499": 1, "400": 2, "401": 1}, "nobody waited for"),
        ("counted_status", {"200": 11, "499": 1, "400": 2, "401": 1, "500": 1}, "status 500"),
        ("seen_status", {"200": 9, "400": 2, "401": 1}, "9 good answers"),
        ("in_flight", {"vllm:num_requests_running": 1.0}, "num_requests_running"),
        ("memory_end", 106.0, "memory grew by 6.0%"),
    ],
)
def test_what_does_not_add_up_is_said(field: str, value: object, said: str) -> None:
    report = sound()
    setattr(report, field, value)
    problems = report.problems()
    assert len(problems) == 1
    assert said in problems[0]


def test_counters_are_compared_by_one_label() -> None:
    before = {("c_total", 'route="/a",status="200"'): 5.0, ("other", 'status="200"'): 1.0}
    after = {
        ("c_total", 'route="/a",status="200"'): 7.0,
        ("c_total", 'route="/b",status="200"'): 3.0,
        ("c_total", 'route="/b",status="404"'): 1.0,
        ("c_total", 'route="/metrics",status="200"'): 9.0,
        ("other", 'status="200"'): 8.0,
    }
    assert _difference(before, after, "c_total", "status", route=lambda route: route != "/metrics") == {
        "200": 5,
        "404": 1,
    }
