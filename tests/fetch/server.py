"""Servers on this machine that publish files as the Hugging Face Hub does, and that fail as asked."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".bin")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    """Without its query."""
    range: str | None
    authorization: str | None


class FileServer(ThreadingHTTPServer):
    """Serves `files` by path. A path's `faults` answer its next GETs, one each; HEAD is always answered rightly."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.commits: dict[str, str] = {}
        """Newest commit of each repository; a server without any tells nothing that the Hub alone does."""
        self.large_files_at: FileServer | None = None
        """Where the Hub sends requests for large files."""
        self.requests: list[Request] = []
        self.released = threading.Event()
        """Set at the end, for connections that stall."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def gets(self, ending: str = "") -> list[Request]:
        return [
            request for request in self.requests if request.method == "GET" and request.path.endswith(ending)
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0].lstrip("/")
        server = self.server
        server.requests.append(
            Request(self.command, path, self.headers["Range"], self.headers["Authorization"])
        )
        # The address of the newest commit gives the same file.
        for repository, commit in server.commits.items():
            path = path.replace(f"{repository}/resolve/main/", f"{repository}/resolve/{commit}/")
        if self.command == "GET" and server.faults.get(path):
            server.faults[path].pop(0)(self, server.files.get(path, b""))
        elif path not in server.files:
            self.send(404, b"")
        elif path.endswith(LARGE) and server.large_files_at is not None:
            self.send(
                302,
                b"",
                {
                    **self.hub_headers(path),
                    "X-Linked-Size": str(len(server.files[path])),
                    "X-Linked-Etag": f'"{hashlib.sha256(server.files[path]).hexdigest()}"',
                    "Location": f"{server.large_files_at.url}/{path}?Signature=secret-of-the-store",
                },
            )
        else:
            self.send_range(server.files[path], self.hub_headers(path))

    def hub_headers(self, path: str) -> dict[str, str]:
        """What the Hub tells of a file with the answer."""
        repository, _, rest = path.partition("/resolve/")
        if repository not in self.server.commits:
            return {"ETag": f'"{"0" * 40}"'}
        content = self.server.files[path]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"X-Repo-Commit": rest.partition("/")[0], "ETag": f'"{blob}"'}

    def start_of_range(self) -> int:
        return int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])

    def send_range(self, content: bytes, headers: dict[str, str]) -> None:
        start = self.start_of_range()
        if self.headers["Range"] is None:
            self.send(200, content, headers)
        elif start >= len(content):
            self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        else:
            last = f"{len(content) - 1}/{len(content)}"
            self.send(206, content[start:], {**headers, "Content-Range": f"bytes {start}-{last}"})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


Fault = Callable[[_Handler, bytes], None]


def _send_some(handler: _Handler, content: bytes, count: int) -> None:
    """Promise all that was asked for, and send `count` bytes of it."""
    start = handler.start_of_range()
    handler.send_response(206 if start else 200)
    handler.send_header("Content-Length", str(len(content) - start))
    handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    handler.end_headers()
    handler.wfile.write(content[start : start + count])
    handler.wfile.flush()
    handler.close_connection = True


def cut(count: int) -> Fault:
    """The connection ends after so many bytes."""
    return lambda handler, content: _send_some(handler, content, count)


def stall(count: int, then: Callable[[], None] = lambda: None) -> Fault:
    """So many bytes, and then none, while the connection stays."""

    def answer(handler: _Handler, content: bytes) -> None:
        _send_some(handler, content, count)
        then()
        handler.server.released.wait()

    return answer


def refuse(status: int, **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, content: handler.send(status, b"", named)


def corrupt(handler: _Handler, content: bytes) -> None:
    """One byte is another."""
    handler.send_range(bytes([content[0] ^ 1]) + content[1:], {})


def ignore_range(handler: _Handler, content: bytes) -> None:
    handler.send(200, content)


def answer_from(start: int) -> Fault:
    """A part, but not the one that was asked for."""

    def answer(handler: _Handler, content: bytes) -> None:
        last = f"{len(content) - 1}/{len(content)}"
        handler.send(206, content[start:], {"Content-Range": f"bytes {start}-{last}"})

    return answer


def send_more(count: int) -> Fault:
    """Bytes after the end, and no word of how many there will be."""

    def answer(handler: _Handler, content: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(content + b"?" * count)
        handler.close_connection = True

    return answer


@contextmanager
def serving() -> Iterator[FileServer]:
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
