"""report.html in real Chromium: it renders without a complaint, shows report.json's figures, and fits a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from bench import report as reports
from bench.load.loops import Block
from bench.machine.server_metrics import ServerPoint
from bench.report import words
from bench.report.compare import history_view
from bench.report.compare import html_file as compare_html
from bench.report.compare.comparison import compare_all
from bench.report.compare.figures import Side
from bench.report.compare.history import tracks
from bench.report.render.json_file import read
from bench.report.schema import Drift, Fidelity, FidelityItem, Load, Report, Share, SpeedFigure
from bench.roles import ROLES, Role
from bench.run.measured import Measurements, Stretch
from tests.support.browser import Browser, Tab, chromium
from tests.support.factory import CONFIG, about_images, trace
from tests.unit.bench.report.test_build import built

pytestmark = pytest.mark.slow

WIDTHS = (390, 1280)


def share(value: float, low: float, high: float) -> Share:
    return Share(value=value, low=low, high=high)


def full() -> Report:
    """A report with everything in it: loads of every kind, server counters, fidelity, flips with images."""
    config = CONFIG.replaced(
        concurrencies=(1, 16), rates=(2.0,), sweep=True, sweep_rates=2, rounds=3, slos="ttft=200ms,tpot=30ms"
    )
    asked = about_images(12, each=3) + about_images(8, each=2, task="street signs with long names")
    wrong: dict[Role, set[str]] = {
        "baseline": {"scans-1", "scans-3"},
        "candidate": {"scans-0", "scans-2", "street signs with long names-1"},
    }
    found = Measurements()
    swept = [
        Load(kind="single", name="sweep: one at a time", concurrency=1),
        Load(kind="saturation", name="sweep: saturation", concurrency=32),
        Load(kind="rate", name="sweep: 95% of saturation", arrivals="poisson", share=0.95),
    ]
    for role in ROLES:
        found.answers[role] = {q.id: trace("no" if q.id in wrong[role] else "yes") for q in asked}
        for number in range(3):
            scale = {"baseline": 1.0, "candidate": 0.8}[role] * (1 + 0.01 * number)

            def stretch(load: Load, scale: float = scale) -> tuple[Load, Stretch]:
                traces = tuple(trace(ttft=scale * (0.1 + i / 1000), gap=0.02 * scale) for i in range(96))
                seen = ServerPoint(1000, 30, 96, 0, 0, 1000, 200, 96, 0.002, 100, 1600)
                return load, Stretch(Block(traces, scale), load.rate_per_s, seen, 50.0)

            for load in config.loads:
                found.units[role, load.name, number] = [stretch(load)]
            found.units[role, "sweep", number] = [stretch(load) for load in swept]
    drift = Drift(
        tokens=300,
        scored=20,
        mean_kl=share(0.00035, 0.00006, 0.00077),
        top1_agreement=share(0.998, 0.99, 1.0),
        delta_p={"1": share(-0.017, -0.03, -0.01), "50": share(0.0, 0.0, 0.0)},
        perplexity_ratio=share(1.001, 0.999, 1.003),
        identical=share(0.95, 0.8, 1.0),
        greedy=1.0,
    )
    items = [
        FidelityItem(
            id=q.id,
            prompt=q.question,
            images=[],
            baseline="a",
            candidate="b",
            mean_kl=0.001 * number,
            tokens=9,
            identical=False,
            diverges_at=0,
            failure=None,
        )
        for number, q in enumerate(asked)
    ]
    report = built(found, config, asked)
    fidelity = Fidelity(
        source="questions as above",
        items_sha256="0",
        top_k=20,
        answer_tokens=64,
        candidate=drift,
        noise=drift.model_copy(update={"mean_kl": share(0.0, 0.0, 0.0)}),
        items=items,
        missing=[],
        failed=0,
        prompts_differ=0,
    )
    return report.model_copy(update={"fidelity": fidelity})


@pytest.fixture(scope="module")
def whole() -> Report:
    return full()


@pytest.fixture(scope="module")
def page(whole: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report"
    reports.write(whole, out)
    return out / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module", params=WIDTHS)
def opened(request: pytest.FixtureRequest, browser: Browser, page: Path) -> Iterator[Tab]:
    width = int(request.param)
    with browser.tab(width, 844, phone=width < 600) as tab:
        tab.open(page)
        yield tab


@pytest.fixture
def tab(opened: Tab) -> Iterator[Tab]:
    """The page, opened once a width. A test leaves it as it was, but for the flips that are shown."""
    yield opened
    opened.dark(False)


def rows(tab: Tab, table: str) -> list[list[str]]:
    """The text of a table's body cells, as the reader sees it; ``table``: a CSS selector."""
    found = tab.evaluate(
        "selector => [...document.querySelectorAll(selector + ' tbody tr')].map("
        "row => [...row.cells].map(cell => cell.innerText.replace(/\\s+/g, ' ').trim()))",
        table,
    )
    assert found
    return [list(map(str, row)) for row in found]


def test_it_renders_without_a_complaint_and_loads_nothing_else(tab: Tab, page: Path) -> None:
    assert tab.problems == []
    assert tab.requests == [page.as_uri()]
    # A glance at what drew: every plot has a size, every image is whole.
    assert tab.evaluate(
        "[...document.querySelectorAll('svg[role=img]')].every(s => s.getBoundingClientRect().height > 40)"
    )
    assert tab.evaluate("[...document.images].length") > 0
    assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0)")


def test_it_fits_its_width(tab: Tab) -> None:
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # What is wider than the page scrolls in its own box.
    wide = tab.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
        " && !e.closest('.scroll') && !e.closest('svg')).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_is_accessible(tab: Tab, dark: bool) -> None:
    tab.dark(dark)
    assert tab.accessibility_violations() == []


@pytest.mark.parametrize("name", ["compare", "history"])
def test_pages_over_several_reports_fit_and_are_accessible(
    browser: Browser, whole: Report, tmp_path: Path, name: str
) -> None:
    later = whole.model_copy(update={"created": whole.created + timedelta(days=1)})
    if name == "compare":
        text = compare_html.render(compare_all([Side(whole, "baseline"), Side(whole, "candidate")]))
    else:
        text = history_view.render(tracks([Side(whole, "candidate"), Side(later, "candidate")]), [])
    (tmp_path / "page.html").write_text(text)
    for width in WIDTHS:
        with browser.tab(width, 844, phone=width < 600) as tab:
            tab.open(tmp_path / "page.html")
            for dark in (False, True):
                tab.dark(dark)
                assert tab.problems == [] and tab.accessibility_violations() == []
                assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_first_screen_answers_the_question(tab: Tab, page: Path) -> None:
    report = read(page.parent)
    seen = tab.evaluate(
        "[...document.querySelectorAll('.judged .part, .cards .card')].map("
        "e => [e.innerText.replace(/\\s+/g, ' '), e.getBoundingClientRect().bottom])"
    )
    assert len(seen) == 3 + 4
    assert all(bottom <= 844 for _, bottom in seen)
    accuracy, speed, memory, *cards = [str(text) for text, _ in seen]
    assert " ".join(report.verdict.sentence.split()) in accuracy
    assert report.verdict.speed and " ".join(report.verdict.speed.split()) in speed
    assert "Memory The same" in memory
    assert report.accuracy
    assert f"{words.points(report.accuracy.overall.difference.value)} pt" in cards[0]
    tpot = report.ratio("tpot", "1 in flight")
    assert tpot and cards[1].startswith(f"Time per token {words.ratio(tpot.ratio)}")
    assert [card.split(" ×")[0] for card in cards[2:]] == ["Output tokens/s", "Size on disk"]


def test_every_load_stands_there_with_the_reports_figures(tab: Tab, page: Path) -> None:
    report = read(page.parent)
    body = rows(tab, "#loads")
    assert len(body) == len(report.speed) == 12
    for cells, point in zip(body, report.speed, strict=True):
        kept = " rate kept" if point.kept and point.load.kind == "open" else ""
        marks = f" ⚠ {words.marks(point)}" if words.marks(point) else ""
        assert cells[0] == f"{point.load.name} {report.systems[point.role].label}{kept}{marks}"
        names: list[SpeedFigure] = ["ttft", "tpot", "itl", "e2e"]
        for cell, name in zip(cells[1:5], names, strict=True):
            latency, middle = getattr(point, f"{name}_ms"), point.figure(name)
            assert latency and middle is not None
            # Of fewer requests than it takes, a percentile is left out.
            shares = {90: latency.p90, 95: latency.p95, 99: latency.p99}
            shown = [words.number(value) for share, value in shares.items() if latency.n * (100 - share) >= 100]
            assert cell == f"{words.number(middle)} {' · '.join(shown)}".rstrip()
        rates = [point.throughput(name) for name in ("output_tokens_per_s", "requests_per_s")]
        assert cells[5:] == [*(words.number(rate or 0.0) for rate in rates), str(point.completed)]


def test_ratios_counters_and_fidelity_are_the_reports(tab: Tab, page: Path) -> None:
    report = read(page.parent)
    body = rows(tab, "[aria-labelledby=ratios] table")
    assert [cells[0] for cells in body] == [load.name for load in report.loads if load.kind != "rate"]
    for cells in body:
        ratio = report.ratio("tpot", cells[0])
        assert ratio and cells[2] == f"{words.ratio(ratio.ratio)} {words.ratio_interval(ratio.low, ratio.high)}"
    body = rows(tab, "[aria-labelledby=counted] table")
    for cells, point in zip(body, report.speed, strict=True):
        assert point.goodput and point.server and point.energy_j_per_token
        assert cells[1:] == [
            f"{words.number(point.goodput.per_s)} ({words.percent(point.goodput.share)})",
            words.percent(point.server.prefix_cache_share),
            words.percent(point.server.image_cache_share),
            words.count(point.server.preemptions),
            words.milliseconds(point.server.queue_mean_ms),
            f"{words.number(point.energy_j_per_token)} J",
        ]
    assert report.fidelity
    assert rows(tab, "[aria-labelledby=fidelity] table") == [
        [name, *(" ".join(value.split()) for value in values)] for name, values in words.drift_rows(report.fidelity)
    ]


def test_sections_stand_in_the_order_of_their_questions(tab: Tab) -> None:
    assert tab.evaluate("[...document.querySelectorAll('h2')].map(e => e.id)") == [
        *("speed", "accuracy", "fidelity", "flips", "size", "environment", "how", "formulas")
    ]


def test_flips_are_filtered_by_keyboard(tab: Tab) -> None:
    shown = "[...document.querySelectorAll('.flips article')].filter(e => e.offsetParent).length"
    assert tab.evaluate(shown) == 5
    tab.page.locator("#show-all").focus()
    tab.page.keyboard.press("ArrowRight")
    assert tab.evaluate(shown) == 3
    tab.page.keyboard.press("ArrowRight")
    assert tab.evaluate(shown) == 2


def test_printed_it_shows_all_answers_on_white(browser: Browser, page: Path) -> None:
    with browser.tab(1280, 844, dark=True) as tab:
        tab.open(page)
        tab.page.emulate_media(media="print", color_scheme="light")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgba(0, 0, 0, 0)"
        assert tab.evaluate(
            "[...document.querySelectorAll('.scroll')].every(e => getComputedStyle(e).overflowX === 'visible')"
        )
        pdf = tab.page.pdf(format="A4")
        assert pdf.startswith(b"%PDF") and len(pdf) > 20_000


def test_the_pages_figures_are_in_report_json_too(page: Path) -> None:
    data = json.loads((page.parent / "report.json").read_text())
    assert data["schema_version"] == 5 and len(data["speed"]) == 12
