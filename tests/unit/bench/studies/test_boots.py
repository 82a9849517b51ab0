"""Ways of starting a server: how they are written, and the table they end in."""

from __future__ import annotations

import pytest

from bench.studies.boots import Way, _table, parse_way
from toolkit.errors import BenchError


def test_a_way_has_variables_options_and_flags() -> None:
    assert parse_way("ours=") == Way("ours", {}, (), ())
    assert parse_way("old=VLLM_X=0 A=b=c --tp 2 -- --flag x") == Way(
        "old", {"VLLM_X": "0", "A": "b=c"}, ("--tp", "2"), ("--flag", "x")
    )
    assert parse_way("bare=-- --x") == Way("bare", {}, (), ("--x",))


@pytest.mark.parametrize("text", ["", "ours", "=x", "a b=c", "../x="])
def test_a_way_without_a_name_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match="give NAME="):
        parse_way(text)


def test_the_table_holds_all_against_the_first() -> None:
    rounds = [{"ms_a_token": ms, "ttft_ms": 10.0, "tokens_a_second": 400.0, "failed": 0} for ms in (2.0, 2.2)]
    halved = [{**each, "ms_a_token": each["ms_a_token"] / 2} for each in rounds]
    ways = {
        "ours": {"asked": "", "seconds": 50.0, "loads": {"1": rounds}},
        "better": {"asked": "--flag", "seconds": 51.0, "loads": {"1": halved}},
        "bad": {"asked": "--no", "failed": "no such flag"},
    }
    table = _table({"model": "/x/2b", "ways": ways})
    assert "| ours | 50.0 | 2.100 (2.000 to 2.200, x1.00) | 10.0 | 400.0 | `` |" in table
    assert "| better | 51.0 | 1.050 (1.000 to 1.100, x2.00) | 10.0 | 400.0 | `--flag` |" in table
    assert "| bad | no such flag |" in table
