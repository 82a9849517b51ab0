"""TLS: the certificate that a server shows, looked at before the boot, and what trusts it and nothing else."""

from __future__ import annotations

import functools
import ssl
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import model_validator

from toolkit.errors import QvlError, ServerError
from toolkit.options import Option, Settings

__all__ = ["Tls", "pinned", "unverified"]

#: Days before its end from which on a start says that a certificate ends.
_SOON = 14
_EXPIRED, _NOT_YET = 10, 9  # X509_V_ERR_CERT_HAS_EXPIRED, X509_V_ERR_CERT_NOT_YET_VALID

_operation = functools.partial(Option, panel="Operation")


class Tls(Settings):
    """What a server speaks TLS with; plain HTTP where nothing is given. Raises ServerError for half of it."""

    error: ClassVar[type[QvlError]] = ServerError

    ssl_certfile: Annotated[
        str | None, _operation("Certificate to speak TLS with, and its chain (PEM).", metavar="FILE")
    ] = None
    ssl_keyfile: Annotated[str | None, _operation("The certificate's private key (PEM).", metavar="FILE")] = None

    @model_validator(mode="after")
    def _both(self) -> Self:
        for name, other in (("ssl_certfile", "ssl_keyfile"), ("ssl_keyfile", "ssl_certfile")):
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise ServerError(f"{self.option(name)} without {self.option(other)}: TLS takes both.")
        return self

    @property
    def files(self) -> tuple[str, str] | None:
        """The certificate and its key; None for plain HTTP."""
        if self.ssl_certfile is None or self.ssl_keyfile is None:
            return None
        certificate, key = (Path(file).expanduser().absolute() for file in (self.ssl_certfile, self.ssl_keyfile))
        return str(certificate), str(key)

    @property
    def scheme(self) -> str:
        """The first part of the server's address."""
        return "http" if self.files is None else "https"

    def arguments(self) -> list[str]:
        """Return vLLM's arguments. It reads the files again when they change."""
        if self.files is None:
            return []
        certificate, key = self.files
        return ["--ssl-certfile", certificate, "--ssl-keyfile", key, "--enable-ssl-refresh"]

    def check(self) -> list[str]:
        """Return what to warn of. Raises ServerError for files that no server could start with."""
        if self.files is None:
            return []
        certificate, key = self.files
        _readable("--ssl-certfile", certificate)
        _readable("--ssl-keyfile", key)
        client = pinned(certificate)
        server = _server(certificate, key)
        try:
            found = _handshake(server, client)
        except ssl.SSLCertVerificationError as error:
            if error.verify_code == _EXPIRED:
                return [f"--ssl-certfile {certificate} has expired: clients refuse it. Renew it"]
            if error.verify_code == _NOT_YET:
                return [f"--ssl-certfile {certificate} is not valid yet: clients refuse it. Is the clock right?"]
            return [f"--ssl-certfile {certificate}: clients may refuse it ({error.verify_message})"]
        left = (found - time.time()) / 86_400
        if left < _SOON:
            day = datetime.fromtimestamp(found, UTC).date()
            return [f"--ssl-certfile {certificate} ends on {day}, in {left:.0f} days: renew it"]
        return []


def pinned(certificate: str) -> ssl.SSLContext:
    """Return what trusts the first certificate of this file, under whatever name, and no other.

    Raises ServerError for a file that holds none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # it is named for what clients elsewhere call the server
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    try:
        text = Path(certificate).read_text()
        # Not its chain: that would trust every certificate of the same authority.
        first = text[: text.index(_END) + len(_END)]
        context.load_verify_locations(cadata=first[first.index(_BEGIN) :])
    except (OSError, ValueError, ssl.SSLError):
        raise ServerError(f"--ssl-certfile {certificate} holds no certificate in PEM.") from None
    return context


_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


def unverified() -> ssl.SSLContext:
    """Return what trusts anybody: for asking whether a server of this machine is up, which tells nobody anything."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _readable(option: str, file: str) -> None:
    path = Path(file)
    try:
        if not path.is_file():  # also what would block, such as a pipe
            raise ServerError(f"{option} {file}: {'it is no file' if path.exists() else 'there is no such file'}.")
        with path.open("rb") as stream:
            stream.read(1)
    except OSError as error:
        raise ServerError(f"{option} {file}: it can't be read ({error.strerror}).") from None


def _server(certificate: str, key: str) -> ssl.SSLContext:
    """Return the server's side. Raises ServerError for a key that is none, locked, or another certificate's."""
    asked = False

    def passphrase() -> str:
        nonlocal asked
        asked = True
        return "none"  # of at least four characters, or OpenSSL has another complaint

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, passphrase)
    except (ssl.SSLError, ValueError) as error:
        if asked:
            what = "is locked with a passphrase, which a server has nobody to ask for. Give it without one"
        elif getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            what = f"is not the key of --ssl-certfile {certificate}. Give the two that belong together"
        else:
            what = "holds no private key in PEM, or one that TLS does not take"
        raise ServerError(f"--ssl-keyfile {key} {what}.") from None
    return context


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> float:
    """Let both sides meet in memory; return when the certificate ends, in seconds since 1970.

    Raises ssl.SSLCertVerificationError for a certificate that the client refuses.
    """
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(back, there, server_hostname="localhost")
    answering = server.wrap_bio(there, back, server_side=True)
    for side in (asking, answering, asking, answering, asking):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    shown = asking.getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))
