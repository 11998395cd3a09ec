"""A tiny checkpoint, models trained on it, and the folder of a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from acestep_ray.config import TrainConfig
from acestep_ray.export.lora import lora_files
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.storage import Store
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from acestep_ray.tracking import Tracker
from acestep_ray.training.experiment import note_identity, run_identity
from acestep_ray.training.lora import add_lora
from acestep_ray.training.lora_config import DEFAULT_LORA
from acestep_ray.training.state import Checkpoints, TrainingState, take_snapshot

CONVOLUTIONS = ["inverted_conv.conv", "point_conv.conv"]
RSLORA = {**DEFAULT_LORA, "r": 8, "lora_alpha": 4, "use_rslora": True}
PATTERNS = {
    **DEFAULT_LORA,
    "r": 4,
    "lora_alpha": 10,
    "target_modules": [*DEFAULT_LORA["target_modules"], *CONVOLUTIONS],
    "rank_pattern": {"cross_attn.to_q": 2, "point_conv.conv": 3},
    "alpha_pattern": {"to_k": 1},
}
DORA = {**PATTERNS, "use_dora": True}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> CheckpointDir:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def trained(checkpoint):
    """Gives a model whose adapters have learned something, always the same one for a configuration and seed."""
    models: dict[str, ACEStepTransformer] = {}

    def train(lora: dict, seed: int = 1) -> ACEStepTransformer:
        name = f"{json.dumps(lora)} {seed}"
        if name not in models:
            models[name] = new(lora, seed)
        return models[name]

    def new(lora: dict, seed: int) -> ACEStepTransformer:
        model = checkpoint.load_transformer()
        names = add_lora(model, lora)
        generator = torch.Generator().manual_seed(seed)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name in names:
                noise = torch.randn(parameters[name].shape, generator=generator)
                old = parameters[name]
                old.copy_(old * (1 + 0.3 * noise) if "magnitude" in name else 0.1 * noise)
        return model.eval()

    return train


@pytest.fixture
def write_run(tmp_path, checkpoint):
    """Writes the folder of a run with these models as its checkpoints by step; returns it."""

    def write(
        models: dict[int, torch.nn.Module], lora: dict | None, name: str = "my_run", **settings
    ) -> Path:
        experiment = tmp_path / "exps" / name
        checkpoints = Checkpoints(Store.at(experiment / "checkpoints"))
        config = TrainConfig(
            dataset_path=settings.pop("dataset_path", str(tmp_path / "moved")),
            checkpoint_dir=str(checkpoint.path),
            lora_config_path="lora_config.json",
            exp_name=name,
            logger_dir=str(tmp_path / "exps" / "logs"),
            **settings,
        )
        measured = {}
        for step, model in models.items():
            measured[str(step)] = 2.0 - step / 100 if step < 30 else 5.0
            files = lora_files(model) if lora is not None else {}
            state = TrainingState(step, {"fixed_noise": dict(measured), "validation": dict(measured)})
            checkpoints.save(take_snapshot(model, torch.optim.SGD([torch.zeros(1)]), files), state)
        checkpoints.finish()
        (experiment / "train.yaml").write_text(yaml.safe_dump(asdict(config)), encoding="utf-8")
        fingerprint = checkpoint.fingerprint("transformer")
        note_identity(experiment, run_identity(config, lora, songs="s", transformer=fingerprint))
        tracker = Tracker(Path(config.logger_dir) / name, None)
        tracker.log({step: {"loss": 3.0 - step / 50} for step in range(max(models) + 1)})
        tracker.close()
        return experiment

    return write


@torch.no_grad()
def velocity(model: ACEStepTransformer) -> torch.Tensor:
    """What the model makes of fixed random latents and conditioning, (2, 8, 16, 24)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    condition = {
        "text": normal(2, 5, model.config.text_embedding_dim),
        "text_mask": torch.ones(2, 5, dtype=torch.bool),
        "speaker": normal(2, model.config.speaker_embedding_dim),
        "lyric_ids": torch.randint(1, 64, (2, 7), generator=generator),
        "lyric_mask": torch.ones(2, 7, dtype=torch.bool),
    }
    return model.eval()(normal(2, 8, 16, 24), torch.tensor([300.0, 800.0]), **condition).velocity


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """As a share of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
