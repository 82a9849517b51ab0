"""Whom a request without a key was meant for: the names in its headers Host and Origin.

A page of any site can have its name resolve to 127.0.0.1 and then talk to a server there as to itself (DNS rebinding).
Its browser still says that name. An address as Host can't be had that way, so probes by pod address and published ports
pass; a name passes that is this machine's own, or one that the operator gave.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

from starlette.types import Scope

from serve.http.errors import Refusal

__all__ = ["Hosts"]


class Hosts:
    """The names that a server without keys goes by.

    Args:
        names: given by the operator.
        origins: of other pages that may call it.
    """

    def __init__(self, names: Iterable[str], origins: Iterable[str]) -> None:
        self._names = {"localhost", socket.gethostname().lower(), *(name.lower().rstrip(".") for name in names)}
        self._origins = {origin.lower() for origin in origins}

    def check(self, scope: Scope) -> None:
        """Refuse a request whose Host is no name of this server's, or whose Origin is another page's."""
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        if len(hosts) > 1 or len(origins) > 1:
            raise Refusal(400, "header", "Host and Origin may come once.")
        host = hosts[0].decode("latin-1").strip().lower() if hosts else ""
        if host and not self._known(host):
            raise Refusal(
                403,
                "host",
                "This server has no keys and does not go by that name. Call it by an address or as localhost; its "
                "operator can give the name: qvl serve --allow-host NAME.",
            )
        origin = origins[0].decode("latin-1").strip().lower() if origins else ""
        if origin and origin not in self._origins and not (host and _authority(origin) == _authority(f"//{host}")):
            raise Refusal(
                403,
                "host",
                "This server has no keys and takes no requests from pages of other origins. Its operator can allow "
                "one: qvl serve --cors-origin ORIGIN.",
            )

    def _known(self, host: str) -> bool:
        name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        name = name.rstrip(".")
        if name in self._names or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            return False
        return True


def _authority(origin: str) -> str:
    """Return host and port of an origin, without a port that its scheme has anyway."""
    scheme, _, authority = origin.partition("//")
    default = {"http:": ":80", "https:": ":443"}.get(scheme, "")
    return authority.removesuffix(default) if default else authority
