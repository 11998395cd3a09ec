"""Several workers train what one does, however they share the model. Plain processes: Ray would add nothing here."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from acestep_ray.training.samples import SAMPLER
from acestep_ray.training.settings import WorkerPlace, WorkerSettings
from acestep_ray.training.state import Checkpoints
from acestep_ray.training.worker import train_worker
from tests.training.conftest import (
    assert_close_weights,
    latest_weights,
    settings_in,
    short_run,
    train_alone,
)

# Three songs, one in a micro-batch, three of them in a step: two workers have two and one.
MICRO_BATCHES = 3


@pytest.fixture
def config(checkpoint, tiny_cache):
    return short_run(
        checkpoint,
        tiny_cache,
        learning_rate=3e-4,
        max_steps=4,
        accumulate_grad_batches=MICRO_BATCHES,
        every_n_train_steps=2,
    )


class AsksAt:
    """Asks in its n-th step and from then on."""

    def __init__(self, step: int):
        self.step = step
        self.looked = 0

    def __call__(self) -> bool:
        self.looked += 1
        return self.looked >= self.step


def work(rank: int, workers: int, rendezvous: str, runs: list[tuple[WorkerSettings, dict]]) -> None:
    """One process: its part of every run, one after another; the second of each pair are fields of `WorkerPlace`."""
    torch.set_num_threads(1)
    SAMPLER["steps"] = 2
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=workers)
    for settings, asks in runs:
        place = WorkerPlace(rank, workers, torch.device("cpu"), **asks)
        train_worker(settings, place, report=lambda metrics, checkpoint: None, say=lambda line: None)
    torch.distributed.destroy_process_group()


def train_together(tmp_path, workers: int, runs: list[tuple[WorkerSettings, dict]]) -> None:
    """Train these runs with that many processes."""
    rendezvous = f"file://{tmp_path}/rendezvous-{workers}"
    torch.multiprocessing.spawn(work, (workers, rendezvous, runs), nprocs=workers)


def losses_of(settings: WorkerSettings) -> dict:
    return Checkpoints(settings.checkpoints).latest_state()["losses"]


def assert_same_run(found: WorkerSettings, expected: WorkerSettings) -> None:
    """The same losses to 1e-5 and the same weights as far as sums in another order allow."""
    found_losses, expected_losses = losses_of(found), losses_of(expected)
    for name in ("first", "last"):
        assert found_losses[name] == pytest.approx(expected_losses[name], rel=1e-5), name
    for name in ("fixed_noise", "validation"):
        assert found_losses[name] == pytest.approx(expected_losses[name], rel=1e-5), name
    assert_close_weights(latest_weights(found), latest_weights(expected))


@pytest.mark.faults
def test_runs_on_two_workers_and_then_on_three_are_the_run_on_one(config, tmp_path):
    lora = {"r": 4, "lora_dropout": 0.1, "target_modules": ["to_q", "linear_k", "speaker_embedder"]}
    alone = {
        name: settings_in(tmp_path / name, config, lora=its) for name, its in (("lora", lora), ("all", None))
    }
    optimizer = "adamw" if find_spec("torchao") is None else "adamw-8bit"
    quantised = replace(config, quantize_base="int8", optimizer=optimizer)
    alone["quantised"] = settings_in(tmp_path / "quantised", quantised, lora=lora)
    for settings in alone.values():
        train_alone(settings)
    offloaded = replace(config, cpu_offload=True)
    together = {
        "lora": settings_in(tmp_path / "lora-together", config, lora=lora),
        "all": settings_in(tmp_path / "all-together", config, lora=None),
        "offloaded": settings_in(tmp_path / "offloaded", offloaded, lora=None),
        "quantised": settings_in(tmp_path / "quantised-together", quantised, lora=lora),
    }
    longer = replace(config, max_steps=6, every_n_train_steps=100)
    stopped = settings_in(tmp_path / "stopped", longer, lora=lora)
    saved = settings_in(tmp_path / "saved", longer, lora=lora)

    runs = [(settings, {}) for settings in together.values()]
    runs += [(stopped, {"asked_to_stop": AsksAt(3)}), (saved, {"asked_to_save": AsksAt(5)})]
    train_together(tmp_path, 2, runs)
    assert_same_run(together["lora"], alone["lora"])
    assert_same_run(together["all"], alone["all"])
    assert_same_run(together["offloaded"], alone["all"])
    assert_same_run(together["quantised"], alone["quantised"])
    assert Checkpoints(stopped.checkpoints).steps() == [3]
    assert Checkpoints(saved.checkpoints).steps() == [5, 6]

    # Back to the second step, as after a loss of everything later, and on with one more worker.
    for name in ("lora", "all"):
        Checkpoints(together[name].checkpoints).folder(4).delete(["state.json"])
        assert Checkpoints(together[name].checkpoints).steps() == [2]
    train_together(tmp_path, 3, [(together["lora"], {}), (together["all"], {})])
    for name in ("lora", "all"):
        assert_same_run(together[name], alone[name])
