"""A hub of one machine: as much of the Hugging Face hub's HTTP interface as fetching a model takes.

Model info, file tree, and files with ranges; with switches for what can go wrong on the way.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class SmallHub:
    """Serves ``files`` as the model ``hub_id``; records what was asked of it."""

    hub_id: str
    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main", "v1.0", COMMIT)
    #: Files are only handed out to this token.
    gated_for: str | None = None
    #: Drop the connection after so many bytes of a file, once.
    cut: dict[str, int] = field(default_factory=dict)
    #: Never answer for these files.
    stall: set[str] = field(default_factory=set)
    #: Answer everything with this status.
    status: int | None = None
    #: (path of the file, Range header or "") of each download.
    downloads: list[tuple[str, str]] = field(default_factory=list)
    #: The paths of all requests.
    requests: list[str] = field(default_factory=list)
    url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def fetched(self) -> list[str]:
        """The files that were downloaded, each time it was."""
        return sorted(name for name, _ in self.downloads)


@contextmanager
def serve(hub: SmallHub) -> Iterator[SmallHub]:
    """Serve ``hub`` on a free port of 127.0.0.1 while the block runs."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def model_files(directory: Path) -> dict[str, bytes]:
    """The files of a checkpoint, as a repository holds them."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


class _Handler(BaseHTTPRequestHandler):
    hub: SmallHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(path)
        if self.hub.status is not None:
            self._error(self.hub.status, "", "broken")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._api(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*match.groups())
        else:
            self._error(404, "", "no such page")

    def _known(self, hub_id: str, revision: str | None) -> bool:
        if hub_id != self.hub.hub_id:
            self._error(401, "RepoNotFound", "Invalid username or password.")
        elif revision is not None and revision not in self.hub.revisions:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return True
        return False

    def _api(self, hub_id: str, kind: str | None, revision: str | None) -> None:
        if not self._known(hub_id, revision):
            return
        listed = [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
            for name, data in self.hub.files.items()
        ]
        siblings = [{"rfilename": f["path"], "size": f["size"], "blobId": f["oid"]} for f in listed]
        info = {"id": hub_id, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        self._json(listed if kind == "tree" else info)

    def _file(self, hub_id: str, revision: str, name: str) -> None:
        if not self._known(hub_id, revision):
            return
        if self.hub.gated_for is not None and self.headers["Authorization"] != f"Bearer {self.hub.gated_for}":
            self._error(403, "GatedRepo", "Access to this model is restricted.")
        elif name not in self.hub.files:
            self._error(404, "EntryNotFound", "Entry not found")
        else:
            self._hand_out(name, self.hub.files[name])

    def _hand_out(self, name: str, data: bytes) -> None:
        begin = 0
        if match := re.match(r"bytes=(\d+)-", self.headers["Range"] or ""):
            begin = int(match[1])
        self.send_response(206 if begin else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        self.hub.downloads.append((name, self.headers["Range"] or ""))
        if name in self.hub.stall:
            self.hub.closing.wait(60)
            self.close_connection = True
            return
        end = self.hub.cut.pop(name, None)
        self.wfile.write(data[begin:end])
        if end is not None:
            self.close_connection = True

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._send(status, b"" if self.command == "HEAD" else message.encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
