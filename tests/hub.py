"""The part of the Hugging Face Hub that reading a dataset repository takes, as a server on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "user/songs"
COMMIT = "c" * 40


@dataclass
class Hub:
    """`files` is what the repository holds; it may change while the server runs."""

    endpoint: str
    files: dict[str, bytes]
    requests: list[str] = field(default_factory=list)

    def entries(self, folder: str) -> list[dict]:
        """Files below a folder, as the Hub lists them."""
        return [self.entry(name) for name in sorted(self.files) if name.startswith(folder)]

    def entry(self, name: str) -> dict:
        content = self.files[name]
        # As git names it, roughly: what matters is that it changes with the content.
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}


@contextmanager
def hub_server(files: Mapping[str, bytes]) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = server.hub = Hub(f"http://127.0.0.1:{server.server_port}", dict(files))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        path = unquote(url.path)
        hub.requests.append(f"GET {path}")
        api, resolve = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/main/"
        if path in (api, f"{api}/revision/main"):
            self._answer_json({"id": REPOSITORY, "sha": COMMIT, "siblings": []})
        elif path.startswith(f"{api}/tree/main"):
            folder = path.removeprefix(f"{api}/tree/main").strip("/")
            prefix = f"{folder}/" if folder else ""
            entries = hub.entries(prefix)
            if parse_qs(url.query).get("recursive", ["false"])[0].lower() != "true":
                entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
            if hub.entries(prefix):
                self._answer_json(entries)
            else:
                self._answer_json({"error": "no such entry"}, 404, {"X-Error-Code": "EntryNotFound"})
        elif path.startswith(resolve) and path.removeprefix(resolve) in hub.files:
            self._answer_file(hub.files[path.removeprefix(resolve)])
        elif path.startswith(resolve):
            self._answer_json({"error": "no such entry"}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._answer_json({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "json" in (self.headers["Content-Type"] or ""):
            names = json.loads(body)["paths"]
        else:
            names = parse_qs(body.decode())["paths"]
        names = [names] if isinstance(names, str) else names
        commit = {"id": COMMIT, "title": "songs", "date": "2026-01-01T00:00:00.000Z"}
        self._answer_json([hub.entry(name) | {"lastCommit": commit} for name in names if name in hub.files])

    def _answer_file(self, content: bytes) -> None:
        wanted = self.headers["Range"]
        if not wanted:
            self._answer(200, content)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        if int(first) >= len(content):
            self._answer(416, b"")
        else:
            self._answer(
                206, part, {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"}
            )

    def _answer_json(
        self, content: object, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        self._answer(
            status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        )

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
