"""An S3 server for tests: moto's, in a process of its own."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from acestep_ray import storage

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
    storage._filesystem.cache_clear()


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
            storage.Store.at(f"s3://{BUCKET}/any").filesystem.mkdir(BUCKET)
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
