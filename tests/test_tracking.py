from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from acestep_ray import tracking
from acestep_ray.errors import InputError
from acestep_ray.tracking import (
    BUFFER_FILE,
    MLflowRun,
    Tracker,
    end_mlflow_run,
    environment_tags,
    short_requests,
    start_mlflow_run,
)

Point = tuple[int, str, float]


class Server:
    """The part of MLflow's server that takes metrics and files, on this machine; it can be made to fail."""

    def __init__(self):
        self.run_id = uuid.uuid4().hex  # MLflow remembers for a run's id where its files go
        self.points: list[Point] = []
        self.times: list[int] = []
        self.files: dict[str, bytes] = {}
        self.refused: list[str] = []
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


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(tracking, "FIRST_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(tracking, "LONGEST_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "REQUEST_SECONDS", 1)


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


# --- the run


def test_a_run_has_its_params_and_tags_and_what_is_too_long_is_cut(database, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")  # not every server cuts
    params = {"rate": 1e-4, "text": "x" * 7000, **{f"p{i}": i for i in range(120)}}
    run = start_mlflow_run(database, "cut", "name", params, None, tags={"commit": "abc", "long": "y" * 9000})
    found = MlflowClient(database).get_run(run.run_id)
    assert found.info.run_name == "name"
    assert found.data.params["rate"] == "0.0001"
    assert found.data.params["text"] == "x" * 6000
    assert found.data.params["p119"] == "119"
    assert found.data.tags["commit"] == "abc"
    assert found.data.tags["long"] == "y" * 5000


def test_a_continued_run_is_the_same_run_with_changed_params_as_tags(database, said):
    client = MlflowClient(database)

    def go_on(params: dict, run_id: str | None, tags: dict) -> MLflowRun:
        return start_mlflow_run(database, "continued", "name", params, run_id, tags=tags, say=said.append)

    run = go_on({"rate": 1, "same": 2}, None, {"commit": "abc"})
    end_mlflow_run(run, "KILLED")
    assert go_on({"rate": 3, "same": 2, "new": 4}, run.run_id, {"commit": "def"}) == run
    found = client.get_run(run.run_id)
    assert found.info.status == "RUNNING"
    assert found.data.params == {"rate": "1", "same": "2", "new": "4"}
    assert found.data.tags["commit"] == "def"
    assert {name: v for name, v in found.data.tags.items() if "resumed" in name} == {"resumed.rate": "3"}

    go_on({"rate": 1, "same": 2, "new": 4}, run.run_id, {})
    assert client.get_run(run.run_id).data.tags["resumed.rate"] == "1"
    assert said == []


@pytest.mark.parametrize("gone", ["deleted", "unknown"])
def test_a_run_that_is_gone_is_made_anew_and_told(database, said, gone):
    run_id = "f" * 32
    if gone == "deleted":
        run_id = start_mlflow_run(database, "gone", "name", {"a": 1}, None).run_id
        MlflowClient(database).delete_run(run_id)
    run = start_mlflow_run(database, "gone", "name", {"a": 1}, run_id, tags={"t": "1"}, say=said.append)
    found = MlflowClient(database).get_run(run.run_id)
    assert run.run_id != run_id
    assert (found.data.params, found.data.tags["t"]) == ({"a": "1"}, "1")
    assert len(said) == 1
    assert run_id in said[0]


@pytest.mark.parametrize("failure", ["refused", "hangs", "fails", "database"])
def test_a_new_run_on_a_server_that_does_not_answer_is_a_mistake_found_in_seconds(server, tmp_path, failure):
    uri = server.run.tracking_uri
    if failure == "refused":
        server.stop()
    elif failure == "hangs":
        server.answers.clear()
    elif failure == "fails":
        server.fails = lambda path: True
    else:
        uri = f"sqlite:///{tmp_path}"  # a folder, not a file
    environment = dict(os.environ)
    began = time.monotonic()
    with pytest.raises(InputError, match="--tracking_uri"):
        start_mlflow_run(uri, "experiment", "name", {"a": 1}, None)
    assert time.monotonic() - began < 8
    assert dict(os.environ) == environment


def test_mlflows_own_patience_is_as_before_afterwards():
    from mlflow import environment_variables
    from mlflow.store.db import utils

    def patience() -> tuple:
        retries = environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()
        return retries, environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get(), utils.MAX_RETRY_COUNT

    before = patience()
    with contextlib.suppress(KeyError), short_requests("sqlite:///x", 3):
        assert patience() == (0, 3, 1)
        raise KeyError
    assert patience() == before


def test_what_the_environment_says_of_mlflows_patience_goes_before(monkeypatch):
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    with short_requests("http://host", 3):
        assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 77


def test_a_known_run_goes_on_where_the_server_does_not_answer(server, said):
    server.stop()
    run = start_mlflow_run(
        server.run.tracking_uri, "experiment", "name", {"a": 1}, server.run_id, say=said.append
    )
    end_mlflow_run(run, "FINISHED", say=said.append)
    assert run == server.run
    assert len(said) == 2
    for line in said:
        assert line.startswith("warning: ")
        assert "refused" in line
        assert "\n" not in line


def test_a_password_in_the_address_is_not_told(server, said):
    server.stop()
    uri = f"http://user:secret@127.0.0.1:{server.port}"
    start_mlflow_run(uri, "experiment", "name", {}, server.run_id, say=said.append)
    end_mlflow_run(MLflowRun(uri, server.run_id), "FAILED", say=said.append)
    with pytest.raises(InputError) as error:
        start_mlflow_run(uri, "experiment", "name", {}, None)
    assert "secret" not in f"{said} {error.value}"
    assert f"127.0.0.1:{server.port}" in said[0]


# --- what it ran with


@pytest.fixture
def checkout(tmp_path) -> Callable[..., str]:
    """A git checkout in `tmp_path` with one file; runs git in it."""

    def git(*arguments: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *names, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-qm", "first")
    return git


def test_tags_name_the_versions_and_the_commit_of_this_package():
    import ray
    import torch

    tags = environment_tags()
    folder = Path(tracking.__file__).parent
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert tags["version.torch"] == torch.__version__
    assert tags["version.ray"] == ray.__version__
    assert tags["version.python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"version.acestep_ray", "version.peft", "version.transformers", "platform"} <= set(tags)
    assert tags.get("mlflow.source.git.commit", "") == commit.stdout.strip()
    assert all(isinstance(value, str) for value in tags.values())


@pytest.mark.parametrize("place", ["in another checkout", "elsewhere"])
def test_an_installed_package_is_tagged_with_the_commit_of_the_current_folder(
    checkout, tmp_path, tmp_path_factory, monkeypatch, place
):
    folder = tmp_path_factory.mktemp("installed")
    if place == "in another checkout":  # one that has a virtual environment in it
        checkout("-C", str(folder), "init", "-q")
        checkout("-C", str(folder), "commit", "-qm", "another", "--allow-empty")
    installed = folder / "tracking.py"
    installed.write_text("")
    monkeypatch.setattr(tracking, "__file__", str(installed))
    monkeypatch.chdir(tmp_path)
    tags = environment_tags()
    assert tags["mlflow.source.git.commit"] == checkout("rev-parse", "HEAD")
    assert tags["mlflow.source.git.dirty"] == "false"
    (tmp_path / "a.py").write_text("2")
    assert environment_tags()["mlflow.source.git.dirty"] == "true"


def test_a_checkout_of_this_package_goes_before_the_current_folder(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "a.py"))
    monkeypatch.chdir(Path(__file__).parent)
    assert environment_tags()["mlflow.source.git.commit"] == checkout("rev-parse", "HEAD")


def test_without_git_there_are_no_tags_of_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert not [name for name in environment_tags() if "git" in name]


# --- metrics and files that arrive


def test_metrics_and_files_arrive_in_mlflow(database, tmp_path, said):
    run = start_mlflow_run(database, "arrive", "name", {}, None)
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "song.txt").write_text("la la")
    tracker = Tracker(tmp_path / "logs", run, say=said.append)
    tracker.log({step: {"loss": 1.0 / (step + 1), "rate": 0.5} for step in range(1500)})
    tracker.log_artifacts(tmp_path / "sample", "samples/step=5")
    tracker.close()
    client = MlflowClient(database)
    history = client.get_metric_history(run.run_id, "loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [
        (step, 1.0 / (step + 1)) for step in range(1500)
    ]
    assert [file.path for file in client.list_artifacts(run.run_id, "samples/step=5")] == [
        "samples/step=5/song.txt"
    ]
    folder = Path(client.get_run(run.run_id).info.artifact_uri)
    assert folder.is_relative_to(Path(database.removeprefix("sqlite:///")).parent)
    assert not (tmp_path / "logs" / BUFFER_FILE).exists()
    assert said == []


def test_a_metric_that_is_sent_again_is_one_metric_to_mlflow(database):
    run = start_mlflow_run(database, "again", "name", {}, None)
    client = MlflowClient(database)
    for _ in range(2):
        client.log_batch(run.run_id, metrics=[Metric("loss", 0.1, 1_700_000_000_123, 7)])
    assert len(client.get_metric_history(run.run_id, "loss")) == 1


def test_without_a_run_there_is_only_tensorboard(tmp_path):
    tracker = Tracker(tmp_path, None)
    log(tracker, 0, 3)
    tracker.log_artifacts(tmp_path, "samples")
    tracker.close()
    assert scalars(tmp_path) == [(0, 0.0), (1, 1.0), (2, 2.0)]


# --- a server that fails


@pytest.mark.parametrize("failure", ["refused", "hangs", "fails"])
def test_an_outage_is_told_once_holds_nothing_up_and_loses_nothing(server, tmp_path, said, failure):
    tracker = Tracker(tmp_path, server.run, say=said.append)
    log(tracker, 0, 3)
    until(lambda: len(server.points) == 3)
    if failure == "refused":
        server.stop()
    elif failure == "hangs":
        server.answers.clear()
    else:
        server.fails = lambda path: True
    began = time.monotonic()
    log(tracker, 3, 20)
    assert time.monotonic() - began < 0.5
    until(lambda: bool(said))
    log(tracker, 20, 30)
    # A kill now would lose none.
    until(lambda: (tmp_path / BUFFER_FILE).exists() and buffered(tmp_path) == points(3, 30))
    time.sleep(0.3)  # it is tried again and again
    assert len(said) == 1
    assert said[0].startswith("warning: ")
    assert server.run.tracking_uri in said[0]
    assert str(tmp_path / BUFFER_FILE) in said[0]

    if failure == "refused":
        server.start()
    server.answers.set()
    server.fails = lambda path: False
    until(lambda: len(said) == 2)
    log(tracker, 30, 33)
    tracker.close()
    # The requests that hung were taken after all: they came again, with the same times.
    together = list(zip(server.points, server.times, strict=True))
    assert list(dict.fromkeys(together)) == [(p, t) for p, t in dict(together).items()]
    assert list(dict(together)) == points(0, 33)
    assert failure == "hangs" or len(server.points) == 33
    assert "answers again" in said[1]
    assert len(said) == 2
    assert not (tmp_path / BUFFER_FILE).exists()


def test_metrics_whose_answer_was_lost_come_again_with_the_same_times(server, tmp_path, said):
    server.loses_answers = True
    tracker = Tracker(tmp_path, server.run, say=said.append)
    tracker.log({0: {"loss": 0.0}, 1: {"loss": 1.0}})
    until(lambda: len(server.points) > 2)
    server.loses_answers = False
    tracker.close()
    assert set(server.points) == set(points(0, 2))
    assert len(set(server.times)) == 1


def test_waits_between_attempts_grow_up_to_a_bound():
    retry = tracking._Retry()
    waits = []
    for _ in range(6):
        retry.failed()
        waits.append(retry.at - time.monotonic())
        assert not retry.is_due
    assert waits == pytest.approx([0.02, 0.04, 0.08, 0.1, 0.1, 0.1], abs=0.01)
    retry.succeeded()
    assert retry.is_due


def test_what_is_left_at_the_end_is_sent_first_by_whoever_goes_on(server, tmp_path, said):
    server.stop()
    tracker = Tracker(tmp_path, server.run, say=said.append)
    log(tracker, 0, 8)
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 5
    assert buffered(tmp_path) == points(0, 8)
    assert "8 metrics" in said[-1]
    assert str(tmp_path / BUFFER_FILE) in said[-1]

    server.start()
    # The checkpoint was that of step 6: what came after is done again.
    tracker = Tracker(tmp_path, server.run, first_step=6)
    log(tracker, 6, 9)
    tracker.close()
    assert server.points == points(0, 9)
    assert not (tmp_path / BUFFER_FILE).exists()


def test_a_new_run_in_the_same_folder_sends_nothing_of_the_old_one(server, tmp_path):
    server.stop()
    tracker = Tracker(tmp_path, server.run)
    log(tracker, 0, 4)
    tracker.close()
    server.start()
    Tracker(tmp_path, server.run, first_step=0).close()
    assert server.points == []
    assert not (tmp_path / BUFFER_FILE).exists()


def test_a_line_that_a_kill_has_cut_spoils_no_other(server, tmp_path):
    lines = [json.dumps({"step": s, "name": "loss", "value": float(s), "time_ms": 1}) for s in range(3)]
    (tmp_path / BUFFER_FILE).write_text("\n".join(lines)[:-9])
    server.fails = lambda path: True
    tracker = Tracker(tmp_path, server.run, first_step=5)
    log(tracker, 5, 7)
    tracker.close()
    assert buffered(tmp_path) == [*points(0, 2), *points(5, 7)]


def test_a_server_that_hangs_holds_the_end_up_for_seconds_only(server, tmp_path, said, monkeypatch):
    monkeypatch.setattr(tracking, "CLOSE_IDLE_SECONDS", 0.5)
    monkeypatch.setattr(tracking, "REQUEST_SECONDS", 10)
    tracker = Tracker(tmp_path, server.run, say=said.append)
    log(tracker, 0, 2)
    until(lambda: len(server.points) == 2)
    server.answers.clear()
    log(tracker, 2, 5)
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 3
    assert buffered(tmp_path) == points(2, 5)
    assert len(said) == 1
    server.answers.set()
    until(lambda: set(server.points) >= {points(2, 3)[0]})
    time.sleep(0.2)
    assert buffered(tmp_path) == points(2, 5)  # the late answer has changed nothing


def test_what_was_sent_of_a_long_buffer_is_not_in_it_after_the_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "REQUEST_METRICS", 10)
    lines = [json.dumps({"step": s, "name": "loss", "value": float(s), "time_ms": 1}) for s in range(50)]
    (tmp_path / BUFFER_FILE).write_text("\n".join(lines) + "\n")
    server.fails = lambda path: len(server.points) >= 20
    tracker = Tracker(tmp_path, server.run, first_step=50, say=lambda line: None)
    until(lambda: bool(server.refused))
    tracker.close()
    assert server.points == points(0, 20)
    assert buffered(tmp_path) == points(20, 50)


def test_more_than_memory_takes_goes_to_the_file_in_order(server, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "MEMORY_METRICS", 10)
    monkeypatch.setattr(tracking, "REQUEST_METRICS", 7)
    tracker = Tracker(tmp_path, server.run)
    log(tracker, 0, 1)
    until(lambda: len(server.points) == 1)
    server.answers.clear()
    log(tracker, 1, 36)  # while the first requests hang
    assert len(buffered(tmp_path)) >= 20
    server.answers.set()
    tracker.close()
    assert list(dict.fromkeys(server.points)) == points(0, 36)


def test_where_server_and_disk_fail_memory_is_bounded_and_the_loss_told(server, tmp_path, said, monkeypatch):
    monkeypatch.setattr(tracking, "MEMORY_METRICS", 10)
    server.stop()
    (tmp_path / "logs").write_text("a file where the folder should be")
    tracker = Tracker(tmp_path / "logs", server.run, say=said.append)
    log(tracker, 0, 25)
    until(lambda: len(said) == 2)
    (tmp_path / "logs").unlink()
    server.start()
    until(lambda: len(server.points) == 10)
    tracker.close()
    assert server.points == points(0, 10)
    assert any("15 metrics are lost" in line for line in said)


def test_a_buffer_file_that_somebody_deletes_ends_nothing_and_is_told(server, tmp_path, said):
    server.fails = lambda path: True
    tracker = Tracker(tmp_path, server.run, say=said.append)
    log(tracker, 0, 4)
    until(lambda: (tmp_path / BUFFER_FILE).exists())
    (tmp_path / BUFFER_FILE).unlink()
    log(tracker, 4, 6)
    until(lambda: (tmp_path / BUFFER_FILE).exists() and buffered(tmp_path) == points(4, 6))
    server.fails = lambda path: False
    tracker.close()
    assert server.points == points(4, 6)
    assert "4 metrics are lost" in said[-1]


# --- files


def test_a_file_that_mlflow_does_not_take_is_tried_some_times_and_told_while_metrics_go_on(
    server, tmp_path, said
):
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "a.wav").write_bytes(b"wave")
    server.fails = lambda path: "a.wav" in path
    tracker = Tracker(tmp_path / "logs", server.run, say=said.append)
    tracker.log_artifacts(tmp_path / "sample", "samples/step=1")
    log(tracker, 0, 5)
    until(lambda: bool(said))
    server.fails = lambda path: False
    (tmp_path / "sample" / "a.wav").rename(tmp_path / "sample" / "b.wav")
    tracker.log_artifacts(tmp_path / "sample", "samples/step=2")
    tracker.close()
    assert len(server.refused) == 4
    assert server.points == points(0, 5)
    assert server.files == {"samples/step=2/b.wav": b"wave"}
    assert len(said) == 1
    assert str(tmp_path / "sample") in said[0]


def test_files_outlive_an_outage_of_the_server(server, tmp_path, said):
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "a.wav").write_bytes(b"wave")
    server.fails = lambda path: True
    tracker = Tracker(tmp_path / "logs", server.run, say=said.append)
    log(tracker, 0, 5)
    tracker.log_artifacts(tmp_path / "sample", "samples")
    until(lambda: len(server.refused) > 6)
    server.fails = lambda path: False
    tracker.close()
    assert server.files == {"samples/a.wav": b"wave"}
    assert len(said) == 2


def test_files_that_are_left_at_the_end_are_told(server, tmp_path, said):
    server.fails = lambda path: True
    tracker = Tracker(tmp_path / "logs", server.run, say=said.append)
    log(tracker, 0, 2)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        tracker.log_artifacts(tmp_path / name, name)
    tracker.close()
    for name in ("one", "two"):
        assert sum(f"{tmp_path / name} was not uploaded" in line for line in said) == 1


# --- TensorBoard


def test_tensorboard_has_scalars_and_sound(tmp_path):
    tracker = Tracker(tmp_path, None)
    log(tracker, 0, 2)
    tracker.log_audio("sample/song", np.full((2, 480), 0.5, np.float32), 48_000, step=1)
    tracker.close()
    (sound,) = EventAccumulator(str(tmp_path), {"audio": 0}).Reload().Audio("sample/song")
    assert (sound.step, sound.sample_rate, sound.length_frames) == (1, 48_000, 480)
    assert scalars(tmp_path) == [(0, 0.0), (1, 1.0)]


def test_a_resumed_run_discards_the_steps_of_the_interrupted_one_beyond_its_checkpoint(tmp_path):
    tracker = Tracker(tmp_path, None)
    tracker.log({step: {"loss": 9.0} for step in range(6)})
    Tracker(tmp_path, None, first_step=4).log({4: {"loss": 1.0}})
    assert scalars(tmp_path) == [*[(step, 9.0) for step in range(4)], (4, 1.0)]


def test_a_folder_that_cannot_be_made_is_told_once_and_tried_again(tmp_path, said):
    folder = tmp_path / "logs"
    folder.write_text("a file where the folder should be")
    tracker = Tracker(folder, None, first_step=0, say=said.append)
    for step in range(5):
        log(tracker, step, step + 1)
        time.sleep(0.05)
    assert len(said) == 1
    assert str(folder) in said[0]
    folder.unlink()
    time.sleep(0.1)
    log(tracker, 5, 7)
    assert scalars(folder) == [(step, float(step)) for step in range(7)]
    tracker.close()
    assert len(said) == 2


def test_a_disk_that_fills_up_ends_nothing_and_what_it_did_not_take_is_written_later(tmp_path, said):
    tracker = Tracker(tmp_path, None, say=said.append)
    sound = np.full((1, 48_000), 0.5, np.float32)
    tracker.log({0: {"loss": 0.0}})
    with file_size_limit(64 * 1024):
        tracker.log_audio("sample/song", sound, 48_000, step=0)  # 96 kB: it is cut
        tracker.log({1: {"loss": 1.0}})
    assert len(said) == 1
    time.sleep(0.1)
    tracker.log({2: {"loss": 2.0}})
    tracker.close()
    assert scalars(tmp_path) == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert EventAccumulator(str(tmp_path)).Reload().Audio("sample/song")[-1].length_frames == 48_000
    assert len(said) == 2


def test_of_the_events_that_wait_the_latest_are_kept_and_the_loss_of_others_is_told(
    tmp_path, said, monkeypatch
):
    monkeypatch.setattr(tracking, "MEMORY_EVENT_BYTES", 500)
    folder = tmp_path / "logs"
    folder.write_text("a file where the folder should be")
    tracker = Tracker(folder, None, say=said.append)
    log(tracker, 0, 100)
    folder.unlink()
    time.sleep(0.1)
    log(tracker, 100, 101)
    tracker.close()
    kept = [step for step, _ in scalars(folder)]
    assert 2 < len(kept) < 15
    assert kept == list(range(101 - len(kept), 101))
    assert f"but {101 - len(kept)} for which there was no memory" in said[-1]


def test_events_that_are_never_taken_are_told_as_lost(tmp_path, said):
    folder = tmp_path / "logs"
    folder.write_text("a file where the folder should be")
    tracker = Tracker(folder, None, say=said.append)
    log(tracker, 0, 100)
    tracker.close()
    assert "100 events for TensorBoard are lost" in said[-1]


# --- the real server


@contextlib.contextmanager
def mlflow_server(folder: Path, database: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """MLflow's own server, its address and the leader of its process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    places = ["--backend-store-uri", database, "--artifacts-destination", f"{folder}/artifacts"]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *places]
    # Its jobs take several processes that are not needed here.
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with open(folder / "server.log", "wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=5):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"MLflow's server did not start:\n{(folder / 'server.log').read_text()}")
            time.sleep(0.1)
        yield uri, process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_metrics_and_files_reach_the_real_server_through_an_outage(database, tmp_path, said, monkeypatch):
    monkeypatch.setattr(tracking, "REQUEST_SECONDS", 30)
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "a.wav").write_bytes(b"wave")
    with mlflow_server(tmp_path, database) as (uri, process):
        run = start_mlflow_run(uri, "served", "name", {"a": 1}, None, tags=environment_tags())
        tracker = Tracker(tmp_path / "logs", run, say=said.append)
        client = MlflowClient(uri)
        log(tracker, 0, 3)
        until(lambda: len(client.get_metric_history(run.run_id, "loss")) == 3, seconds=60)

        os.killpg(process.pid, signal.SIGSTOP)
        monkeypatch.setattr(tracking, "REQUEST_SECONDS", 1)
        log(tracker, 3, 6)
        tracker.log_artifacts(tmp_path / "sample", "samples/step=3")
        until(lambda: bool(said))
        assert start_mlflow_run(uri, "experiment", "name", {"a": 2}, run.run_id, say=said.append) == run
        monkeypatch.setattr(tracking, "REQUEST_SECONDS", 30)
        os.killpg(process.pid, signal.SIGCONT)
        until(lambda: any("answers again" in line for line in said), seconds=60)
        tracker.close()
        end_mlflow_run(run, "FINISHED", say=said.append)

        history = client.get_metric_history(run.run_id, "loss")
        found = client.get_run(run.run_id)
        assert sorted((metric.step, "loss", metric.value) for metric in history) == points(0, 6)
        assert [file.path for file in client.list_artifacts(run.run_id, "samples/step=3")] == [
            "samples/step=3/a.wav"
        ]
        assert found.info.status == "FINISHED"
        assert found.data.tags["version.torch"]
    assert len(said) == 3
