"""After the table of times: what the suites measured besides time, which the table has no column for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    """Print each benchmark's extra info."""
    session: Any = getattr(config, "_benchmarksession", None)
    found = [(bench.name, bench.extra_info) for bench in session.benchmarks if bench.extra_info] if session else []
    if found:
        terminalreporter.section("measured besides time")
    for name, info in found:
        terminalreporter.line(f"{name}: {', '.join(f'{key} {value}' for key, value in info.items())}")
