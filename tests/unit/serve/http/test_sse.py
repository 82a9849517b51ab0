"""The decoder of server-sent events against a plain reading of the standard."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.http.sse import EventDecoder

#: What str.splitlines and bytes.splitlines take for line ends, and the standard does not.
NO_LINE_ENDS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def decode(stream: bytes, sizes: list[int] | None = None) -> list[bytes]:
    """Feed the stream in pieces of the given sizes, the rest in one."""
    decoder = EventDecoder()
    found = []
    for size in sizes or []:
        found += decoder.feed(stream[:size])
        stream = stream[size:]
    return found + decoder.feed(stream)


def read(stream: bytes) -> list[bytes]:
    """Read a whole stream as the standard says, line by line."""
    lines = re.split(rb"\r\n|\n|\r", stream)[:-1]
    events, data = [], []
    for line in lines:
        field, _, value = line.partition(b":")
        if not line and data:
            events.append(b"\n".join(data))
            data = []
        elif field == b"data":
            data.append(value.removeprefix(b" "))
    return events


def test_crlf_comments_and_data_in_lines() -> None:
    decoder = EventDecoder()
    assert decoder.feed(b": ping\r\n\r\nevent: x\r\ndata: one\r\ndata:two\r\n\r\nda") == [b"one\ntwo"]
    assert decoder.feed(b"ta: 3\n") == []
    assert decoder.feed(b"\n") == [b"3"]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_every_line_end_of_the_standard(end: bytes) -> None:
    stream = end.join([b"data: 1", b"", b"data", b"", b"data:  2", b"data:", b"", b"data: 3"])
    assert decode(stream) == [b"1", b"", b" 2\n"]
    assert decode(stream, [1] * len(stream)) == [b"1", b"", b" 2\n"]


def test_an_event_is_there_with_its_carriage_return() -> None:
    """Nothing waits for a line feed that may never come; one that comes is no empty line."""
    decoder = EventDecoder()
    assert decoder.feed(b"data: 1\r\r") == [b"1"]
    assert decoder.feed(b"data: 2\r") == []
    assert decoder.feed(b"") == []
    assert decoder.feed(b"\n") == []
    assert decoder.feed(b"\r\n") == [b"2"]


@pytest.mark.parametrize("character", NO_LINE_ENDS)
def test_no_other_character_ends_a_line(character: str) -> None:
    data = f'{{"content": "a{character}b"}}'.encode()
    assert decode(b"data: " + data + b"\n\n") == [data]
    assert decode(b"id: 1\ndata: " + data + b"\n\n", [12, 7]) == [data]


PIECES = [
    b"data: ",
    b"data:",
    b"data",
    b"x",
    b": ping",
    b"\n",
    b"\r",
    b"\r\n",
    b"\n\n",
    *(c.encode() for c in "\x85\u2028"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=30), st.lists(st.integers(0, 5), max_size=40))
def test_any_stream_in_any_pieces_is_read_as_the_standard_reads_it(pieces: list[bytes], sizes: list[int]) -> None:
    stream = b"".join(pieces)
    assert decode(stream, sizes) == read(stream)
