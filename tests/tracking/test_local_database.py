"""MLflow's database on a disk: in folders of any name, moved, and opened by two processes at once."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from acestep_ray.tracking import end_mlflow_run, mlflow_uri, same_run, start_mlflow_run
from acestep_ray.tracking.local_database import database_of, sqlite_uri
from acestep_ray.tracking.mlflow_run import MLflowRun, located_run, short_requests

ODD_NAMES = ["a?b", "100%25", "50%", "a#b", "my songs", "a&b", "日本", 'a"b']


@pytest.mark.parametrize("name", ODD_NAMES)
def test_the_address_of_a_database_names_its_file(name, tmp_path):
    database = tmp_path / name / "mlflow.db"
    uri = mlflow_uri(None, tmp_path / name)
    assert uri == sqlite_uri(database)
    assert database_of(uri) == database


def test_the_address_of_a_database_in_a_plain_folder_is_as_it_was(tmp_path):
    assert mlflow_uri(None, tmp_path / "my songs") == f"sqlite:///{tmp_path}/my songs/mlflow.db"


def test_an_address_is_made_absolute_and_has_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert mlflow_uri("sqlite:///runs.db", "logs") == f"sqlite:///{tmp_path}/runs.db"
    assert mlflow_uri("sqlite:///~/runs.db", "logs") == "sqlite:////home/me/runs.db"
    assert mlflow_uri("http://server:5000", "logs") == "http://server:5000"


def upload(run: MLflowRun, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text("a")
    with short_requests(run.tracking_uri, 10):
        MlflowClient(run.tracking_uri).log_artifacts(run.run_id, str(folder), "samples")


def begin(logs: Path, known: str | None = None) -> MLflowRun:
    logs.mkdir(parents=True, exist_ok=True)
    uri = mlflow_uri(None, logs)
    assert uri is not None
    return start_mlflow_run(uri, "acestep-ray", "run", {}, known)


@pytest.mark.parametrize("copied", [False, True])
def test_artifacts_go_where_the_project_is_now(copied, tmp_path):
    old, new = tmp_path / "old 100%25 a?b", tmp_path / "new 100%25"
    first = begin(old / "logs")
    # Not by `upload`: MLflow remembers in this process where a run's artifacts were.
    artifacts = old / "logs" / "mlruns" / "acestep-ray" / first.run_id / "artifacts" / "samples"
    artifacts.mkdir(parents=True)
    (artifacts / "b.txt").write_text("b")
    end_mlflow_run(first, "FINISHED")
    before = sorted(old.rglob("*"))
    (shutil.copytree if copied else shutil.move)(old, new)
    uri = mlflow_uri(None, new / "logs")
    assert uri is not None
    known = same_run(first.tracking_uri, first.run_id, uri)
    assert known == first.run_id
    for run in (begin(new / "logs", known), begin(new / "logs")):
        upload(run, tmp_path / "files")
        where = new / "logs" / "mlruns" / "acestep-ray" / run.run_id / "artifacts" / "samples" / "a.txt"
        assert where.is_file()
    assert sorted(old.rglob("*")) == (before if copied else [])
    assert {path.name for path in tmp_path.iterdir()} == {new.name, "files"} | (
        {old.name} if copied else set()
    )
    assert located_run(first, uri) == MLflowRun(uri, first.run_id)


def test_a_run_of_another_database_is_not_continued(tmp_path):
    first = begin(tmp_path / "a")
    begin(tmp_path / "b")
    assert same_run(first.tracking_uri, first.run_id, mlflow_uri(None, tmp_path / "b") or "") is None
    assert same_run("http://server", "1", mlflow_uri(None, tmp_path / "b") or "") is None
    assert same_run("http://server", "1", "http://server") == "1"
    shutil.rmtree(tmp_path / "a")
    assert located_run(first, mlflow_uri(None, tmp_path / "b")) is None


def test_artifacts_at_a_place_that_somebody_chose_stay_there(tmp_path):
    run = begin(tmp_path / "logs")
    with sqlite3.connect(tmp_path / "logs" / "mlflow.db") as connection:
        connection.execute("UPDATE experiments SET artifact_location = 's3://bucket/mlruns/acestep-ray'")
    begin(tmp_path / "logs", run.run_id)
    with sqlite3.connect(tmp_path / "logs" / "mlflow.db") as connection:
        places = {row[0] for row in connection.execute("SELECT artifact_location FROM experiments")}
    assert places == {"s3://bucket/mlruns/acestep-ray"}


def test_two_first_runs_at_once_both_get_their_tables(tmp_path):
    code = (
        "import sys, time; import mlflow.tracking\n"
        "from acestep_ray.tracking import mlflow_uri, start_mlflow_run\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "start_mlflow_run(mlflow_uri(None, sys.argv[1]), 'acestep-ray', 'run', {}, None)\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for one in both:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    said = [one.communicate(timeout=120)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (2,)
