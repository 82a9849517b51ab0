"""Settings for all tests, and the options of those that measure a server that runs already:

pytest --endpoint http://127.0.0.1:8000 --slo ttft=500ms,tpot=50ms
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from tests.support.limit import at_most

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

#: Seconds after which the setup, the call or the teardown of a test has failed: they wait for conditions, and one that
#: never comes must not hold up the rest. Far beyond what any takes, on a loaded machine too.
LIMIT, RELEASE_LIMIT = 900.0, 3600.0
#: Groups of files that share servers, the longest first.
SHARED = ("served", "guarded", "public")
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
    group: dict[pytest.Item, str] = {}
    for item in items:
        marker = item.get_closest_marker("xdist_group")
        group[item] = item.nodeid.partition("::")[0] if marker is None else marker.args[0]
        if marker is None:
            item.add_marker(pytest.mark.xdist_group(group[item]))
    # Groups go to workers in this order: the long ones first, so that none is left at the end with one worker on it.
    slow = Counter(group[item] for item in items if item.get_closest_marker("slow"))
    e2e = {group[item] for item in items if item.get_closest_marker("e2e")}

    def rank(item: pytest.Item) -> tuple[int, int]:
        name = group[item]
        if name in SHARED:
            return SHARED.index(name), 0
        return (len(SHARED), 0) if name in e2e else (len(SHARED) + 1, -slow[name])

    items.sort(key=rank)
    if config.getoption("--endpoint"):
        wanted = [item for item in items if "endpoint" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted


def _limit(item: pytest.Item) -> float:
    return RELEASE_LIMIT if item.get_closest_marker("release") else LIMIT


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with at_most(_limit(item)):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with at_most(_limit(item)):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    with at_most(_limit(item)):
        yield


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
