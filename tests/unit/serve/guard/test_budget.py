"""What all requests share: pixels and turns of grammars, without a server and without time."""

from __future__ import annotations

import asyncio

import pytest

from serve.guard.budget import Grammars, Pixels, pixels_for
from serve.guard.upload import ClientGone
from serve.http.errors import Refusal


async def stays() -> None:
    await asyncio.sleep(60)


async def settled(grammars: Grammars, name: str, waiting: int) -> None:
    """Wait until so many requests of a client wait for their turn."""
    while (grammars._turns[name].waiting if name in grammars._turns else 0) != waiting:
        await asyncio.sleep(0)


def test_pixels_are_counted_in_and_out_once() -> None:
    pixels = Pixels(100)
    first, second = pixels.enter(60), pixels.enter(40)
    with pytest.raises(Refusal) as caught:
        pixels.enter(1)
    assert (caught.value.status, caught.value.reason) == (429, "image_memory")
    assert dict(caught.value.headers)[b"retry-after"] == b"1"
    first()
    first()
    assert pixels.held == 40
    pixels.enter(60)
    second()
    assert pixels.held == 60


def test_a_request_alone_is_let_in_whatever_its_size() -> None:
    pixels = Pixels(10)
    leave = pixels.enter(48_000_000)
    with pytest.raises(Refusal):
        pixels.enter(1)
    pixels.enter(0)  # no images
    leave()
    pixels.enter(48_000_000)


def test_pixels_follow_from_the_memory_there_is() -> None:
    assert 48_000_000 < pixels_for(4 << 30) < 4 * 48_000_000


def test_one_new_schema_of_a_client_is_compiled_at_a_time() -> None:
    async def run() -> None:
        grammars = Grammars()
        end = await grammars.enter("a", b"1", 100, stays)
        other = await grammars.enter("b", b"2", 100, stays)  # another client's turn is its own
        second = asyncio.ensure_future(grammars.enter("a", b"3", 100, stays))
        await settled(grammars, "a", 1)
        assert not second.done()
        end(True)
        (await second)(True)
        other(True)
        assert not grammars._turns

    asyncio.run(run())


def test_what_is_compiled_or_costs_nothing_needs_no_turn() -> None:
    async def run() -> None:
        grammars = Grammars()
        (await grammars.enter("a", b"1", 100, stays))(True)
        await grammars.enter("a", b"2", 100, stays)  # has the turn
        for schemas, states in ((b"1", 100), (b"", 0), (b"3", 1)):
            (await grammars.enter("a", schemas, states, stays))(True)

    asyncio.run(run())


def test_the_same_schema_waits_for_the_first_and_then_for_nobody() -> None:
    async def run() -> None:
        grammars = Grammars()
        end = await grammars.enter("a", b"1", 100, stays)
        same = [asyncio.ensure_future(grammars.enter("a", b"1", 100, stays)) for _ in range(5)]
        await settled(grammars, "a", 5)
        end(True)
        await asyncio.gather(*same)  # none of them has ended
        assert not grammars._turns

    asyncio.run(run())


def test_whoever_leaves_waits_no_longer_and_a_turn_given_up_lasts_as_its_grammar() -> None:
    async def run() -> None:
        grammars = Grammars()
        end = await grammars.enter("a", b"1", 100, stays)

        async def leaves() -> None:
            return

        with pytest.raises(ClientGone):
            await grammars.enter("a", b"2", 100, leaves)
        waits = asyncio.ensure_future(grammars.enter("a", b"3", 100, stays))
        await settled(grammars, "a", 1)
        end(False)
        end(True)  # counts once
        assert grammars._turns["a"].lock.locked()
        (await waits)(True)
        assert b"1" not in grammars._known

    asyncio.run(run())


def test_cancelled_requests_hold_no_turn() -> None:
    async def run() -> None:
        grammars = Grammars()
        end = await grammars.enter("a", b"1", 100, stays)
        waits = asyncio.ensure_future(grammars.enter("a", b"2", 100, stays))
        await settled(grammars, "a", 1)
        end(True)
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        (await grammars.enter("a", b"3", 100, stays))(True)

    asyncio.run(asyncio.wait_for(run(), 20))


def test_more_than_a_few_do_not_wait() -> None:
    async def run() -> None:
        grammars = Grammars()
        await grammars.enter("a", b"x", 100, stays)
        waiting = [asyncio.ensure_future(grammars.enter("a", b"%d" % i, 100, stays)) for i in range(32)]
        await settled(grammars, "a", 32)
        with pytest.raises(Refusal) as caught:
            await grammars.enter("a", b"y", 100, stays)
        assert (caught.value.status, caught.value.reason) == (429, "concurrency")
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(run())
