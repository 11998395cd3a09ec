"""Logs in object storage: what is there after a while, a resume, a kill, and a time without storage."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from acestep_ray.storage import StorageError, Store, fetched
from acestep_ray.tracking import BUFFER_FILE, Tracker, mirror, tracker
from tests.tracking.conftest import log, points, until


@pytest.fixture
def logs(s3) -> Store:
    """An empty folder in object storage."""
    return Store.at(s3.fresh())


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(mirror, "COPY_SECONDS", 0.2)


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder for temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def scalars(logs: Store) -> list[tuple[int, float]]:
    """What TensorBoard shows, by step."""
    with fetched(logs) as folder:
        events = EventAccumulator(str(folder)).Reload().Scalars("loss")
    return sorted({(event.step, event.value) for event in events})


def buffered(logs: Store) -> list:
    lines = map(json.loads, logs.read_bytes(BUFFER_FILE).splitlines())
    return [(line["step"], line["name"], line["value"]) for line in lines]


class Outage:
    """Storage that takes nothing while `is_on`."""

    def __init__(self, monkeypatch):
        self.is_on = False
        self.attempts = 0
        upload = Store.upload

        def fail(store: Store, source, name: str) -> None:
            if self.is_on:
                self.attempts += 1
                raise StorageError(f"the bucket is on fire: {store.url_of(name)}")
            upload(store, source, name)

        monkeypatch.setattr(Store, "upload", fail)


def test_events_are_there_while_a_run_goes_on_and_all_of_them_at_its_end(logs, temporary):
    running = Tracker(logs, None)
    log(running, 0, 3)
    until(lambda: len(logs.names()) == 1 and len(scalars(logs)) == 3)
    log(running, 3, 5)
    running.close()
    assert scalars(logs) == [(step, float(step)) for step in range(5)]
    assert os.listdir(temporary) == []


def test_a_resumed_run_writes_over_no_events_of_the_one_before(logs):
    first = Tracker(logs, None)
    first.log({step: {"loss": 9.0} for step in range(6)})
    first.close()
    before = logs.names()
    second = Tracker(logs, None, first_step=4)
    second.log({4: {"loss": 1.0}})
    second.close()
    assert len(logs.names()) == 2
    assert before.items() <= logs.names().items()
    assert scalars(logs) == [*[(step, 9.0) for step in range(4)], (4, 1.0)]


def test_events_of_a_long_run_go_into_several_files_each_copied_a_few_times(logs, monkeypatch):
    monkeypatch.setattr(tracker, "LARGEST_MIRRORED_BYTES", 2000)
    running = Tracker(logs, None)
    log(running, 0, 200)
    running.close()
    sizes = [status.size for status in logs.names().values()]
    assert len(sizes) > 3
    assert max(sizes) < 4000
    assert scalars(logs) == [(step, float(step)) for step in range(200)]


def test_metrics_that_mlflow_did_not_take_wait_there_for_the_next_run(logs, server, said, temporary):
    server.stop()
    first = Tracker(logs, server.run, say=said.append)
    log(first, 0, 4)
    until(
        lambda: logs.status(BUFFER_FILE) is not None and buffered(logs) == points(0, 4)
    )  # also after a kill
    first.close()
    assert buffered(logs) == points(0, 4)
    assert logs.url_of(BUFFER_FILE) in said[0]
    assert f"they are in {logs.url_of(BUFFER_FILE)}" in said[-1]
    assert str(temporary) not in "".join(said)

    server.start()
    second = Tracker(logs, server.run, first_step=4, say=said.append)
    log(second, 4, 6)
    second.close()
    assert server.points == points(0, 6)
    assert logs.status(BUFFER_FILE) is None


def test_storage_that_takes_nothing_for_a_while_is_told_once_and_gets_it_later(logs, said, monkeypatch):
    outage = Outage(monkeypatch)
    running = Tracker(logs, None, say=said.append)
    outage.is_on = True
    log(running, 0, 3)
    until(lambda: outage.attempts > 2)
    assert len(said) == 1
    assert logs.url in said[0]
    assert "training goes on" in said[0]
    outage.is_on = False
    until(lambda: len(said) == 2)
    log(running, 3, 4)
    running.close()
    assert scalars(logs) == [(step, float(step)) for step in range(4)]
    assert len(said) == 2
    assert "takes logs again" in said[1]


def test_what_storage_never_takes_stays_on_this_machine_and_is_told(logs, said, temporary, monkeypatch):
    outage = Outage(monkeypatch)
    outage.is_on = True
    running = Tracker(logs, None, say=said.append)
    log(running, 0, 3)
    running.close()
    (folder,) = temporary.iterdir()
    assert f"the last logs are not in {logs.url}; they stay in {folder}" in said[-1]
    events = EventAccumulator(str(folder)).Reload().Scalars("loss")
    assert [event.step for event in events] == [0, 1, 2]


def test_a_buffer_that_cannot_be_read_is_told_and_stops_nothing(logs, server, said, monkeypatch):
    def fail(store: Store, name: str, target) -> None:
        raise StorageError("the bucket is on fire")

    monkeypatch.setattr(Store, "download", fail)
    running = Tracker(logs, server.run, say=said.append)
    log(running, 0, 2)
    running.close()
    assert server.points == points(0, 2)
    assert len(said) == 1
    assert logs.url_of(BUFFER_FILE) in said[0]
