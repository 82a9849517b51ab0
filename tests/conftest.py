"""Settings for all tests, and the options of those that measure a server that runs already:

pytest --endpoint http://127.0.0.1:8000 --slo ttft=500ms,tpot=50ms
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter

# Models here are tiny: on two busy cores torch's threads would wait for each other more than they would work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# An example takes as long as the machine lets it; speed is measured elsewhere.
settings.register_profile("qvl", deadline=None)
settings.load_profile("qvl")

# A shell starts background jobs with SIGINT ignored, and programs started by the tests would inherit that: those that
# are sent a Ctrl-C must heed it wherever the tests themselves run.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Lines that tests want to be read at the end.
TOLD = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("server")
    group.addoption("--endpoint", metavar="URL", help="run the latency tests alone, against this server; boot none")
    group.addoption("--slo", metavar="SLO", help="objectives of the latency tests, such as ttft=500ms,tpot=50ms")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TOLD] = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A worker takes a group at a time: a file, or several that share servers.
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    # Groups go to workers in this order: the long ones first, so that none is left at the end with one worker on it.
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    e2e = {item.path for item in items if item.get_closest_marker("e2e")}
    items.sort(key=lambda item: (item.path not in e2e, -slow[item.path] if item.path not in e2e else 0))
    if config.getoption("--endpoint"):
        wanted = [item for item in items if "endpoint" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # under xdist: what a worker sends at its end
    if output is not None:
        output["told"] = session.config.stash[TOLD]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[TOLD] += getattr(node, "workeroutput", {}).get("told", [])  # one that died has sent nothing


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    if config.stash[TOLD]:
        terminalreporter.section("measured")
    for line in config.stash[TOLD]:
        terminalreporter.line(line)
