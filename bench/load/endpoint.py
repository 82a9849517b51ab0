"""Where an OpenAI-compatible server is and what it serves: the only thing the rest of the package knows about a
system."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from bench.load.wire import Wire
from toolkit.errors import BenchError, ServerError

__all__ = ["Endpoint", "discover", "http_client", "normalise_url", "public_url", "tls_fault"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A served model.

    Attributes:
        url: root of the server without ``/v1`` and without a trailing slash, e.g. ``http://127.0.0.1:8000``.
        model: the name requests must carry.
        api_key: sent as a bearer token when given; never printed.
        version: what ``GET /version`` answered (vLLM does), else None.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    version: str | None = None


#: What follows the root in addresses as they are copied from examples.
_ROUTES = ("/chat/completions", "/completions", "/models")


def normalise_url(url: str) -> str:
    """Return the server's root: scheme, host, port and path, without ``/v1``, ``/v1/chat/completions`` at its end.

    Raises:
        BenchError: when it is not an http(s) URL.
    """
    try:
        parts = urlsplit(url.strip())
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise BenchError(f"{url!r} is not an http(s) URL; write it like http://127.0.0.1:8000")
    path = parts.path.rstrip("/")
    for route in _ROUTES:
        path = path.removesuffix(route).rstrip("/")
    path = path.removesuffix("/v1").rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def public_url(url: str) -> str:
    """Return the URL without user name and password, fit to be printed in a report."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def http_client(
    url: str,
    api_key: str | None = None,
    *,
    timeout_s: float = 120.0,
    connections: int = 1,
    transport: httpx.AsyncBaseTransport | None = None,
) -> httpx.AsyncClient:
    """Return a client whose base is ``url``, with one kept-alive connection for each request in flight.

    It speaks through `bench.load.wire` unless ``transport`` is given or the environment names a proxy for the host,
    which
    httpx's own transport then uses. Servers on this machine have none: a proxy would be part of what is measured.

    Args:
        timeout_s: seconds between two pieces of an answer; `bench.load.client.ask` times requests on its own.
        connections: most that are open at once, where httpx's own transport is used.
    """
    proxied = _proxied(url)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.AsyncClient(
        base_url=url,
        headers=headers,
        timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=600),
        trust_env=proxied,
        transport=transport or (None if proxied else Wire(_trusted(url))),
    )


def _proxied(url: str) -> bool:
    """Whether the environment names a proxy for what lies at ``url``."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in ("localhost", "::1") or host.startswith("127."):
        return False
    proxies = getproxies()
    return (parts.scheme in proxies or "all" in proxies) and not proxy_bypass(host)


def _trusted(url: str) -> ssl.SSLContext | None:
    """Return what trusts the server at ``url`` where `qvl serve` has started it on this machine; None elsewhere."""
    if not url.startswith("https:"):
        return None
    from serve.process.trust import context_for

    return context_for(url)


def tls_fault(error: BaseException | None) -> str | None:
    """Return what is wrong with a server's TLS, and what to do; None: it is something else."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    if isinstance(error, ssl.SSLCertVerificationError):
        said = error.verify_message.rstrip(".")
        if "expired" in said:
            return f"its certificate is not valid now ({said}); renew it, or set this machine's clock"
        if "mismatch" in said or "not valid for" in said:
            return f"its certificate is another host's ({said}); use the name it is made out to"
        return f"its certificate is not trusted here ({said}); name its signer's certificate with SSL_CERT_FILE=FILE"
    reason = getattr(error, "reason", None) or ""
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"):
        return "it does not speak TLS there; write http:// instead of https://"
    said = reason.lower().replace("_", " ") or str(error)
    return f"TLS failed ({said}); check the port, and which versions of TLS the server takes"


async def discover(
    url: str,
    api_key: str | None = None,
    *,
    model: str | None = None,
    timeout_s: float = 10.0,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Endpoint:
    """Ask ``GET /v1/models`` what is served and return it as an `Endpoint`.

    Args:
        model: the name to use; must be among those served. None takes the first.

    Raises:
        ServerError: nothing answers there, the key is refused, or the answer is not a list of models.
    """
    root = normalise_url(url)
    shown = public_url(root)
    async with http_client(root, api_key, timeout_s=timeout_s, transport=transport) as http:
        try:
            response = await http.get("/v1/models")
        except httpx.HTTPError as error:
            raise ServerError(
                f"{shown}: {tls}"
                if (tls := tls_fault(error))
                else f"no server answers at {shown} ({type(error).__name__}); "
                "start one with `qvl serve`, or check the address"
            ) from error
        if response.status_code in (401, 403):
            raise ServerError(
                f"{shown} refuses the API key (HTTP {response.status_code}); give the right one in QVL_API_KEY, or "
                "in QVL_BASELINE_KEY and QVL_CANDIDATE_KEY where the two have different ones"
            )
        try:
            served = [str(entry["id"]) for entry in response.json()["data"]] if response.status_code == 200 else []
        except (ValueError, KeyError, TypeError):
            served = []
        if not served:
            raise ServerError(
                f"{shown}/v1/models answers HTTP {response.status_code} without a list of models: "
                "is it an OpenAI-compatible server?"
            )
        if model is not None and model not in served:
            raise ServerError(f"{shown} does not serve {model!r}; it serves {', '.join(served)}")
        version = None
        try:
            answer = await http.get("/version")
            if answer.status_code == 200:
                version = str(answer.json()["version"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            pass  # not every server has it
    return Endpoint(url=root, model=model or served[0], api_key=api_key, version=version)
