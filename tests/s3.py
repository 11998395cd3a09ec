"""An S3 server for tests: moto's, in a process of its own; and a way to it on which requests fail."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from acestep_ray.storage import Store, clients

BUCKET = "bucket"

# Some lines of the log are coloured.
_REQUEST = re.compile(rb'"(?:\x1b\[[0-9;]*m)*(GET|PUT|POST|DELETE|HEAD) (\S+) HTTP')


@dataclass
class S3Server:
    """What a test knows of the server. `AWS_ENDPOINT_URL` and credentials are in the environment."""

    endpoint: str
    log: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def url(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}"

    def fresh(self) -> str:
        """The URL of a prefix that nothing was written to."""
        return self.url(f"test-{next(self._numbers)}")

    def requests(self, url: str) -> list[str]:
        """Methods of the requests since the start whose URL begins with this one."""
        wanted = url.removeprefix("s3:/").encode()
        with open(self.log, "rb") as file:
            requests = _REQUEST.findall(file.read())
        return [method.decode() for method, path in requests if path.startswith(wanted)]


def forget_clients() -> None:
    """Clients read the environment when they are made; the next ones read it anew."""
    clients.filesystem_of.cache_clear()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }
    before = {name: os.environ.get(name) for name in settings}
    with tempfile.NamedTemporaryFile(prefix="moto-", suffix=".log") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _wait_for(endpoint, server, log.name)
            os.environ.update(settings)
            forget_clients()
            Store.at(f"s3://{BUCKET}/any").filesystem.mkdir(BUCKET)
            yield S3Server(endpoint, log.name)
        finally:
            server.kill()
            server.wait()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            forget_clients()


Fails = Callable[[str, str], "str | None"]
"""Says for a request, by method and path with its query, how it fails: `503`, `500`, `403`, `reset` (the connection is
closed before the request is passed on), `lost` (closed after that), `cut` (half of the answer comes), `slow` (the
answer comes late); None lets it pass."""


@dataclass
class Faults:
    """Requests on their way to the server."""

    fails: Fails
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each, also of those that failed."""
    seconds: float = 1.0
    """Of a slow answer."""

    def once_each(self, kind: str) -> None:
        """Let the first attempt of every request fail."""
        seen = set()

        def fails(method: str, path: str) -> str | None:
            if (method, path) in seen:
                return None
            seen.add((method, path))
            return kind

        self.fails = fails


@contextmanager
def faulty(server: S3Server) -> Iterator[Faults]:
    """A way to the server on which requests fail as they are told to, for clients that are made inside the block."""
    faults = Faults(fails=lambda method, path: None)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    proxy.daemon_threads = True
    proxy.faults, proxy.target = faults, server.endpoint.removeprefix("http://")
    threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
    before = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.server_port}"
    forget_clients()
    try:
        yield faults
    finally:
        os.environ["AWS_ENDPOINT_URL"] = before
        forget_clients()
        proxy.shutdown()
        proxy.server_close()


_ERRORS = {"503": b"SlowDown", "403": b"AccessDenied", "500": b"InternalError"}


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _pass_on(self) -> None:
        faults: Faults = self.server.faults
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        faults.requests.append((self.command, self.path))
        kind = faults.fails(self.command, self.path)
        if kind in _ERRORS:
            self._answer(
                int(kind), [], b"<Error><Code>%s</Code><Message>no</Message></Error>" % _ERRORS[kind]
            )
            return
        if kind == "reset":
            self.close_connection = True
            return
        status, headers, content = self._ask(body)
        if kind == "lost":
            self.close_connection = True
            return
        if kind == "slow":
            time.sleep(faults.seconds)
        self._answer(status, headers, content, cut=kind == "cut" and len(content) > 0)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        connection.request(self.command, self.path, body=body, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), content

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        left_out = {"connection", "transfer-encoding"} | (
            set() if self.command == "HEAD" else {"content-length"}
        )
        for name, value in headers:
            if name.lower() not in left_out:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        with contextlib.suppress(OSError):  # nobody waits for it any more
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut


def _wait_for(endpoint: str, server: subprocess.Popen, log: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    with open(log, encoding="utf-8", errors="replace") as file:
        raise RuntimeError(f"the S3 server did not start:\n{file.read()}")
