"""An httpx transport for the clock's sake: HTTP/1.1 on asyncio's own streams, parsed by h11, nothing in between.

httpx's own transport sends head and body of a request in two writes and takes each chunk through a pool, locks and
timeouts, which at thousands of streamed tokens a second is time that the measured latencies contain. aiohttp was tried
in place of this module, under the same interface. Medians of 6 interleaved runs on 16 idle cores; the loads are those
of ``bench/micro/test_client.py``:

========================================  =======  ===========  =======
one client                                  httpx  this module  aiohttp
========================================  =======  ===========  =======
as fast as it can: CPU time a token       23.0 us      16.0 us  14.7 us
2500 tokens/s: TTFT above the server's    3.51 ms      1.25 ms  1.36 ms
2500 tokens/s: share of a core               0.32         0.18     0.15
5000 tokens/s: TTFT above the server's    96.6 ms      1.41 ms  1.35 ms
5000 tokens/s: share of a core               0.64         0.32     0.27
========================================  =======  ===========  =======

aiohttp takes 8 to 16% less time and is as exact. It is not used because its parser in C (3.14.5) tells nobody of a
chunk that is no HTTP in the middle of an answer: the reader waits until its timeout, and a broken answer would count as
a slow one. ``tests/integration/bench/load/test_wire.py`` has that case; try again with a later one.

This transport has no proxies, no HTTP/2 and no bound on connections: `bench.load.loops` bounds what is in flight.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from typing import Any

import h11
import httpx

__all__ = ["Wire"]

READ_BYTES = 65536
#: Scheme, host, port.
Origin = tuple[str, str, int]


class _Connection:
    """One TCP connection and the state of the exchange on it."""

    def __init__(self, origin: Origin, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.origin, self.reader, self.writer = origin, reader, writer
        self.state = h11.Connection(h11.CLIENT)
        #: Whether an exchange before this one was complete, and whether anything of this one's answer has come.
        self.used = self.answers = False

    @property
    def usable(self) -> bool:
        """Whether the server has not closed it while it was idle."""
        return not (self.writer.is_closing() or self.reader.at_eof() or self.reader.exception())

    @property
    def expired(self) -> bool:
        """Whether it ended as idle connections do: the server closed it while the next request was on its way."""
        return self.used and not self.answers

    def send(self, request: httpx.Request, body: bytes) -> None:
        """Write head and body at once."""
        head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
        data = [self.state.send(event) for event in (head, h11.Data(data=body), h11.EndOfMessage())]
        self.answers = False
        self.writer.write(b"".join(part for part in data if part))

    async def receive(self, timeout_s: float | None) -> Any:
        """Return the next event of the answer."""
        while (event := self.state.next_event()) is h11.NEED_DATA:
            if timeout_s is None:
                data = await self.reader.read(READ_BYTES)
            else:
                async with asyncio.timeout(timeout_s):
                    data = await self.reader.read(READ_BYTES)
            self.answers = self.answers or bool(data)
            self.state.receive_data(data)
        return event


class _Body(httpx.AsyncByteStream):
    """The answer's body as it arrives; closing it gives the connection back, or ends it when more was to come."""

    def __init__(self, wire: Wire, connection: _Connection, timeout_s: float | None) -> None:
        self._wire, self._connection, self._timeout_s = wire, connection, timeout_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while type(event := await self._connection.receive(self._timeout_s)) is h11.Data:
                yield bytes(event.data)
        except (OSError, h11.RemoteProtocolError) as error:
            raise _translated(error) from error

    async def aclose(self) -> None:
        self._wire.release(self._connection)


def _translated(error: Exception) -> httpx.TransportError:
    if isinstance(error, TimeoutError):  # a child of OSError
        return httpx.ReadTimeout(str(error))
    if isinstance(error, OSError):
        return httpx.ReadError(str(error))
    return httpx.RemoteProtocolError(str(error))


class Wire(httpx.AsyncBaseTransport):
    """Give it to `bench.load.endpoint.http_client`; for one event loop.

    Args:
        tls: what checks certificates. None: known authorities, or those that SSL_CERT_FILE names.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._idle: dict[Origin, list[_Connection]] = {}
        self._tls = tls

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request and return the answer's head, with its body to be streamed.

        Raises:
            httpx.TransportError: no connection, a lost one, one that is too slow, or what comes is not HTTP.
        """
        timeouts = request.extensions.get("timeout", {})
        read_s = timeouts.get("read")
        body = await request.aread()
        while True:
            connection = await self._connected(request.url, timeouts.get("connect"))
            try:
                event = await self._exchange(connection, request, body, read_s)
                break
            except (OSError, h11.RemoteProtocolError, httpx.RemoteProtocolError) as error:
                connection.writer.close()
                if connection.expired and not isinstance(error, TimeoutError):
                    continue  # on another connection: the server has not seen the request
                if isinstance(error, httpx.TransportError):
                    raise
                raise _translated(error) from error
            except BaseException:
                connection.writer.close()
                raise
        return httpx.Response(
            event.status_code, headers=event.headers.raw_items(), stream=_Body(self, connection, read_s)
        )

    @staticmethod
    async def _exchange(
        connection: _Connection, request: httpx.Request, body: bytes, read_s: float | None
    ) -> h11.Response:
        """Send a request and return the head of its answer."""
        connection.send(request, body)
        while type(event := await connection.receive(read_s)) is h11.InformationalResponse:
            pass
        if type(event) is not h11.Response:
            raise httpx.RemoteProtocolError("the server closed the connection without an answer")
        return event

    async def _connected(self, url: httpx.URL, timeout_s: float | None) -> _Connection:
        origin = (url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80))
        idle = self._idle.setdefault(origin, [])
        while idle:
            if (connection := idle.pop()).usable:
                return connection
            connection.writer.close()
        if url.scheme == "https" and self._tls is None:
            self._tls = httpx.create_ssl_context()
        try:
            async with asyncio.timeout(timeout_s):
                streams = await asyncio.open_connection(*origin[1:], ssl=self._tls if url.scheme == "https" else None)
        except TimeoutError as error:
            raise httpx.ConnectTimeout(f"no connection within {timeout_s:g} s") from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        return _Connection(origin, *streams)

    def release(self, connection: _Connection) -> None:
        """Keep a connection whose exchange is complete for the next request; close any other."""
        state = connection.state
        if state.our_state is h11.DONE and state.their_state is h11.DONE:
            state.start_next_cycle()
            connection.used = True
            self._idle[connection.origin].append(connection)
        else:
            connection.writer.close()

    async def aclose(self) -> None:
        """Close the idle connections; those in use close when their answers are."""
        for connections in self._idle.values():
            for connection in connections:
                connection.writer.close()
        self._idle.clear()
