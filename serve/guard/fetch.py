"""Images by URL, fetched by the guard itself, so that the engine behind it fetches nothing.

A name is resolved here once, every address it has must be public, and the connection goes to that very address: a
name that resolves to something else a moment later (DNS rebinding) gains nothing. Redirects are followed by hand, each
checked as the first URL was. Refusals never say what was found at an address, so they can't be used to map a network.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import urljoin

import httpx

from serve.http.errors import Refusal

__all__ = ["Fetcher", "is_public"]

_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
#: Ranges that carry an IPv4 address inside an IPv6 one: NAT64 (RFC 6052, 8215), 6to4 (RFC 3056), Teredo (RFC 4380).
_TUNNELS = tuple(
    ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")
)

#: Returns a name's addresses.
Resolve = Callable[[str, int], Awaitable[list[str]]]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet: none that is private, loopback, link-local, shared (CGNAT),
    multicast or reserved, nor an IPv6 form that carries an IPv4 address.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None or any(ip in net for net in _TUNNELS):
            return False
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host, as the system's resolver has them. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Fetcher:
    """Fetches images from an allow-list of hosts."""

    def __init__(
        self,
        hosts: Iterable[str],
        max_bytes: int,
        seconds: float,
        *,
        resolve: Resolve = resolve,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Set up; `resolve` and `transport` replace the network in tests."""
        self._hosts = frozenset(host.lower().rstrip(".") for host in hosts)
        self._max_bytes, self._seconds = max_bytes, seconds
        self._resolve, self._transport = resolve, transport

    async def fetch(self, url: str) -> bytes:
        """Return what is behind a URL. Raises Refusal (image_url, image_bytes)."""
        if not self._hosts:
            raise _refusal("Images by URL are not taken here. Send a data URL: data:image/png;base64,...")
        try:
            async with asyncio.timeout(self._seconds):
                return await self._follow(url)
        except (TimeoutError, httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError, ValueError):
            raise _refusal("An image's URL can't be fetched.") from None

    async def _follow(self, url: str) -> bytes:
        for _ in range(1 + _REDIRECTS):
            target, host = self._allowed(url)
            address = await self._address(host, target.port or _PORTS[target.scheme])
            # A client of its own: no cookie, connection or proxy is shared with any other image.
            async with httpx.AsyncClient(
                transport=self._transport, trust_env=False, timeout=self._seconds, follow_redirects=False
            ) as client:
                request = client.build_request(
                    "GET",
                    target.copy_with(host=address, fragment=None),
                    headers={"Host": target.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"},
                    extensions={"sni_hostname": host},  # the certificate is checked against the name
                )
                response = await client.send(request, stream=True)
                try:
                    if response.is_redirect and (location := response.headers.get("location")):
                        url = urljoin(url, location)
                        continue
                    if response.status_code != httpx.codes.OK:
                        raise _refusal("An image's URL can't be fetched.")
                    return await self._read(response)
                finally:
                    await response.aclose()
        raise _refusal("An image's URL is redirected too often.")

    def _allowed(self, url: str) -> tuple[httpx.URL, str]:
        """Return the URL and its host's name, or refuse it."""
        target = httpx.URL(url)
        host = target.raw_host.decode("ascii").lower().rstrip(".")
        if target.scheme not in _PORTS or target.userinfo or not host:
            raise _refusal("An image's URL must be https://, http:// or a data URL.")
        named = host in self._hosts and target.port in (None, _PORTS[target.scheme])
        if not named and f"{host}:{target.port or _PORTS[target.scheme]}" not in self._hosts:
            raise _refusal("Images are not fetched from that host. Send a data URL: data:image/png;base64,...")
        return target, host

    async def _address(self, host: str, port: int) -> str:
        addresses = await self._resolve(host, port)
        if not addresses or not all(map(is_public, addresses)):
            raise _refusal("An image's URL can't be fetched.")
        return addresses[0]

    async def _read(self, response: httpx.Response) -> bytes:
        pieces, size = [], 0
        async for piece in response.aiter_raw():
            size += len(piece)
            if size > self._max_bytes:
                raise Refusal(
                    413, "image_bytes", f"An image has more than {self._max_bytes} bytes. Send a smaller one.",
                    "messages",
                )  # fmt: skip
            pieces.append(piece)
        return b"".join(pieces)


def _refusal(message: str) -> Refusal:
    return Refusal(400, "image_url", message, "messages")
