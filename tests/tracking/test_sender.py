"""Metrics and files reach MLflow, or wait for it, and hold nothing up."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from acestep_ray.tracking import (
    BUFFER_FILE,
    Tracker,
    metric_queue,
    sender,
    start_mlflow_run,
)
from acestep_ray.tracking.retry import Retry
from tests.tracking.conftest import buffered, log, points, request_seconds, scalars, until


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
    retry = Retry()
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
    monkeypatch.setattr(sender, "CLOSE_IDLE_SECONDS", 0.5)
    request_seconds(monkeypatch, 10)
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
    monkeypatch.setattr(metric_queue, "REQUEST_METRICS", 10)
    lines = [json.dumps({"step": s, "name": "loss", "value": float(s), "time_ms": 1}) for s in range(50)]
    (tmp_path / BUFFER_FILE).write_text("\n".join(lines) + "\n")
    server.fails = lambda path: len(server.points) >= 20
    tracker = Tracker(tmp_path, server.run, first_step=50, say=lambda line: None)
    until(lambda: bool(server.refused))
    tracker.close()
    assert server.points == points(0, 20)
    assert buffered(tmp_path) == points(20, 50)


def test_more_than_memory_takes_goes_to_the_file_in_order(server, tmp_path, monkeypatch):
    monkeypatch.setattr(metric_queue, "MEMORY_METRICS", 10)
    monkeypatch.setattr(metric_queue, "REQUEST_METRICS", 7)
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
    monkeypatch.setattr(metric_queue, "MEMORY_METRICS", 10)
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
