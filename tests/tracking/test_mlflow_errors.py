"""Why MLflow takes no run: each cause has its own message and remedy, before work starts."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from acestep_ray.errors import InputError
from acestep_ray.tracking import check_mlflow, end_mlflow_run, mlflow_uri, start_mlflow_run

MLFLOW = Path(sys.executable).with_name("mlflow")


def refused(uri: str, run_id: str | None = None, experiment: str = "songs") -> str:
    """The message for a run at this address; the check before work tells the same of a new one."""
    with pytest.raises(InputError) as told:
        start_mlflow_run(uri, experiment, "name", {"a": 1}, run_id)
    assert told.value.exit_code == 2
    if run_id is None:
        with pytest.raises(InputError) as checked:
            check_mlflow(uri, experiment)
        assert str(checked.value) == str(told.value)
    return str(told.value)


@pytest.fixture
def copied(database, tmp_path) -> Path:
    """A database of this MLflow version with one run, to be broken."""
    start_mlflow_run(database, "songs", "name", {}, None)
    return Path(shutil.copy(database.removeprefix("sqlite:///"), tmp_path / "mlflow.db"))


@pytest.fixture
def deleted(copied):
    """An address whose experiment `songs` was deleted, and a run in it."""
    uri = f"sqlite:///{copied}"
    run = start_mlflow_run(uri, "songs", "before", {"a": 1}, None)
    client = MlflowClient(uri)
    client.delete_experiment(client.get_experiment_by_name("songs").experiment_id)
    return uri, run.run_id


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_deleted_experiment_is_told_with_both_ways_on(deleted, is_resumed, said):
    uri, run_id = deleted
    told = refused(uri, run_id if is_resumed else None)
    assert told.startswith(
        f"MLflow's experiment 'songs' was deleted, and takes no runs: --tracking_uri {uri}"
    )
    assert "--restore_experiment" in told
    assert "--tracking_experiment NAME" in told


def test_a_deleted_experiment_is_brought_back_with_its_runs(deleted, said):
    uri, run_id = deleted
    check_mlflow(uri, "songs", restore=True)
    run = start_mlflow_run(uri, "songs", "name", {"a": 1}, run_id, restore=True, say=said.append)
    client = MlflowClient(uri)
    assert run.run_id == run_id
    assert client.get_experiment_by_name("songs").lifecycle_stage == "active"
    assert client.get_run(run_id).info.status == "RUNNING"
    assert said == []


def test_a_run_of_a_deleted_experiment_begins_anew_in_another_one(deleted, said):
    uri, run_id = deleted
    run = start_mlflow_run(uri, "others", "name", {"a": 1}, run_id, say=said.append)
    client = MlflowClient(uri)
    assert client.get_experiment(client.get_run(run.run_id).info.experiment_id).name == "others"
    assert len(said) == 1
    assert f"MLflow's run {run_id} was deleted" in said[0]


def test_a_deleted_run_is_brought_back_where_that_is_asked_for(copied, said):
    uri = f"sqlite:///{copied}"
    run = start_mlflow_run(uri, "songs", "name", {"a": 1}, None)
    MlflowClient(uri).delete_run(run.run_id)
    assert start_mlflow_run(uri, "songs", "name", {"a": 1}, run.run_id, restore=True, say=said.append) == run
    assert MlflowClient(uri).get_run(run.run_id).info.lifecycle_stage == "active"
    assert said == []


def test_a_run_deleted_while_it_trains_is_told_with_the_command_that_brings_it_back(copied, said):
    uri = f"sqlite:///{copied}"
    run = start_mlflow_run(uri, "songs", "name", {"a": 1}, None)
    MlflowClient(uri).delete_run(run.run_id)
    from acestep_ray.tracking.mlflow_errors import reason_of

    try:
        MlflowClient(uri).log_metric(run.run_id, "loss", 1.0)
    except Exception as error:
        reason = reason_of(error)
    assert reason == f"the run was deleted; `mlflow runs restore --run-id {run.run_id}` brings it back"
    command = [MLFLOW, "runs", "restore", "--run-id", run.run_id]
    subprocess.run(command, env={**os.environ, "MLFLOW_TRACKING_URI": uri}, check=True, capture_output=True)
    assert MlflowClient(uri).get_run(run.run_id).info.lifecycle_stage == "active"


def test_a_run_of_a_renamed_experiment_goes_on_there(copied, said):
    uri = f"sqlite:///{copied}"
    run = start_mlflow_run(uri, "songs", "name", {"a": 1}, None)
    client = MlflowClient(uri)
    client.rename_experiment(client.get_experiment_by_name("songs").experiment_id, "renamed")
    assert start_mlflow_run(uri, "songs", "name", {"a": 1}, run.run_id, say=said.append) == run
    assert client.get_experiment_by_name("songs") is None
    assert said == []


def test_a_run_that_was_removed_for_good_is_made_anew_and_told(copied, said):
    uri = f"sqlite:///{copied}"
    run = start_mlflow_run(uri, "songs", "new", {"a": 1}, "f" * 32, say=said.append)
    assert run.run_id != "f" * 32
    assert said == [f"warning: MLflow's run {'f' * 32} is not there any more at {uri}; a new one is made"]


def set_schema(database: Path, revision: str) -> str:
    with sqlite3.connect(database) as connection:
        connection.execute("update alembic_version set version_num = ?", (revision,))
    return f"sqlite:///{database}"


@pytest.mark.parametrize("run_id", [None, "f" * 32])
def test_a_database_of_an_older_mlflow_is_told_with_the_command_that_migrates_it(copied, run_id):
    uri = set_schema(copied, "0c779009ac13")
    told = refused(uri, run_id)
    assert "its database is an older MLflow version's (schema 0c779009ac13" in told
    assert f"mlflow db upgrade {uri}" in told


def test_a_database_of_a_newer_mlflow_is_told_to_need_a_newer_program(copied):
    told = refused(set_schema(copied, "f" * 12))
    assert "a newer MLflow version's" in told
    assert "pip install --upgrade mlflow" in told
    assert "db upgrade" not in told


@pytest.mark.parametrize(
    ("content", "what", "fix"),
    [
        (b"a text that is no database\n" * 99, "no SQLite database", "move it away"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n",
            "Git LFS pointer",
            "git lfs pull",
        ),
        (b"<!DOCTYPE html><html>", "a web page", "download it again"),
    ],
)
def test_a_file_that_is_no_database_is_told(tmp_path, content, what, fix):
    path = tmp_path / "mlflow.db"
    path.write_bytes(content)
    told = refused(f"sqlite:///{path}")
    assert what in told
    assert fix in told
    assert path.read_bytes() == content


def test_a_damaged_database_is_told(copied):
    content = bytearray(copied.read_bytes())
    content[4096:80000] = os.urandom(80000 - 4096)
    copied.write_bytes(content)
    assert "the database is damaged" in refused(f"sqlite:///{copied}")


def test_a_locked_database_is_told_of_a_new_run_and_a_known_one_goes_on(copied, said, monkeypatch):
    with sqlite3.connect(copied) as connection:
        connection.execute("begin exclusive")
        told = refused(f"sqlite:///{copied}")
        run = start_mlflow_run(f"sqlite:///{copied}", "songs", "name", {}, "f" * 32, say=said.append)
    connection.close()
    assert "another process has locked the database" in told
    assert f"fuser {copied}" in told
    assert run.run_id == "f" * 32
    assert "locked" in said[0]


def test_a_folder_is_told_from_a_database(tmp_path):
    assert f"--tracking_uri sqlite:///{tmp_path}/mlflow.db" in refused(f"sqlite:///{tmp_path}")


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        code, body = self.server.answer
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("code", "body", "what", "fix"),
    [
        (401, "", "refuses the credentials", "MLFLOW_TRACKING_USERNAME"),
        (403, "no", "refuses the credentials", "MLFLOW_TRACKING_USERNAME"),
        (
            403,
            "Invalid Host header - possible DNS rebinding attack detected",
            "by this name",
            "--allowed-hosts",
        ),
        (
            404,
            "<html>nginx",
            "not the address of an MLflow server: what is there answers with 404",
            "browser",
        ),
        (404, '{"detail":"Not Found"}', "not the address of an MLflow server", "browser"),
        (405, "", "not the address of an MLflow server", "browser"),
        (302, "", "not the address of an MLflow server", "browser"),
        (200, "<html>Sign in</html>", "not the address of an MLflow server", "behind a login"),
        (503, "", "its server fails with 503", "log"),
    ],
)
def test_what_a_server_answers_is_told_with_its_own_remedy(web, code, body, what, fix, said):
    web.answer = (code, body)
    uri = f"http://127.0.0.1:{web.server_port}"
    told = refused(uri)
    assert what in told
    assert fix in told.partition("→")[2]
    run = start_mlflow_run(uri, "songs", "name", {}, "f" * 32, say=said.append)
    assert run.run_id == "f" * 32  # a run that is known goes on, for a server may be back
    assert len(said) == 1


def test_a_server_that_takes_everything_and_is_not_mlflow_is_told(web):
    web.answer = (200, "{}")
    with pytest.raises(InputError, match="not the address of an MLflow server"):
        start_mlflow_run(f"http://127.0.0.1:{web.server_port}", "songs", "name", {}, None)


def test_the_address_of_a_page_is_told_from_that_of_the_server(web):
    web.answer = (404, "")
    told = refused(f"http://127.0.0.1:{web.server_port}/experiments/1")
    assert told.endswith(f"--tracking_uri http://127.0.0.1:{web.server_port}")


def test_a_server_that_does_not_run_is_told_with_how_to_start_it():
    told = refused("http://127.0.0.1:1")
    assert "no server listens at 127.0.0.1:1" in told
    assert "mlflow server --port 1" in told


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        ("localhost:5000", "http://localhost:5000"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("[::1]:5000", "http://[::1]:5000"),
        ("tracker:5000", "http://tracker:5000"),
        ("mlflow.example.com/team", "http://mlflow.example.com/team"),
        ("http:/localhost:5000", "http://localhost:5000"),
        ("http:localhost:5000", "http://localhost:5000"),
        ("htp://localhost:5000", "http://localhost:5000"),
        ("sqlite:mlflow.db", "sqlite:///mlflow.db"),
        ("sqlite:/a/mlflow.db", "sqlite:////a/mlflow.db"),
        ("sqlite://mlflow.db", "sqlite:///mlflow.db"),
        ("/a/b.db", "sqlite:////a/b.db"),
    ],
)
def test_an_address_without_its_scheme_is_told_with_the_whole_one(address, meant):
    with pytest.raises(InputError) as told:
        mlflow_uri(address, "logs")
    assert told.value.where == f"--tracking_uri {address}"
    assert f"{meant}" in told.value.fix


@pytest.mark.parametrize(
    "address",
    [
        "http://localhost:5000",
        "https://host/path",
        "sqlite:////a/mlflow.db",
        "postgresql+psycopg2://host/db",
        "mysql://host/db",
        "databricks",
        "databricks://profile",
        "file:///a/mlruns",
        "./mlruns",
        "mlruns",
    ],
)
def test_an_address_that_mlflow_knows_is_taken_as_given(address):
    assert mlflow_uri(address, "logs") == address


def test_a_password_is_shown_by_no_message(web):
    web.answer = (404, "")
    uri = f"http://user:secret@127.0.0.1:{web.server_port}/experiments/1"
    assert "secret" not in refused(uri)
    end_mlflow_run(type("Run", (), {"tracking_uri": uri, "run_id": "1"}), "FAILED", say=lambda line: None)
