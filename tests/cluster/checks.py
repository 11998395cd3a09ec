"""What a job on several nodes has made, beside what one process makes."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from acestep_ray.cache.index import CacheIndex
from acestep_ray.config import TrainConfig
from acestep_ray.training.holdout import hold_out, recordings_of_cache
from tests.training.conftest import settings_in, train_alone


def check_winner(search: Path, scratch: Path) -> None:
    """The settings of a search's winner, trained again here, give the loss that the search has found."""
    found = TrainConfig(**yaml.safe_load((search / "best" / "train.yaml").read_text(encoding="utf-8")))
    lora = json.loads(Path(found.lora_config_path).read_text(encoding="utf-8"))
    row = pq.read_table(search / "trials.parquet").to_pylist()[0]
    recordings = recordings_of_cache(CacheIndex.open(found.dataset_path))
    held_out = tuple(hold_out(recordings, found.val_songs).tolist())
    losses = train_alone(settings_in(scratch, found, lora=lora, samples=None, held_out=held_out))
    assert losses["validation"][str(row["best_step"])] == pytest.approx(row["validation"], rel=1e-5)
