from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import report as reports
from bench.load.client import Failure
from bench.questions.tasks import Question
from bench.report import words
from bench.report.render import html_file, json_file, markdown, terminal
from bench.report.render.json_file import read
from bench.report.render.plots import speed_curve, speed_curves
from bench.report.schema import SCHEMA_VERSION, Distribution, Load, Memory, Report
from bench.report.view.whole import view
from bench.roles import Role
from tests.support.factory import CONFIG, about_images, first_version, questions, report, second_version, system
from tests.support.paths import OLD_REPORTS, RESULTS
from toolkit.errors import BenchError


@pytest.fixture(scope="module")
def page() -> str:
    return html_file.render(report({"candidate": {"red-1"}}, speed={"candidate": 0.8}))


def test_json_survives_a_round_trip(tmp_path: Path) -> None:
    found = report({"candidate": {"red-1"}})
    (tmp_path / "report.json").write_text(json_file.render(found))
    assert json_file.read(tmp_path) == json_file.read(tmp_path / "report.json") == found


def test_the_schema_has_a_version() -> None:
    assert json.loads(json_file.render(report()))["schema_version"] == SCHEMA_VERSION == 5


def test_the_printed_schema_describes_what_is_written() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(json.loads(json_file.schema()))
    asked = about_images(4, each=2)
    for found in (
        report({"candidate": {"scans-1"}}, asked=asked),
        report(failure=Failure("http", "no")),
        report(asked=[]),
    ):
        data = json.loads(json_file.render(found))
        assert list(check.iter_errors(data)) == []
    data["accuracy"] = {"overall": "fine"}
    assert list(check.iter_errors(data))


REPORTS = [file for file in sorted(RESULTS.glob("**/report.json")) if "schema_version" in file.read_text()]


def without_what_is_known_since_version_5(made: dict[str, Any]) -> None:
    """Take it out of what an older report is written as, having seen that it says nothing."""
    for point in made["speed"]:
        assert (point.pop("settled_s"), point.pop("image_tokens"), point["load"].pop("speed")) == (None, None, None)
        for key in ("accepted_share", "tokens_per_step") if point["server"] else ():
            assert point["server"].pop(key) is None
    for system_ in made["systems"].values():
        assert system_.pop("model_type") is None
    for half in (made["fidelity"] or {}).values():
        if isinstance(half, dict) and "geometric_kl" in half:
            assert (half.pop("geometric_kl"), half.pop("trimmed_kl")) == (None, None)
    fresh = {
        "burstiness": 1.0,
        "traffic": None,
        "traffic_sha256": "",
        "replays": [],
        "turns": 1,
        "shared_prefix": 0,
    }
    assert {key: made["workload"].pop(key) for key in fresh} == fresh


@pytest.mark.parametrize("file", REPORTS, ids=lambda file: file.parent.name)
def test_the_committed_reports_can_be_read(file: Path) -> None:
    data = json.loads(file.read_text())
    found = json_file.read(file)
    assert (json_file.UPGRADED in found.warnings) == (data["schema_version"] == 1)
    if data["schema_version"] >= 3:
        now = json.loads(file.read_text().replace('"pictures": [', '"images": ['))  # its name before version 4
        made = json.loads(json_file.render(found))
        if data["schema_version"] < 5:
            without_what_is_known_since_version_5(made)
        if data["schema_version"] == 3:  # what is known of points and ratios since then
            for point in made["speed"]:
                assert not point["by_shape"]
                for key in ("achieved_per_s", "kept", "retries", "tokens_per_chunk", "by_shape"):
                    del point[key]
            kept = [(r["metric"], r["load"]) for r in made["speed_ratios"]]
            now["speed_ratios"] = [r for r in now["speed_ratios"] if (r["metric"], r["load"]) in kept]
            for ratio in made["speed_ratios"]:
                assert ratio["p_value"] is not None
                for key in ("shape", "p_value", "headline", "p_adjusted"):
                    del ratio[key]
            now["verdict"]["speed"] = made["verdict"]["speed"]
            for system_ in made["systems"].values():
                del system_["kernel"]
            assert made["workload"].pop("scoring") == "paper" and made["workload"].pop("price") is None
        assert made == now | {"schema_version": SCHEMA_VERSION}


def test_a_report_of_the_first_version_is_judged_anew(tmp_path: Path) -> None:
    new = report({"candidate": {f"red-{i}" for i in range(10)}})
    old = first_version(new)
    old["accuracy"]["items"][30]["candidate"]["score"] = 0.0  # the rules of that day, not today's
    old["verdict"]["accuracy"] = "no worse"
    (tmp_path / "report.json").write_text(json.dumps(old))
    found = json_file.read(tmp_path)
    assert found.accuracy is not None and new.accuracy is not None
    assert found.accuracy.model_dump() == new.accuracy.model_dump()
    assert found.verdict.model_copy(update={"speed": new.verdict.speed}) == new.verdict
    assert found.verdict.speed and "Time per token" in found.verdict.speed
    assert found.warnings == [*new.warnings, json_file.UPGRADED]


def test_a_report_of_the_second_version_has_its_loads(tmp_path: Path) -> None:
    new = report({"candidate": {"red-1"}}, speed={"candidate": 0.8})
    (tmp_path / "report.json").write_text(json.dumps(second_version(new)))
    found = json_file.read(tmp_path)
    assert [(point.role, point.concurrency, point.rounds) for point in found.speed] == [
        (point.role, point.concurrency, 2) for point in new.speed
    ]
    for old, now in zip(found.speed, new.speed, strict=True):
        assert old.ttft_ms and now.ttft_ms and old.load == now.load
        assert (old.ttft_ms.p50, old.ttft_ms.p95) == (now.ttft_ms.p50, None)
        assert (old.completed, old.requests_per_s) == (now.completed, now.requests_per_s)
    ratio = found.ratio("ttft", "4 in flight")
    assert ratio and ratio.ratio == pytest.approx(0.8) and ratio.rounds == []
    assert found.workload.output_tokens == "5" and found.workload.prompt_tokens is None
    assert found.verdict.model_copy(update={"speed": new.verdict.speed}) == new.verdict
    assert found.verdict.speed and "Time per token" in found.verdict.speed
    assert (found.accuracy, found.warnings) == (new.accuracy, new.warnings)
    parsed(html_file.render(found))
    markdown.render(found)


@pytest.mark.parametrize("damage", [{"accuracy": 7}, {"accuracy": {"items": [{"id": "x"}]}}, {"verdict": None}])
def test_a_damaged_report_of_the_first_version_is_said(tmp_path: Path, damage: dict[str, Any]) -> None:
    (tmp_path / "report.json").write_text(json.dumps(first_version(report()) | damage))
    with pytest.raises(BenchError, match="not a valid report of schema version 1"):
        json_file.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no report there"),
        ("{", "can't be read as JSON"),
        ("[]", "no schema_version"),
        ("{}", "no schema_version"),
        ('{"schema_version": 99}', "schema version 99, this qvl reads 1 to 5"),
        ('{"schema_version": 1}', "not a valid report"),
        ('{"schema_version": 2}', "not a valid report"),
        ('{"schema_version": 3}', "not a valid report"),
        ('{"schema_version": 4}', "not a valid report"),
    ],
)
def test_what_is_no_report_is_said(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(BenchError, match=words):
        json_file.read(tmp_path)


def test_unknown_keys_are_refused() -> None:
    data = json.loads(json_file.render(report())) | {"extra": 1}
    with pytest.raises(ValueError, match="extra"):
        Report.model_validate(data)


def test_three_files_are_written(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "r"
    reports.write(report(), out)
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "report.md"]
    assert list(out.parent.iterdir()) == [out]


def test_an_existing_report_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "r"
    reports.write(report(), out)
    with pytest.raises(BenchError, match="--force"):
        reports.check_target(out, force=False)
    reports.write(report(per_task=3), out, force=True)
    assert json_file.read(out).workload.questions == 6
    assert list(tmp_path.iterdir()) == [out]


def test_force_replaces_nothing_but_reports(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(BenchError, match="not replaced even with --force"):
        reports.check_target(tmp_path, force=True)
    file = tmp_path / "precious"
    with pytest.raises(BenchError, match="not replaced"):
        reports.check_target(file, force=True)


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BenchError, match="No space left"):
        reports.write(report(), tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


class Page(HTMLParser):
    """Collects what a page loads, its ids and its text, and checks that tags close."""

    VOID = ("meta", "link", "br", "hr", "img", "input", "path", "use", "rect", "line", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action") and value and not value.startswith(("#", "data:")):
                self.loads.append(value)
            if name == "id" and value:
                self.ids.append(value)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(text: str) -> Page:
    found = Page()
    found.feed(text)
    assert found.stack == []
    return found


def test_the_page_needs_nothing_else(page: str) -> None:
    found = parsed(page)
    assert found.loads == []
    assert "<script" not in page and "@import" not in page
    assert not re.search(r"url\((?!#|data:)", page)


def test_ids_are_unique(page: str) -> None:
    ids = parsed(page).ids
    assert len(ids) == len(set(ids))


def test_plots_take_the_pages_colours(page: str) -> None:
    assert page.count('<svg role="img"') == 8  # accuracy, difference, two curves, four distributions
    assert "var(--candidate)" in page
    assert "#0a0b0" not in page


def test_a_wide_range_is_drawn_logarithmically_and_rates_apart() -> None:
    """Reports of a card, with 1 to 128 in flight and rates between; and the same with neighbouring loads only."""
    found = read(OLD_REPORTS / "card-with-rates")
    ttft, tpot = speed_curves(found)
    assert ttft[1].endswith("; logarithmic: throughput and latency") and tpot[1].endswith("; logarithmic: throughput")
    assert {"24/s", "128"} <= set(re.findall(r">([\d/s]+)</text>", ttft[2]))
    near = [point for point in found.speed if point.load.name in ("8 in flight", "32 in flight")]
    (_, reading, _), _ = speed_curves(found.model_copy(update={"speed": near}))
    assert "logarithmic" not in reading and "hollow" not in reading and ", hollow: a rate" in ttft[1]
    dashed = re.findall(r'd="(M [^"]*)"[^>]*stroke-dasharray[^>]*var\(--baseline\)', tpot[2])
    assert sorted(line.count("L") for line in dashed) == [1, 3]  # two rates, four numbers in flight


def test_the_pages_figures_are_the_reports(page: str) -> None:
    text = " ".join(" ".join(parsed(page).text).split())
    for figure in ("97.5%", "100.0%", "−2.5", "×0.80", "lost", "red-1"):
        assert figure in text


def flipping() -> tuple[Report, set[str], set[str]]:
    """A report with many flips over two tasks, and the ids that were lost and won."""
    asked = about_images(40, each=2) + about_images(30, each=2, task="signs")
    lost = {f"scans-{i}" for i in range(0, 70, 2)} | {"signs-1"}
    won = {f"scans-{i}" for i in range(1, 30, 2)}
    return report({"candidate": lost, "baseline": won}, asked=asked), lost, won


def test_the_page_shows_every_flip_with_its_image() -> None:
    found, lost, won = flipping()
    page = html_file.render(found)
    shown = re.findall(
        r'<article class="card flip (lost|won) .*?<img src="(.*?)" alt="Image 1 of (.*?)"', page, re.DOTALL
    )
    assert {name for kind, _, name in shown if kind == "lost"} == lost
    assert {name for kind, _, name in shown if kind == "won"} == won
    assert len(shown) == page.count("<article") == len(lost) + len(won)
    assert found.accuracy is not None
    images = {item.id: found.accuracy.thumbnails[item.images[0]] for item in found.accuracy.flipped}
    assert {name: url for _, url, name in shown} == images
    text = " ".join(" ".join(parsed(page).text).split())
    assert "scans 35 lost, 15 won" in text and "signs 1 lost, 0 won" in text
    assert "All 51" in text and "Lost 36" in text and "Won 15" in text


def test_flips_can_be_told_apart_without_colour_and_filtered_without_a_script() -> None:
    page = html_file.render(flipping()[0])
    for article in re.findall(r"<article.*?</article>", page, re.DOTALL):
        word = "Lost" if "flip lost" in article else "Won"
        assert f"</span> {word}</b>" in article and "· right" in article and "· wrong" in article
    assert "<script" not in page
    for control in ("show-all", "show-lost", "show-won"):
        assert f'type="radio" name="flips" id="{control}"' in page and f'<label for="{control}">' in page


def test_a_flip_says_what_there_is_to_know() -> None:
    asked = [
        Question("c", "quiz", "Which?\nA. x\nB. yes", ("B",), "choice", choices=("x", "yes")),
        Question("v", "people", "What?", ("yes",) * 7 + ("yeah",) * 3, "vqa"),
    ]
    page = html_file.render(report({"candidate": {"c", "v"}}, asked=asked))
    assert "wrong; names none of the options" in page
    assert "yes (×7), yeah (×3)" in page
    assert "wrong; names none of the options" not in markdown.render(report(asked=asked))
    assert "no [names none of the options]" in markdown.render(report({"candidate": {"c"}}, asked=asked))


def test_every_figure_of_the_accuracy_table_is_the_reports(page: str) -> None:
    found = report({"candidate": {"red-1"}}, speed={"candidate": 0.8})
    assert found.accuracy is not None
    table = next(t for t in re.findall(r"<table.*?</table>", page, re.DOTALL) if "Verdict" in t)
    body = re.findall(r"<tr.*?</tr>", table, re.DOTALL)[1:]
    rows = [*found.accuracy.tasks, found.accuracy.overall]
    assert len(body) == len(rows)
    for text, row in zip(body, rows, strict=True):
        cells = [
            " ".join(re.sub(r"<[^>]+>", " ", cell).split())
            for cell in re.findall(r"<t[dh].*?</t[dh]>", text, re.DOTALL)
        ]
        d = row.difference
        assert row.items_needed and row.recovery
        assert cells == [
            row.task if row.task == "all" else f"{row.task} {row.metric}",
            f"? {row.verdict} needs {words.questions(row.items_needed)}".replace("'", "&#39;"),
            f"{row.n}",
            f"{words.percent(row.baseline.value)} {words.interval(row.baseline)}",
            f"{words.percent(row.candidate.value)} {words.interval(row.candidate)}",
            " ".join(f"{words.points(d.value)} {words.interval(d)}".split()),
            f"{words.percent(row.recovery.value)} {words.interval(row.recovery)}",
            f"{d.lost} · {d.won}",
            words.p_value(row.p_adjusted),
        ]


def test_each_verdict_stands_in_all_formats() -> None:
    wrong: dict[Role, set[str]] = {"candidate": {f"red-{i}" for i in range(12)}}
    asked = [*questions(30, tasks=["red"]), *questions(500, tasks=["blue"]), *questions(20, tasks=["green"])]
    found = report(wrong, asked=asked)
    assert found.accuracy is not None
    verdicts = {row.task: row.verdict for row in found.accuracy.tasks}
    assert verdicts == {"red": "worse", "blue": "no worse", "green": "can't tell"}
    console = Console(record=True, width=120)
    terminal.show(found, console)
    lines = console.export_text().splitlines()
    page, text = html_file.render(found).replace("&#39;", "'"), markdown.render(found)
    for task, word in verdicts.items():
        assert any(line.startswith(task) and line.rstrip().endswith(f" {word}") for line in lines)
        assert re.search(rf'<th scope="row">{task}<.*?</span> <b>{word}</b>', page, re.DOTALL)
        assert re.search(rf"^\| {task} \| {word}(?: \(needs [\d,]+\))? \|", text, re.MULTILINE)


def test_accuracy_speed_and_memory_are_judged_each_by_itself() -> None:
    """A candidate that is slower and no worse was green all over."""
    found = report(per_task=400, speed={"candidate": 1.5})
    judged = {part.what: (part.tone, part.word) for part in view(found).judged}
    assert judged == {"Accuracy": ("good", "no worse"), "Speed": ("bad", "slower"), "Memory": ("open", "the same")}
    light = report(per_task=400, speed={"candidate": 0.5}, candidate=system("candidate", memory=Memory(host_bytes=900)))
    assert [part.word for part in view(light).judged] == ["no worse", "faster", "less"]
    assert "0.18" in view(light).judged[2].sentence
    for text in (html_file.render(found), markdown.render(found)):
        assert "lower" in text and "Memory" in text
    shown = Console(record=True, width=160)
    terminal.show(found, shown)
    printed = shown.export_text()
    assert "Speed: slower." in printed and "Accuracy: no worse." in printed
    assert terminal.RATIOS in printed and "×1.50 (1.50–1.50)" in printed


def test_cards_say_what_is_beyond_chance() -> None:
    said = {card.name: card.said for card in view(report(speed={"candidate": 1.5})).cards}
    assert (said["Time per token"], said["Output tokens/s"]) == ("worse", "worse")
    same = {card.name: card.said for card in view(report()).cards}
    assert same["Time per token"] == "not told apart" and same["Accuracy"] == "can't tell"


def test_titles_name_formats_and_kernels() -> None:
    both: dict[str, Any] = {
        "baseline": system("baseline", label="7B", quantization="bfloat16"),
        "candidate": system("candidate", label="7B-int4", quantization="awq 4 bits, group 128, gemm", kernel="Marlin"),
    }
    assert view(report(**both)).title == "7B-int4 (AWQ 4 bits, group 128, Marlin) against 7B (bf16)"
    named = system("baseline", label="7b-bf16", quantization="bfloat16")
    assert view(report(baseline=named)).title.endswith("against 7b-bf16")


def test_a_task_that_is_worse_is_said_first() -> None:
    asked = [*questions(20, tasks=["red"]), *questions(600, tasks=["blue"])]
    page = html_file.render(report({"candidate": {f"red-{i}" for i in range(10)}}, asked=asked, margin=5.0))
    assert "<strong>No worse over all, worse in red</strong>" in page


def test_markdown_lists_the_flips() -> None:
    found, lost, won = flipping()
    text = markdown.render(found)
    assert set(re.findall(r"^\| (?:lost|won) \| ([\w-]+) \|", text, re.MULTILINE)) == lost | won
    asked = questions(80)
    text = markdown.render(report({"candidate": {q.id for q in asked[:100]}}, asked=asked))
    assert text.count("| lost |") == markdown.FLIPS_SHOWN
    assert f"{100 - markdown.FLIPS_SHOWN} more, and the images, are in report.html" in text


def test_what_is_printed_is_escaped() -> None:
    asked = [Question("<b>id", "<i>task", "<script>alert(1)</script>", ("yes",))]
    found = report({"candidate": {"<b>id"}}, asked=asked)
    page = html_file.render(found)
    assert "<script" not in page and "<i>task" not in page
    parsed(page)
    assert "<script" not in markdown.render(found)


@pytest.mark.parametrize(
    "found",
    [
        report(failure=Failure("http", "HTTP 500: <no>")),
        report(asked=[]),
        report(counted=False),
        report(per_task=1),
    ],
    ids=["failed", "speed only", "no counts", "one question"],
)
def test_every_kind_of_report_renders(found: Report) -> None:
    parsed(html_file.render(found))
    assert found.verdict.sentence in markdown.render(found)
    console = Console(record=True, width=100)
    terminal.show(found, console)


def test_a_failed_report_says_so_first() -> None:
    page = html_file.render(report(failure=Failure("http", "HTTP 500: gone")))
    assert page.index("Run failed") < page.index("<h2")
    assert 'class="cards"' not in page


def test_markdown_tables_have_equal_columns() -> None:
    text = markdown.render(report({"candidate": {"red-1"}}))
    for table in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.strip().split("\n")}) == 1
    assert "(E2E - TTFT) / (n_out - n_1)" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.6, "1,235"),
        (123.45, "123"),
        (12.345, "12.3"),
        (1.2345, "1.23"),
        (0.12345, "0.123"),
        (-3.0, "−3.00"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert words.number(value) == text


def test_small_words() -> None:
    assert words.points(-0.0001) == "0.0"
    assert words.points(-0.021) == "−2.1"
    assert words.p_value(0.0001) == "< 0.001"
    assert words.gib(3 * 2**30) == "3.00 GiB"
    assert words.gib(None) == "–"
    assert words.change(100, 88) == "−12%"
    assert words.change(0, 1) == "–"


@pytest.mark.parametrize("apart", [0.0, 0.01, 0.3])
def test_labels_of_a_plot_do_not_lie_on_each_other_nor_on_a_marker(apart: float) -> None:
    """Loads whose points lie next to each other, of both systems, as of equal servers."""
    loads = [*map(Load.in_flight, (1, 2, 4, 8, 16)), *(Load.at_rate(rate, "poisson") for rate in (100, 250, 1000))]
    loads.append(Load.replayed(1.0))
    base = report(settings=CONFIG.replaced(concurrencies=(1,))).speed[0]
    points = []
    for number, load in enumerate(loads):
        for role, scale in (("baseline", 1.0), ("candidate", 1.0 + apart / 2)):
            rate, late = 100.0 * scale * (1 + apart * number), 50.0 * scale * (1 + apart * number)
            ttft = Distribution(p50=late, p90=1.2 * late, p95=1.3 * late, p99=1.4 * late, mean=late, n=9)
            change = {"role": role, "load": load, "ttft_ms": ttft, "by_round": {}, "requests_per_s": rate}
            points.append(base.model_copy(update=change | {"output_tokens_per_s": rate}))
    drawn = speed_curve(report().model_copy(update={"speed": points}), "TTFT, ms", lambda point: point.ttft_ms)
    assert drawn is not None
    figure, axes = drawn[0], drawn[0].axes[0]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) >= (6 if apart == 0.0 else 12)
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    spots = [axes.transData.transform((point.output_tokens_per_s, point.ttft_ms.p50)) for point in points]
    assert not any(box.contains(*spot) for box in boxes for spot in spots)
