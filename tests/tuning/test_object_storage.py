"""A search of which everything is in object storage."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO

import pyarrow.parquet as pq
import pytest
import yaml

from acestep_ray import cli
from acestep_ray.config import TuneConfig
from acestep_ray.errors import InputError
from acestep_ray.export.info import info
from acestep_ray.storage import Store
from acestep_ray.tuning.job import tune
from acestep_ray.tuning.records import DONE, UNFINISHED, Records, check_same_search


@pytest.mark.ray
@pytest.mark.faults
def test_a_search_in_object_storage_is_continued_from_there(two_cpus, checkpoint, problem, s3, tmp_path):
    place = Store.at(s3.fresh())
    config = TuneConfig(
        dataset_path=str(problem),
        checkpoint_dir=str(checkpoint.path),
        exp_name="search",
        exp_dir=place.url_of("exps"),
        logger_dir=place.url_of("logs"),
        tracking_uri="none",
        search_rank="choice(2, 4)",
        search_learning_rate="1e-3",
        search_targets="attention",
        search_ssl_coeff="0",
        max_steps=2,
        val_check_interval=1,
        val_songs=2,
        trials=1,
        batch_size=4,
        precision="32",
        num_workers=0,
        device="cpu",
        ssl_coeff=0.0,
        cpus_per_trial=2.0,
    )
    summary = tune(config)
    search = place.child("exps/search")
    assert summary.best == search.child("best")
    names = set(search.names())
    assert {"search.json", "trials.parquet", "report/index.html", "best/lora_config.json"} <= names
    assert {"trials/trial-0000/trial.json", "trials/trial-0000/checkpoints/step=2/state.json"} <= names
    assert not [name for name in names if name.startswith((".", "ray/"))]
    assert [name for name in place.names("logs") if "events.out.tfevents" in name]

    values = yaml.safe_load(search.read_bytes("best/train.yaml"))
    assert values["lora_config_path"] == search.url_of("best/lora_config.json")
    again = cli.build_parser().parse_args(["train", "--config", search.url_of("best/train.yaml")])
    assert again.train.learning_rate == 1e-3
    assert info(search.url_of("best")).loras

    more = tune(replace(config, trials=2, scheduler="none"))
    assert [row["state"] for row in more.trials] == [DONE, DONE]
    table = pq.read_table(BytesIO(search.read_bytes("trials.parquet"))).to_pylist()
    assert {row["trial"] for row in table} == {"trial-0000", "trial-0001"}
    assert table[0]["checkpoint"].startswith(search.url)


def test_what_is_known_of_trials_is_read_back_from_there(s3):
    search = Store.at(s3.fresh())
    records = Records(search)
    name = records.add({"rank": 4}).name
    records.note(name, {"step": 4, "validation": 0.8, "train": 0.5})
    records.add({"rank": 8})
    records.end(name, DONE)
    found = Records(search)
    assert [(one.params["rank"], one.state) for one in found] == [(4, DONE), (8, UNFINISHED)]
    assert found[name].validations == [{"step": 4, "validation": 0.8, "train": 0.5}]
    search.write_bytes("trials/trial-0000/trial.json", b"{")
    with pytest.raises(InputError, match=f"does not read(?s:.*){search.url}/trials/trial-0000/trial.json"):
        Records(search)


def test_another_search_in_the_same_place_is_refused(s3):
    search = Store.at(s3.fresh())
    check_same_search(search, {"--max_steps": 8})
    check_same_search(search, {"--max_steps": 8})
    assert json.loads(search.read_bytes("search.json")) == {"--max_steps": 8}
    with pytest.raises(InputError, match=rf"{search.url}(?s:.*)--max_steps: 8 → 9"):
        check_same_search(search, {"--max_steps": 9})


def test_mlflows_own_database_is_not_looked_for_in_object_storage(checkpoint, problem, s3):
    place = s3.fresh()
    config = TuneConfig(
        dataset_path=str(problem),
        checkpoint_dir=str(checkpoint.path),
        exp_dir=place,
        logger_dir=place,
        search_rank="choice(2, 4)",
    )
    with pytest.raises(InputError, match=r"--logger_dir s3://(?s:.*)--tracking_uri"):
        tune(config)
