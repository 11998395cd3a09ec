"""No password, key or token gets into what a run writes, prints or sends.

Of downloads tests/fetch, of object storage tests/storage/test_faults.py, of the report tests/reporting/test_job.py, of
doctor tests/doctor/test_artefacts.py and test_cluster.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from acestep_ray import cli, ray_runtime
from acestep_ray.config import TrainConfig, TuneConfig
from acestep_ray.doctor.cluster import judge_token
from acestep_ray.errors import InputError
from acestep_ray.hidden_secrets import without_secrets
from acestep_ray.reporting.curves import read_mlflow
from acestep_ray.reporting.page import Page
from acestep_ray.reporting.sections import add_settings
from acestep_ray.storage import Store
from acestep_ray.tracking import environment_tags, mlflow_uri
from acestep_ray.training.experiment import FINGERPRINTS, note_identity, run_identity
from acestep_ray.training.job import prepare_experiment
from acestep_ray.training.settings import WorkerSettings
from acestep_ray.tuning.job import begin_parent
from acestep_ray.tuning.records import Records
from acestep_ray.tuning.report import write_best
from acestep_ray.tuning.runs import SearchRuns
from acestep_ray.tuning.space import read_space

# Where users keep them, each with a value that is found again wherever it got.
SECRETS = {
    "HF_TOKEN": "hf_canary_1",
    "AWS_ACCESS_KEY_ID": "AKIACANARY2",
    "AWS_SECRET_ACCESS_KEY": "canary_3",
    "AWS_SESSION_TOKEN": "canary_4",
    "MLFLOW_TRACKING_USERNAME": "canary_5",
    "MLFLOW_TRACKING_PASSWORD": "canary_6",
    "MLFLOW_TRACKING_TOKEN": "canary_7",
    "RAY_AUTH_TOKEN": "canary8canary8canary8canary8canary8",
    "GOOGLE_APPLICATION_CREDENTIALS": "/canary_9.json",
    "PGPASSWORD": "canary_10",
}


@pytest.fixture
def secrets(monkeypatch) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def texts(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of all files below a folder, databases among them."""
    yield from ((str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file())


def assert_without(secrets: dict[str, str], contents: Iterator[tuple[str, bytes]]) -> None:
    looked_at = 0
    for name, content in contents:
        looked_at += 1
        for secret in secrets.values():
            assert secret.encode() not in content, f"{secret} is in {name}"
    assert looked_at


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return TrainConfig(
        dataset_path="s3://songs/cache",
        checkpoint_dir=str(tmp_path),
        exp_name="one",
        exp_dir=str(tmp_path / "exps"),
        logger_dir=str(tmp_path / "exps/logs"),
    )


def test_what_a_run_and_a_search_write_down_and_send_to_mlflow_holds_none(secrets, config, tmp_path, capfd):
    experiment = Store.at(tmp_path / "exps/one")
    log_dir = Store.at(tmp_path / "exps/logs/one")
    (tmp_path / "exps/logs").mkdir(parents=True)
    uri = mlflow_uri(None, config.logger_dir)
    identity = run_identity(config, {"r": 4}, songs="1", transformer="2")
    assert set(FINGERPRINTS.values()) <= identity.keys()
    note_identity(experiment, identity)
    settings = WorkerSettings(config, {"r": 4}, experiment.child("checkpoints"), None, log_dir, None, 3)
    run = prepare_experiment(experiment, settings, uri, identity).mlflow_run

    records = Records(tmp_path / "search")
    runs = SearchRuns(uri, records, "search")
    search = TuneConfig(**{**asdict(config), "exp_name": "search"})
    begin_parent(runs, search, read_space(None, {}), Store.at(tmp_path / "search"))
    record = records.add({"learning_rate": 1e-4})
    runs.start_trial(record)
    write_best(Store.at(tmp_path / "search/best"), record, records, config, {"r": 4})

    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"train.yaml", "run.json", "mlflow.json", "mlflow.db", "trial.json", "lora_config.json"} <= written
    assert run.run_id.encode() in (tmp_path / "exps/logs/mlflow.db").read_bytes()
    assert_without(secrets, texts(tmp_path))
    said = capfd.readouterr()
    tags = json.dumps(environment_tags())
    assert_without(
        secrets, iter([("out", said.out.encode()), ("err", said.err.encode()), ("tags", tags.encode())])
    )


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:canary@mlflow:5000",
        "https://me:canary@mlflow.example/path",
        "postgresql://me:canary@database/mlflow",
        "mysql+pymysql://me:canary@database:3306/mlflow",
        "postgresql://database/mlflow?user=me&password=canary",
        "postgresql://database/mlflow?sslpassword=canary",
        "https://mlflow.example/?token=canary",
    ],
)
def test_an_address_of_mlflow_with_a_password_is_refused_and_not_repeated(uri, tmp_path):
    with pytest.raises(
        InputError, match=r"(?s)a password does not belong.*MLFLOW_TRACKING_PASSWORD"
    ) as refused:
        mlflow_uri(uri, tmp_path)
    assert "canary" not in str(refused.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://mlflow:5000",
        "http://10.0.0.1:5000/a:b@c",
        "https://me@mlflow.example",
        "postgresql://me@database/mlflow",
        "sqlite:////tmp/a:b@c/mlflow.db",
        "databricks://profile",
    ],
)
def test_an_address_of_mlflow_without_a_password_is_taken(uri, tmp_path):
    assert mlflow_uri(uri, tmp_path) == uri


@pytest.mark.parametrize(
    "place", ["s3://AKIA1:canary@bucket/set", "gs://canary@bucket/a", "https://me:canary@host/songs"]
)
def test_a_place_with_a_key_is_refused_before_it_is_written_down(place):
    with pytest.raises(InputError, match="credentials do not belong") as refused:
        Store.at(place)
    assert "canary" not in str(refused.value)
    assert "AKIA1" not in str(refused.value)


SIGNED = [
    "https://b.s3.amazonaws.com/a/s.wav?X-Amz-Algorithm=A&X-Amz-Credential=canary&X-Amz-Signature=canary&X-Amz-Date=2",
    "https://b.s3.amazonaws.com/a/s.wav?AWSAccessKeyId=canary&Signature=canary&Expires=1",
    "https://storage.googleapis.com/b/s.wav?X-Goog-Credential=canary&X-Goog-Signature=canary",
    "https://storage.googleapis.com/b/s.wav?GoogleAccessId=canary&Signature=canary",
    "https://a.blob.core.windows.net/c/s.wav?sv=2022&se=2026&sr=b&sig=canary",
    "https://d.cloudfront.net/s.wav?Policy=canary&Signature=canary&Key-Pair-Id=canary",
    "https://host.example/s.wav?token=canary",
    "https://host.example/s.wav?a=1&access_token=canary",
    "https://host.example/s.wav?api_key=canary",
    "https://me:canary@host.example/s.wav",
]


@pytest.mark.parametrize("url", SIGNED)
def test_a_signed_url_is_no_place_and_is_not_repeated(url):
    with pytest.raises(InputError, match="credentials do not belong") as refused:
        Store.at(url)
    assert "canary" not in str(refused.value)
    assert "canary" not in without_secrets(f"403 for {url}: denied")
    page = Page("page")
    page.note(f"cannot be read: {url}")
    add_settings(page, {"dataset_path": url})
    assert "canary" not in page.render()
    assert page.notes
    assert "canary" not in page.notes[0]


@pytest.mark.parametrize("error", [ConnectionError, InputError, RuntimeError, ValueError])
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_no_error_and_no_traceback_of_a_command_repeats_one(error, debug, secrets, monkeypatch, capfd):
    """Whatever a client of storage, the Hub, MLflow or Ray puts into its messages."""
    monkeypatch.setenv("HF_TOKEN", "hf_canary_1_of_the_environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary_3_of_the_environment")
    told = [*SIGNED, "Authorization: Bearer canarycanary", "{'authorization': 'Basic canarycanary'}"]
    told += [
        value
        for name, value in os.environ.items()
        if name in SECRETS and "USERNAME" not in name and len(value) >= 8
    ]
    told += [f"hf_{'canary' * 5}", "AKIA" + "CANARY" * 2 + "ABCD"]

    def fail(*_, **__):
        try:
            raise OSError(" ".join(told))
        except OSError as cause:
            raise error(" ".join(told)) from cause

    monkeypatch.setattr("acestep_ray.reporting.job.report", fail)
    assert cli.main(["report", "somewhere", *debug]) in (1, 2)
    said = capfd.readouterr()
    left = re.findall(r"\S*canary\S*", (said.out + said.err).lower())
    assert [each for each in left if "/canary_9.json" not in each] == []
    assert bool(debug) == ("Traceback" in said.err)


def test_texts_without_secrets_are_kept():
    for text in (
        "a basic author, tokenizer=x",
        "https://host/a?page=2&sort=name",
        "hf_short",
        "token of the page",
    ):
        assert without_secrets(text) == text


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD"])
def test_a_server_that_only_a_runs_folder_names_is_not_sent_a_password(tmp_path, monkeypatch, name):
    (tmp_path / "mlflow.json").write_text('{"tracking_uri": "http://127.0.0.1:9", "run_id": "1"}')
    monkeypatch.setenv(name, "canary")
    with pytest.raises(InputError, match=r"(?s)is not sent .*set MLFLOW_TRACKING_URI"):
        read_mlflow(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9/")
    with pytest.raises(InputError, match="does not tell of this run"):
        read_mlflow(tmp_path)


def test_a_cluster_of_our_own_has_a_token_no_dashboard_and_nothing_of_the_environment(monkeypatch):
    """Ray turns its token on for a local cluster, and leaves it to an explicit RAY_AUTH_MODE=disabled."""
    asked = {}
    monkeypatch.setattr(ray_runtime.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_runtime.ray, "init", lambda **options: asked.update(options))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as environment:
        environment.setattr(ray_runtime.os, "environ", variables := {})
        ray_runtime.connect()
    assert asked["address"] == "local"
    assert asked["include_dashboard"] is False
    assert "runtime_env" not in asked
    assert variables.keys() == {"RAY_AUTH_TOKEN", "RAY_COLOR_PREFIX"}
    assert len(bytes.fromhex(variables["RAY_AUTH_TOKEN"])) == 32


def test_the_error_of_a_cluster_that_does_not_answer_holds_none(secrets, monkeypatch):
    def refuse(**_):
        raise ConnectionError(f"no answer for {SECRETS['RAY_AUTH_TOKEN']}")

    monkeypatch.setattr(ray_runtime.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_runtime.ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(InputError) as told:
        ray_runtime.connect()
    findings = [judge_token("10.0.0.1:6379", is_open=is_open).render() for is_open in (True, False)]
    assert_without(secrets, ((text, text.encode()) for text in [str(told.value), *findings]))
