"""What is left of a search: table, page, pictures, and the winner's files."""

from __future__ import annotations

import json
import re

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from acestep_ray.config import TrainConfig
from acestep_ray.storage import Store
from acestep_ray.tuning.records import DONE, FAILED, STOPPED, Records
from acestep_ray.tuning.report import (
    PAGE_FILE,
    TABLE_FILE,
    TuneSummary,
    trial_rows,
    write_best,
    write_report,
    write_table,
)


@pytest.fixture
def records(tmp_path) -> Records:
    """Four trials: two ways of alpha, one stopped, one that failed, and checkpoints of the second."""
    found = Records(tmp_path / "search")
    for rank, alpha, state, losses in (
        (4, "r", STOPPED, [0.9]),
        (64, "2r", DONE, [0.8, 0.4, 0.5]),
        (16, 32.0, DONE, [0.85, 0.6, 0.55]),
        (8, "r", FAILED, []),
    ):
        record = found.add({"rank": rank, "alpha": alpha, "learning_rate": 1e-4 * rank})
        for number, value in enumerate(losses):
            step = 4 * (number + 1)
            found.note(record.name, {"step": step, "validation": value, "train": value - 0.25})
        found.end(record.name, state, "out of <memory>" if state == FAILED else None)
    write_checkpoints(found)
    return found


def test_what_was_saved_and_never_reported_is_in_the_record(tmp_path):
    records = Records(tmp_path / "search")
    records.add({"rank": 4})
    name = records.add({"rank": 8}).name
    records.note(name, {"step": 4, "validation": 0.8, "train": 0.55})
    write_checkpoints(records)
    records.end(name, DONE)
    found = Records(tmp_path / "search")[name].validations
    assert [(one["step"], one["validation"], one["train"]) for one in found] == [
        (4, 0.8, 0.55),
        (8, 0.4, 0.15),
        (12, 0.5, 0.25),
    ]


def write_checkpoints(records: Records) -> None:
    """The last and the best checkpoint of the second trial, as a run with `keep_last` 1 leaves them."""
    store = records.folder.child("trials/trial-0001/checkpoints")
    losses = {
        "validation": {"0": 1.0, "4": 0.8, "8": 0.4, "12": 0.5},
        "fixed_noise": {"0": 0.95, "4": 0.55, "8": 0.15, "12": 0.25},
    }
    for step in (8, 12):
        folder = store.child(f"step={step}")
        state = {"format": 2, "step": step, "losses": losses, "files": {}}
        folder.write_bytes("pytorch_lora_weights.safetensors", f"of step {step}".encode())
        folder.write_bytes("state.json", json.dumps(state).encode())


def test_the_table_has_every_trial_the_best_first(records, tmp_path):
    write_table(trial_rows(records), tmp_path / TABLE_FILE)
    rows = pq.read_table(tmp_path / TABLE_FILE).to_pylist()
    assert [row["trial"] for row in rows] == ["trial-0001", "trial-0002", "trial-0000", "trial-0003"]
    best = rows[0]
    assert (best["rank"], best["alpha"], best["validation"], best["best_step"]) == (64, "2r", 0.4, 8)
    assert [one["step"] for one in best["validations"]] == [4, 8, 12]
    assert best["checkpoint"].endswith("trial-0001/checkpoints/step=8")
    assert rows[1]["alpha"] == "32.0"
    assert rows[-1]["error"] == "out of <memory>"


def test_the_gap_is_what_was_learned_by_heart_since_the_start(records):
    # 0.4 − 0.15 at the best step, and 1.0 − 0.95 before the first.
    assert records.gap(records["trial-0001"]) == pytest.approx(0.2)
    assert records.gap(records["trial-0000"]) is None


def test_the_page_needs_no_other_file(records, tmp_path):
    write_report(tmp_path / "report", trial_rows(records), records, "  rank  log2int(4, 64)")
    page = (tmp_path / "report" / PAGE_FILE).read_text(encoding="utf-8")
    assert len(re.findall(r'src="data:image/(?:png|webp);base64,[A-Za-z0-9+/=]{1000,}"', page)) == 2
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "out of &lt;memory&gt;" in page
    assert page.index("trial-0001") < page.index("trial-0002") < page.index("trial-0003")
    for picture in (tmp_path / "report").glob("*.png"):
        with Image.open(picture) as image:
            assert image.width > 500
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_a_search_without_ranks_has_no_picture_of_them(tmp_path):
    records = Records(tmp_path / "search")
    for dropout in (0.0, 0.1):
        record = records.add({"dropout": dropout})
        records.note(record.name, {"step": 4, "validation": dropout, "train": 0.0})
        records.end(record.name, DONE)
    write_report(tmp_path / "report", trial_rows(records), records, "")
    assert [path.name for path in (tmp_path / "report").glob("*.png")] == ["parallel_coordinates.png"]


def test_a_search_in_which_all_failed_has_a_page_without_pictures(tmp_path):
    records = Records(tmp_path / "search")
    records.end(records.add({"rank": 4}).name, FAILED, "broken")
    write_report(tmp_path / "report", trial_rows(records), records, "")
    assert "broken" in (tmp_path / "report" / PAGE_FILE).read_text(encoding="utf-8")


def test_the_winner_has_its_best_lora_its_configuration_and_settings_that_read_back(records, tmp_path):
    config = TrainConfig(dataset_path="cache", checkpoint_dir="checkpoint", max_steps=12)
    write_best(
        Store.at(tmp_path / "best"), records.ranked()[0], records, config, {"r": 64, "lora_alpha": 128}
    )
    assert (tmp_path / "best" / "pytorch_lora_weights.safetensors").read_bytes() == b"of step 8"
    settings = yaml.safe_load((tmp_path / "best" / "train.yaml").read_text(encoding="utf-8"))
    found = TrainConfig(**settings)
    assert (found.dataset_path, found.max_steps) == ("cache", 12)
    with open(found.lora_config_path, encoding="utf-8") as file:
        assert json.load(file) == {"r": 64, "lora_alpha": 128}


def test_the_terminal_shows_trials_the_winner_and_what_failed(records, tmp_path):
    summary = TuneSummary(
        trials=trial_rows(records),
        space=["rank", "alpha", "learning_rate"],
        best=Store.at(tmp_path / "best"),
        folder=Store.at(tmp_path),
        tracking_uri=None,
        wall_seconds=61.0,
        retrained=None,
    )
    lines = summary.render().splitlines()
    assert lines[0].split() == [
        "trial",
        "rank",
        "alpha",
        "learning_rate",
        "steps",
        "validation",
        "gap",
        "state",
    ]
    assert lines[1].split() == ["trial-0001", "64", "2r", "0.0064", "12", "0.4", "0.2", "done"]
    assert "failed   trial-0003: out of <memory>" in lines
    assert "4 in 61 s" in summary.render()
    assert f"acestep-ray train --config {tmp_path / 'best' / 'train.yaml'}" in summary.render()
