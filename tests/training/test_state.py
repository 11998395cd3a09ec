"""Checkpoints bring a run back exactly, and are there whole or not at all."""

from __future__ import annotations

import pytest
import torch

from acestep_ray.diffusion.objective import flow_matching_losses
from acestep_ray.errors import AceStepError
from acestep_ray.export.lora import LORA_FILE
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.training import state as state_module
from acestep_ray.training.lora import add_lora
from acestep_ray.training.optim import build_optimizer, set_learning_rate
from acestep_ray.training.state import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    trainable_parameters,
)
from tests.models.test_padding import CONFIG, pad, random_song


def new_run(rank=4):
    torch.manual_seed(0)
    model = ACEStepTransformer(CONFIG)
    add_lora(model, {"r": rank, "target_modules": ["to_q", "to_v"]})
    optimizer = build_optimizer(trainable_parameters(model).values(), weight_decay=0.01)
    set_learning_rate(optimizer, 1e-2)
    return model, optimizer


def take_step(model, optimizer, song):
    flow_matching_losses(model, pad([random_song(song)], 0.0, dropout=True)).total(1.0).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_resumed_run_is_the_same_run(tmp_path):
    model, optimizer = new_run()
    for song in (0, 1):
        take_step(model, optimizer, song)
    save_checkpoint(tmp_path, model, optimizer, TrainingState(2, {"fixed_noise": {}}))
    resumed, resumed_optimizer = new_run()
    state = load_checkpoint(latest_checkpoint(tmp_path), resumed, resumed_optimizer)
    assert state.step == 2
    for run in ((model, optimizer), (resumed, resumed_optimizer)):
        take_step(*run, song=3)
    for name, parameter in trainable_parameters(model).items():
        assert torch.equal(parameter, trainable_parameters(resumed)[name]), name


def test_it_holds_what_is_trained_and_never_the_frozen_model(tmp_path):
    model, optimizer = new_run()
    take_step(model, optimizer, 0)
    path = save_checkpoint(tmp_path, model, optimizer, TrainingState(1, {}))
    size = sum(file.stat().st_size for file in path.iterdir())
    trained = sum(p.numel() for p in trainable_parameters(model).values()) * 4
    assert (path / LORA_FILE).is_file()
    assert size < 4 * trained + 40_000 < sum(p.numel() for p in model.parameters()) * 4


def test_the_latest_is_that_of_the_highest_step_and_never_a_partial_one(tmp_path, monkeypatch):
    model, optimizer = new_run()
    take_step(model, optimizer, 0)
    for step in (9, 10):
        save_checkpoint(tmp_path, model, optimizer, TrainingState(step, {}))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(state_module, "write_lora", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, model, optimizer, TrainingState(11, {}))
    assert latest_checkpoint(tmp_path).name == "step=10"


def test_a_checkpoint_of_another_lora_is_refused(tmp_path):
    model, optimizer = new_run(rank=4)
    take_step(model, optimizer, 0)
    path = save_checkpoint(tmp_path, model, optimizer, TrainingState(1, {}))
    with pytest.raises(AceStepError, match="other trained parameters"):
        load_checkpoint(path, *new_run(rank=8))
