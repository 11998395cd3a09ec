"""A run at MLflow begins, goes on and ends, also where the server does not answer."""

from __future__ import annotations

import contextlib
import os
import time

import pytest
from mlflow.tracking import MlflowClient

from acestep_ray.errors import InputError
from acestep_ray.tracking import MLflowRun, Tracker, end_mlflow_run, start_mlflow_run
from acestep_ray.tracking.mlflow_run import short_requests


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


def test_a_password_in_a_setting_is_not_among_the_params(database):
    run = start_mlflow_run(database, "params", "name", {"tracking_uri": "http://user:secret@host"}, None)
    assert MlflowClient(database).get_run(run.run_id).data.params == {"tracking_uri": "http://host"}


def test_a_token_of_the_environment_goes_with_every_request(server, tmp_path, said, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "of-the-day")
    start_mlflow_run(server.run.tracking_uri, "experiment", "name", {}, server.run_id, say=said.append)
    tracker = Tracker(tmp_path, server.run, say=said.append)
    tracker.log({0: {"loss": 0.0}})
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "a.wav").write_bytes(b"wave")
    tracker.log_artifacts(tmp_path / "sample", "samples")
    tracker.close()
    assert server.files == {"samples/a.wav": b"wave"}
    assert server.authorizations == {"Bearer of-the-day"}
