"""Whose certificate is trusted: that of a server which `qvl serve` has started here, whatever name it is made for."""

from __future__ import annotations

import ssl
from urllib.parse import urlsplit

import httpx

from serve.process import state
from serve.settings.tls import pinned, unverified

__all__ = ["context_for", "quick_client"]

_LOCAL = ("127.0.0.1", "localhost", "::1")


def context_for(url: str) -> ssl.SSLContext | None:
    """Return what to check the certificate of a server with that runs here under this URL; None for any other.

    Raises ServerError where its certificate can't be read any more.
    """
    parts = urlsplit(url)
    if parts.scheme != "https" or parts.port is None:
        return None
    known = state.load(parts.port)
    if known is None or not known.alive or known.certificate is None:
        return None
    own = urlsplit(known.url).hostname
    return pinned(known.certificate) if parts.hostname in (*_LOCAL, own) else None


def quick_client(url: str, timeout: float) -> httpx.Client:
    """Return a client for asking a server of this machine whether it is ready: nothing secret is said on either side,
    and a server whose certificate has expired is ready all the same.

    Args:
        url: the server's root.
        timeout: seconds.
    """
    verify = unverified() if url.startswith("https:") else True
    return httpx.Client(base_url=url, timeout=timeout, trust_env=False, verify=verify)
