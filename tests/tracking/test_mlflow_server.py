"""MLflow's real server, with passwords: runs, files through its proxy, and what happens when it goes away."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from acestep_ray.errors import InputError
from acestep_ray.tracking import (
    BUFFER_FILE,
    MLflowRun,
    Tracker,
    end_mlflow_run,
    environment_tags,
    start_mlflow_run,
)
from tests.mlflow_server import PASSWORD, USER, MLflowServer, mlflow_server
from tests.tracking.conftest import buffered, log, points, request_seconds, until


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> MLflowServer:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A busy machine answers late."""
    request_seconds(monkeypatch, 60)


@pytest.fixture(autouse=True)
def right_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)


@pytest.fixture
def sample(tmp_path) -> Path:
    """A folder with a file."""
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "a.wav").write_bytes(b"wave")
    return tmp_path / "sample"


def logged(run: MLflowRun) -> list:
    """What the server has of a run's loss."""
    history = MlflowClient(run.tracking_uri).get_metric_history(run.run_id, "loss")
    return sorted((metric.step, "loss", metric.value) for metric in history)


def files(run: MLflowRun, folder: str) -> list[str]:
    return [file.path for file in MlflowClient(run.tracking_uri).list_artifacts(run.run_id, folder)]


def test_a_run_and_its_files_are_on_the_server_and_a_resume_goes_on_with_it(server, tmp_path, sample, said):
    run = start_mlflow_run(server.uri, "served", "name", {"a": 1}, None, tags=environment_tags())
    tracker = Tracker(tmp_path / "logs", run, say=said.append)
    log(tracker, 0, 3)
    tracker.log_artifacts(sample, "samples/step=3")
    tracker.close()
    end_mlflow_run(run, "KILLED", say=said.append)

    again = start_mlflow_run(server.uri, "served", "name", {"a": 2}, run.run_id, say=said.append)
    assert again == run
    tracker = Tracker(tmp_path / "logs", again, first_step=3, say=said.append)
    log(tracker, 3, 5)
    tracker.close()
    end_mlflow_run(run, "FINISHED", say=said.append)
    found = MlflowClient(server.uri).get_run(run.run_id)
    assert (found.info.status, found.data.params["a"], found.data.tags["resumed.a"]) == ("FINISHED", "1", "2")
    assert found.data.tags["version.torch"]
    assert logged(run) == points(0, 5)
    assert found.info.artifact_uri.startswith(
        "mlflow-artifacts:/"
    )  # not a folder that this process could write to
    assert files(run, "samples/step=3") == ["samples/step=3/a.wav"]
    local = MlflowClient(server.uri).download_artifacts(run.run_id, "samples/step=3/a.wav", str(tmp_path))
    assert Path(local).read_bytes() == b"wave"
    assert said == []


@pytest.mark.parametrize("password", ["wrong", None])
def test_a_password_that_is_not_taken_is_told_before_work_starts(server, monkeypatch, password):
    if password is None:
        monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
        monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    with pytest.raises(InputError, match="refuses the credentials: set MLFLOW_TRACKING_USERNAME") as refused:
        start_mlflow_run(server.uri, "refused", "name", {"a": 1}, None)
    assert f"--tracking_uri {server.uri}" in str(refused.value)
    assert str(password) not in str(refused.value)


def test_training_goes_on_with_a_password_that_is_not_taken_any_more(
    server, tmp_path, sample, said, monkeypatch
):
    run = start_mlflow_run(server.uri, "rotated", "name", {"a": 1}, None)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "of last month")
    assert start_mlflow_run(server.uri, "rotated", "name", {"a": 1}, run.run_id, say=said.append) == run
    tracker = Tracker(tmp_path / "logs", run, say=said.append)
    log(tracker, 0, 4)
    until(lambda: (tmp_path / "logs" / BUFFER_FILE).exists() and buffered(tmp_path / "logs") == points(0, 4))
    assert len(said) == 2
    for line in said:
        assert "refuses the credentials: set MLFLOW_TRACKING_USERNAME" in line
        assert "of last month" not in line
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    until(lambda: any("answers again" in line for line in said), seconds=60)
    tracker.close()
    assert logged(run) == points(0, 4)


@pytest.mark.faults
def test_a_server_that_hangs_is_told_and_gets_what_it_has_missed(server, tmp_path, sample, said, monkeypatch):
    run = start_mlflow_run(server.uri, "hangs", "name", {"a": 1}, None)
    tracker = Tracker(tmp_path / "logs", run, say=said.append)
    log(tracker, 0, 3)
    until(lambda: logged(run) == points(0, 3), seconds=60)
    server.signal(signal.SIGSTOP)
    try:
        request_seconds(monkeypatch, 1)
        log(tracker, 3, 6)
        tracker.log_artifacts(sample, "samples/step=3")
        until(lambda: bool(said))
        assert start_mlflow_run(server.uri, "hangs", "name", {"a": 2}, run.run_id, say=said.append) == run
    finally:
        request_seconds(monkeypatch, 60)
        server.signal(signal.SIGCONT)
    until(lambda: any("answers again" in line for line in said), seconds=60)
    tracker.close()
    end_mlflow_run(run, "FINISHED", say=said.append)
    assert logged(run) == points(0, 6)
    assert files(run, "samples/step=3") == ["samples/step=3/a.wav"]
    assert len(said) == 3


@pytest.mark.faults
def test_a_server_that_is_killed_and_comes_back_has_every_step(server, tmp_path, sample, said):
    run = start_mlflow_run(server.uri, "killed", "name", {"a": 1}, None)
    tracker = Tracker(tmp_path / "logs", run, say=said.append)
    log(tracker, 0, 3)
    until(lambda: logged(run) == points(0, 3), seconds=60)
    server.kill()
    log(tracker, 3, 50)  # training does not stop
    until(lambda: (tmp_path / "logs" / BUFFER_FILE).exists() and buffered(tmp_path / "logs") == points(3, 50))
    assert start_mlflow_run(server.uri, "killed", "name", {"a": 1}, run.run_id, say=said.append) == run
    server.start()
    until(lambda: any("answers again" in line for line in said), seconds=60)
    log(tracker, 50, 52)
    tracker.log_artifacts(sample, "samples")
    tracker.close()
    end_mlflow_run(run, "FINISHED", say=said.append)
    assert logged(run) == points(0, 52)
    assert files(run, "samples") == ["samples/a.wav"]
    assert not (tmp_path / "logs" / BUFFER_FILE).exists()
    assert MlflowClient(server.uri).get_run(run.run_id).info.status == "FINISHED"
    assert len(said) == 3


@pytest.mark.faults
def test_a_server_that_is_away_at_the_end_gets_what_is_left_from_the_next_run(server, tmp_path, said):
    run = start_mlflow_run(server.uri, "away", "name", {"a": 1}, None)
    server.kill()
    tracker = Tracker(tmp_path / "logs", run, say=said.append)
    log(tracker, 0, 5)
    tracker.close()
    end_mlflow_run(run, "FINISHED", say=said.append)
    assert "5 metrics" in said[-2]
    server.start()
    tracker = Tracker(tmp_path / "logs", run, first_step=5, say=said.append)
    tracker.close()
    assert logged(run) == points(0, 5)
