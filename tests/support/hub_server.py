"""A hub on this machine: what huggingface_hub and `datasets` ask of one, over HTTP, with faults on demand.

Commands that should see it run with `Hub.environment()`, in a process of their own: the libraries read HF_ENDPOINT when
they are imported. Repositories are folders; each has one revision, the only one that it answers to.
"""

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
KINDS = ("models", "datasets")
Kind = Literal["reset", "429", "503", "stall", "truncate", "shorten", "401", "403"]


@dataclass
class Fault:
    """What happens to requests whose method and path match `pattern`, from the `after`th on, `times` times.

    reset: the connection breaks in the middle of the body; stall: it goes silent there; truncate: it closes there;
    shorten: half of a range arrives, as if it were all.
    """

    kind: Kind
    pattern: str = r"GET .*/resolve/.*\.parquet"
    after: int = 0
    times: int = 1
    seen: int = 0


@dataclass
class Hub:
    """A running server; its repositories are `directory`/{models,datasets}/<namespace>/<name>/."""

    directory: Path
    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Method, path and range of every request, in order."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def repository(self, kind: Literal["models", "datasets"], name: str) -> Path:
        """The folder to put a repository's files into."""
        folder = self.directory / kind / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that send the libraries here; `home` takes their caches."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def fault_for(self, request: str) -> Kind | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if re.match(fault.pattern, request):
                    fault.seen += 1
                    if fault.after < fault.seen <= fault.after + fault.times:
                        return fault.kind
        return None


@contextmanager
def serving(directory: Path) -> Iterator[Hub]:
    """Run a hub over `directory` until the body ends."""
    hub = Hub(Path(directory))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    _API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?$")
    _FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self) -> None:
        self._form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        path = unquote(urlsplit(self.path).path)
        self._fault = self.hub.fault_for(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if self._fault == "429":
            self._send(429, b"slow down", {"Retry-After": "0"})
        elif self._fault == "503":
            self._send(503, b"unavailable")
        elif self._fault == "401":
            self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif self._fault == "403":
            self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif found := self._FILE.match(path):
            self._file(found[1] or "models", *found.group(2, 3, 4))
        elif found := self._API.match(path):
            self._api(*found.groups())
        else:
            self._missing("EntryNotFound")

    def _api(self, kind: str, name: str, what: str | None, revision: str | None, below: str | None) -> None:
        folder = self._folder(kind, name, revision)
        if folder is None:
            return
        if what == "tree":
            self._json(_entries(folder, below or "", "recursive=true" in self.path.lower()))
        elif what == "paths-info":
            asked = [folder / path for path in self._form.get("paths", []) if (folder / path).exists()]
            self._json([_entry(folder, path) for path in asked])
        else:
            siblings = [{"rfilename": entry["path"]} for entry in _entries(folder, "", True) if entry["type"] == "file"]
            about = {"id": name, "sha": REVISION, "private": False, "gated": False, "disabled": False, "tags": []}
            self._json({**about, "downloads": 0, "likes": 0, "siblings": siblings})

    def _folder(self, kind: str, name: str, revision: str | None) -> Path | None:
        """The repository's folder, or None once the answer says what there is not."""
        folder = self.hub.directory / kind / name
        if not folder.is_dir():
            # as the hub does: who has no account is not told whether a repository exists
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif revision not in (None, REVISION):
            self._missing("RevisionNotFound")
        else:
            return folder
        return None

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        folder = self._folder(kind, name, revision)
        if folder is None:
            return
        if not (folder / path).is_file():
            return self._missing("EntryNotFound")
        content = (folder / path).read_bytes()
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._send(200, content, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        return self._send(
            206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        )

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        half = body[: len(body) // 2]
        if self._fault == "shorten":
            body = half
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._fault in ("reset", "stall", "truncate"):
            self.wfile.write(half)
            self.wfile.flush()
            self.close_connection = True
            if self._fault == "stall":
                self.hub.closing.wait(30)
            if self._fault == "reset":  # closing with this option set sends RST in place of FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
        else:
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    relative = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": _oid(relative.encode()), "size": 0, "path": relative}
    return {"type": "file", "oid": _oid(path.read_bytes()), "size": path.stat().st_size, "path": relative}


def _entries(folder: Path, below: str, recursive: bool) -> list[dict[str, Any]]:
    paths = (folder / below).rglob("*") if recursive else (folder / below).glob("*")
    return [_entry(folder, path) for path in sorted(paths)]
