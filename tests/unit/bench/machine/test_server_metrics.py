from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import httpx
import pytest

from bench.load.endpoint import http_client
from bench.machine.server_metrics import DEFINITIONS, ServerPoint, Snapshot, parse, read

#: A vLLM 0.32 on a CPU after its first image question, and after three more about one image; histograms cut down.
PAGES = Path(__file__).parent / "pages"
BEFORE = (PAGES / "vllm-0.32-before.txt").read_text()
AFTER = (PAGES / "vllm-0.32-after.txt").read_text()


def point(before: str, after: str) -> ServerPoint | None:
    return ServerPoint.between(parse(before), parse(after))


def test_a_real_page_is_read() -> None:
    assert parse(AFTER) == Snapshot(
        prefix_queries=487,
        prefix_hits=256,
        image_queries=4,
        image_hits=2,
        preemptions=0,
        prompt_tokens=487,
        output_tokens=9,
        finished=4,
        queued=4,
        queue_s=pytest.approx(0.000233, abs=1e-6),
        kv_blocks=257,
        kv_tokens=257 * 128,
    )


def test_a_point_is_the_difference_of_two_pages() -> None:
    assert point(BEFORE, AFTER) == ServerPoint(
        prefix_queries=426,
        prefix_hits=256,
        image_queries=3,
        image_hits=2,
        preemptions=0,
        prompt_tokens=426,
        output_tokens=6,
        finished=3,
        queue_mean_s=pytest.approx((0.000233 - 0.000079) / 3, abs=1e-6),
        kv_blocks=257,
        kv_tokens=32896,
    )


def test_a_drafts_guesses_are_counted() -> None:
    """The names of vLLM's v1/spec_decode/metrics.py; the page of a server without a draft has none of them."""

    def page(drafts: int, guessed: int, accepted: int) -> str:
        counts = {"drafts": drafts, "draft_tokens": guessed, "accepted_tokens": accepted}
        names = {f"vllm:spec_decode_num_{name}": count for name, count in counts.items()}
        lines = [f'# TYPE {name} counter\n{name}_total{{engine="0"}} {count}\n' for name, count in names.items()]
        return "".join(lines)

    found = point(page(10, 30, 12), page(30, 90, 42))
    assert found is not None
    assert (found.drafts, found.guessed, found.accepted) == (20, 60, 30)
    without = point(BEFORE, AFTER)
    assert without is not None and without.drafts is without.guessed is without.accepted is None


def test_nothing_asked_is_no_difference_and_no_queue_time() -> None:
    found = point(AFTER, AFTER)
    assert found is not None
    assert (found.finished, found.prefix_queries, found.image_hits) == (0, 0, 0)
    assert found.queue_mean_s is None


def test_what_the_server_asks_itself_is_not_counted() -> None:
    pages = [f"{page}\nqvl_probe_seconds_count {count}\n" for page, count in ((BEFORE, 1.0), (AFTER, 2.0))]
    found, whole = point(*pages), point(BEFORE, AFTER)
    assert found is not None and whole is not None
    assert found == dataclasses.replace(whole, finished=2, image_queries=2, image_hits=1)


def test_engines_are_summed() -> None:
    lines = [line for line in AFTER.splitlines() if line.startswith("vllm:")]
    lines.append('qvl_probe_seconds_count{engine="0"} 1.0')
    both = parse("\n".join(lines + [line.replace('engine="0"', 'engine="1"') for line in lines]))
    one = parse("\n".join(lines))
    assert both is not None and one is not None
    for field in dataclasses.fields(Snapshot):
        if field.name not in ("drafts", "guessed", "accepted"):  # of which this page has none
            assert getattr(both, field.name) == 2 * getattr(one, field.name), field.name


def test_a_server_that_started_anew_has_no_difference() -> None:
    assert point(AFTER, BEFORE) is None


@pytest.mark.parametrize(
    "metric", ["vllm:mm_cache", "vllm:prefix_cache", "vllm:num_preemptions", "vllm:request_queue_time", "vllm:cache"]
)
def test_a_metric_a_server_lacks_is_none_and_the_others_remain(metric: str) -> None:
    without = ["\n".join(line for line in page.splitlines() if metric not in line) for page in (BEFORE, AFTER)]
    found, whole = point(*without), point(BEFORE, AFTER)
    assert found is not None and whole is not None
    lost = {name for name, value in dataclasses.asdict(found).items() if value is None}
    assert lost and lost < {field.name for field in dataclasses.fields(found)}
    for name, value in dataclasses.asdict(whole).items():
        assert getattr(found, name) == (None if name in lost else value)


def test_the_kv_cache_of_servers_that_tell_only_blocks() -> None:
    found = parse(AFTER.replace('kv_cache_size_tokens="32896",', ""))
    assert found is not None and found.kv_tokens == 257 * 128
    unknown = parse(AFTER.replace('num_gpu_blocks="257"', 'num_gpu_blocks="None"'))
    assert unknown is not None and (unknown.kv_blocks, unknown.kv_tokens) == (None, None)


@pytest.mark.parametrize(
    "page",
    [
        "",
        "<html><body>Not here</body></html>",
        '{"detail": "Not Found"}',
        "sglang:num_running_reqs 3.0\npython_info 1.0\n",
        "vllm:num_preemptions_total",
        "vllm:num_preemptions_total NaN",
        "vllm:num_preemptions_total{ 3.0",
        "\x00\xff",
    ],
)
def test_what_is_no_page_of_a_known_server_is_none(page: str) -> None:
    assert parse(page) is None


def answered(response: httpx.Response | Exception) -> Snapshot | None:
    def handle(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/metrics"
        assert request.headers["authorization"] == "Bearer key"
        if isinstance(response, Exception):
            raise response
        return response

    async def ask() -> Snapshot | None:
        async with http_client("http://127.0.0.1:1", "key", transport=httpx.MockTransport(handle)) as http:
            return await read(http)

    return asyncio.run(ask())


def test_the_page_is_asked_for_with_the_key() -> None:
    assert answered(httpx.Response(200, text=AFTER)) == parse(AFTER)


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(404, text=AFTER),
        httpx.Response(401, json={"error": "Unauthorized"}),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, content=b"\x80\x81"),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
    ],
)
def test_no_page_is_none_and_no_error(response: httpx.Response | Exception) -> None:
    assert answered(response) is None


def test_definitions_name_no_figure_that_is_not_there() -> None:
    assert set(DEFINITIONS) == {"prefix_cache", "image_cache", "preemptions", "queue_time", "drafts", "kv_cache"}
