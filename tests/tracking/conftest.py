"""What the tests of tracking share: a server that can be made to fail, and what is found afterwards."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from acestep_ray.tracking import BUFFER_FILE, MLflowRun, Tracker, mlflow_run, retry, sender

Point = tuple[int, str, float]


class Server:
    """The part of MLflow's server that takes metrics and files, on this machine; it can be made to fail."""

    def __init__(self):
        self.run_id = uuid.uuid4().hex  # MLflow remembers for a run's id where its files go
        self.points: list[Point] = []
        self.times: list[int] = []
        self.files: dict[str, bytes] = {}
        self.refused: list[str] = []
        self.authorizations: set[str | None] = set()
        """Of all requests."""
        self.fails = lambda path: False
        """Whether a request of this path is answered with 503."""
        self.answers = threading.Event()
        self.answers.set()
        self.loses_answers = False
        self._http: ThreadingHTTPServer | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def run(self) -> MLflowRun:
        return MLflowRun(f"http://127.0.0.1:{self.port}", self.run_id)

    def start(self) -> None:
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), _Handler)
        self._http.state = self
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        if self._http is not None:
            self.answers.set()
            self._http.shutdown()
            self._http.server_close()
            self._http = None


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        run_id = self.server.state.run_id
        info = {"run_id": run_id, "artifact_uri": f"mlflow-artifacts:/1/{run_id}/artifacts"}
        self._answer({"run": {"info": {**info, "lifecycle_stage": "active", "status": "RUNNING"}}})

    def do_POST(self) -> None:
        self._answer({}, self._take_metrics)

    def do_PUT(self) -> None:
        self._answer({}, self._take_file)

    def _take_metrics(self, server: Server, body: bytes) -> None:
        for metric in json.loads(body)["metrics"]:
            server.points.append((metric["step"], metric["key"], metric["value"]))
            server.times.append(metric["timestamp"])

    def _take_file(self, server: Server, body: bytes) -> None:
        server.files[self.path.partition("/artifacts/")[2].partition("/artifacts/")[2]] = body

    def _answer(self, values: dict, take: Callable[[Server, bytes], None] | None = None) -> None:
        server: Server = self.server.state
        server.authorizations.add(self.headers["Authorization"])
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        server.answers.wait()
        if server.fails(self.path):
            server.refused.append(self.path)
            self.send_error(503)
            return
        if take is not None:
            take(server, body)
        if server.loses_answers:
            return
        content = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        with contextlib.suppress(OSError):  # nobody has waited for it
            self.end_headers()
            self.wfile.write(content)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.start()
    yield server
    server.stop()


def request_seconds(monkeypatch, seconds: float) -> None:
    """How long MLflow has for an answer from now on."""
    for module in (mlflow_run, sender):
        monkeypatch.setattr(module, "REQUEST_SECONDS", seconds)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(retry, "LONGEST_RETRY_SECONDS", 0.1)
    request_seconds(monkeypatch, 1)


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> str:
    """A real MLflow, in a file."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def said() -> list[str]:
    """What was told, by `said.append`."""
    return []


def points(first: int, last: int) -> list[Point]:
    return [(step, "loss", float(step)) for step in range(first, last)]


def log(tracker: Tracker, first: int, last: int) -> None:
    """A metric for each of these steps, one call each."""
    for step in range(first, last):
        tracker.log({step: {"loss": float(step)}})


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def buffered(folder: Path) -> list[Point]:
    """The metrics in the buffer file."""
    lines = map(json.loads, (folder / BUFFER_FILE).read_text().splitlines())
    return [(line["step"], line["name"], line["value"]) for line in lines]


def scalars(folder: Path, name: str = "loss") -> list[tuple[int, float]]:
    """What TensorBoard shows, by step."""
    events = EventAccumulator(str(folder)).Reload().Scalars(name)
    return sorted({(event.step, event.value) for event in events})


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files of this process grow no further, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
