"""Passes as CUDA graphs, with a stand-in for what records, so that no GPU is needed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from acestep_ray.cache.index import CacheIndex
from acestep_ray.training import passes, step
from acestep_ray.training.passes import CapturedLosses, CapturedPasses, Recordings, filled_up
from acestep_ray.training.settings import WorkerPlace
from acestep_ray.training.state import TrainingState
from acestep_ray.training.step import Learner, can_capture, has_dropout
from acestep_ray.training.validation import FIXED_NOISE, VALIDATION
from acestep_ray.training.worker import Trainer, build_plan
from tests.training.conftest import (
    SECONDS,
    Killed,
    assert_close_weights,
    assert_same_weights,
    kill_at,
    latest_weights,
    settings_in,
    short_run,
    train_alone,
)

ALONE = WorkerPlace(rank=0, workers=1, device=torch.device("cpu"))


@dataclass
class Memory:
    """Of a device that is half free."""

    share: float = 0.5

    def left(self) -> float:
        return self.share


class Rerun:
    """Stands for a recording: the function again, over its own copies of the inputs, with outputs in one place."""

    made = 0

    def __init__(self, function, inputs, memory):
        Rerun.made += 1
        self.function = function
        self.inputs = [given.clone() for given in inputs]
        self.outputs: list[torch.Tensor] = []
        self.bytes = 1000

    def __call__(self, *inputs):
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        found = self.function(*self.inputs)
        self.outputs = self.outputs or [torch.empty_like(values) for values in found]
        for own, values in zip(self.outputs, found, strict=True):
            own.copy_(values)
        return self.outputs


@pytest.fixture(autouse=True)
def count_from_zero():
    Rerun.made = 0


@pytest.fixture
def settings(checkpoint, tiny_cache, tmp_path):
    config = short_run(checkpoint, tiny_cache, max_steps=7, every_n_train_steps=3, accumulate_grad_batches=2)
    return settings_in(tmp_path / "run", config, samples=None)


@pytest.fixture
def captures(monkeypatch):
    """Lets every run take stand-ins for recordings."""
    monkeypatch.setattr(step, "can_capture", lambda *_: True)
    monkeypatch.setattr(step, "Recordings", stand_ins)


def stand_ins(say=lambda line: None, capture=Rerun, memory=Memory) -> Recordings:
    return Recordings(say, capture, memory)


def with_stand_ins(losses_of, trained, *arguments, **named) -> CapturedPasses:
    return CapturedPasses(losses_of, trained, stand_ins(*arguments, **named))


@pytest.fixture
def trainer(settings):
    with Trainer(settings, ALONE, lambda metrics, place: None, lambda line: None) as trainer:
        yield trainer


def batches_of(trainer, count: int):
    """The first micro-batches of a run, songs of several lengths."""
    plan, source = trainer.plan, trainer.source
    items = [item for number in range(count) for item in plan.step(number)][:count]
    return [trainer.make_batch(item, [source.read(row) for row in item.songs]) for item in items]


def gradients(learner, run, batches) -> list[torch.Tensor | None]:
    """What is left in the parameters after these passes."""
    learner.optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        run(batch, 0.25)
    return [None if p.grad is None else p.grad.clone() for p in learner.trained]


def assert_same_gradients(found, expected, tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


def test_recorded_passes_give_the_losses_and_the_gradients_of_launched_ones(trainer):
    learner, batches = trainer.learner, batches_of(trainer, 9)
    captured = with_stand_ins(learner.losses_of, learner.trained)
    for _ in range(3):
        captured.begin()
        found = gradients(learner, captured, batches)
    expected = gradients(learner, learner.add_gradients, batches)
    assert_same_gradients(found, expected)
    assert any(grad is not None and grad.any() for grad in found)
    for batch in batches:
        learner.optimizer.zero_grad(set_to_none=True)
        mine, theirs = captured(batch, 1.0), learner.add_gradients(batch, 1.0)
        assert mine.keys() == theirs.keys()
        for name, values in mine.items():
            torch.testing.assert_close(values, theirs[name], rtol=1e-5, atol=1e-6)
    assert 0 < Rerun.made == len(captured.recordings)


def test_a_kind_of_batch_is_recorded_when_it_comes_again_and_never_twice(trainer):
    learner = trainer.learner
    captured = with_stand_ins(learner.losses_of, learner.trained)
    batch, *_ = batches_of(trainer, 1)
    made = []
    for _ in range(4):
        captured(batch, 1.0)
        made.append(Rerun.made)
    assert made == [0, 1, 1, 1]
    assert captured.recordings.bytes == 1000
    # As long as before once it is filled up, but with other strides between its features.
    other = replace(batch, ssl={name: replace(t, stride=t.stride + 1) for name, t in batch.ssl.items()})
    captured(other, 1.0)
    captured(other, 1.0)
    assert Rerun.made == 2


def test_losses_of_a_recording_are_the_callers_own(trainer):
    learner = trainer.learner
    captured = with_stand_ins(learner.losses_of, learner.trained)
    batch, *_ = batches_of(trainer, 1)
    for _ in range(2):
        captured(batch, 1.0)
    kept = captured(batch, 1.0)["loss"]
    before = kept.clone()
    captured(replace(batch, noise=2 * batch.noise), 1.0)
    assert torch.equal(kept, before)


def test_no_more_are_recorded_than_fit(trainer, monkeypatch):
    monkeypatch.setattr(passes, "MAX_RECORDINGS", 0)
    learner = trainer.learner
    captured = with_stand_ins(learner.losses_of, learner.trained)
    for batch in batches_of(trainer, 1) * 3:
        captured(batch, 1.0)
    assert Rerun.made == 0


def test_recorded_validations_give_the_losses_of_launched_ones_as_the_weights_change(trainer):
    learner, batches = trainer.learner, batches_of(trainer, 4)
    captured = CapturedLosses(learner.denoising_losses, stand_ins())
    with learner.validating(), torch.no_grad():
        for _ in range(3):
            for parameter in learner.trained:
                parameter.add_(0.02)
            for batch in batches:
                torch.testing.assert_close(
                    captured(batch), learner.denoising_losses(batch), rtol=1e-5, atol=1e-6
                )
        kept = captured(batches[0])
        before = kept.clone()
        captured(replace(batches[0], noise=2 * batches[0].noise))
    assert torch.equal(kept, before)
    assert Rerun.made == len(captured.recordings) > 1


def test_training_and_validation_are_recorded_apart(trainer):
    learner = trainer.learner
    captured = with_stand_ins(learner.losses_of, learner.trained)
    validation = CapturedLosses(learner.denoising_losses, captured.recordings)
    batch, *_ = batches_of(trainer, 1)
    with learner.validating(), torch.no_grad():
        validation(batch)
    captured.begin()
    captured(batch, 1.0)
    assert Rerun.made == 0
    captured(batch, 1.0)
    assert Rerun.made == 1
    with learner.validating(), torch.no_grad():
        validation(batch)
    assert Rerun.made == 2


def test_no_autocast_is_around_several_passes_of_a_validation(settings):
    """It would keep weights in bfloat16 from one pass to the next, and a recording would read what it kept."""
    seen = []

    def losses_of(batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        return torch.zeros(len(batch.sigmas))

    settings = replace(settings, config=replace(settings.config, precision="bf16-mixed"))
    with Trainer(settings, ALONE, lambda metrics, place: None, lambda line: None) as trainer:
        trainer.learner.validation_losses = losses_of
        trainer.validate(TrainingState(step=0, losses={FIXED_NOISE: {}, VALIDATION: {}}))
    assert seen
    assert not any(seen)


def test_what_no_loss_depends_on_has_no_gradient(trainer):
    learner, unused = trainer.learner, torch.nn.Parameter(torch.ones(3))
    captured = with_stand_ins(learner.losses_of, [unused, *learner.trained])
    for _ in range(3):
        captured.begin()
        gradients(learner, captured, batches_of(trainer, 1))
    assert Rerun.made == 1
    assert unused.grad is None
    assert all(p.grad is not None for p in learner.trained)


# --- filling up --------------------------------------------------------------------------------------------------


def test_filling_up_changes_no_loss(trainer):
    (batch, *_) = batches_of(trainer, 1)
    full = filled_up(batch)
    assert full.latents.shape[-1] % passes.FRAME_STEP == full.text.shape[1] % passes.TEXT_STEP == 0
    assert full.lyric_ids.shape[1] % passes.LYRIC_STEP == 0
    assert all(target.features.shape[1] % passes.SSL_STEP == 0 for target in full.ssl.values())
    assert not full.frame_mask[:, batch.latents.shape[-1] :].any()
    for start in (batch, replace(batch, lyric_start=None)):
        expected = trainer.learner.losses_of(start)
        for name, values in trainer.learner.losses_of(filled_up(start)).items():
            torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("frames", "filled"),
    [(1, 128), (128, 128), (129, 256), (2560, 2560), (2561, 2584), (2584, 2584), (2585, 2688)],
)
def test_songs_of_the_longest_length_are_left_as_they_are(trainer, frames, filled):
    (batch, *_) = batches_of(trainer, 1)
    one = replace(
        batch,
        latents=torch.zeros(1, 8, 16, frames),
        noise=torch.zeros(1, 8, 16, frames),
        frame_mask=torch.ones(1, frames, dtype=torch.bool),
    )
    full = filled_up(one)
    assert full.latents.shape[-1] == full.noise.shape[-1] == full.frame_mask.shape[-1] == filled
    assert full.frame_mask.sum() == frames


# --- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "too little GPU memory"),
        (RuntimeError("operation not permitted when stream is capturing\nmore"), "operation not permitted"),
    ],
)
def test_what_cannot_be_recorded_is_told_once_and_launched(trainer, error, told):
    def fail(*_):
        raise error

    said: list[str] = []
    learner, batches = trainer.learner, batches_of(trainer, 4)
    captured = with_stand_ins(learner.losses_of, learner.trained, said.append, fail)
    for _ in range(3):
        captured.begin()
        found = gradients(learner, captured, batches)
    assert_same_gradients(found, gradients(learner, learner.add_gradients, batches))
    (line,) = said
    assert "CUDA graphs are off" in line
    assert told in line
    assert "more" not in line
    assert not captured.recordings.release()


def test_recordings_leave_memory_to_others(trainer):
    said: list[str] = []
    learner, batches = trainer.learner, batches_of(trainer, 4)
    captured = with_stand_ins(learner.losses_of, learner.trained, said.append, memory=lambda: Memory(0.1))
    for _ in range(3):
        captured.begin()
        found = gradients(learner, captured, batches)
    assert Rerun.made == len(said) == 1
    assert not captured.recordings
    assert_same_gradients(found, gradients(learner, learner.add_gradients, batches))


def test_a_validation_that_finds_no_memory_does_without_recordings(trainer):
    learner, calls = trainer.learner, []
    batch, *_ = batches_of(trainer, 1)

    def fail_third(given):
        calls.append(given)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return learner.denoising_losses(given)

    captured = CapturedLosses(fail_third, stand_ins())
    with learner.validating(), torch.no_grad():
        found = [captured(batch) for _ in range(3)]
        assert len(calls) == 4
        assert not captured.recordings.recordings
        for losses in found:
            torch.testing.assert_close(losses, learner.denoising_losses(batch), rtol=1e-5, atol=1e-6)
        calls[:] = [batch] * 2
        with pytest.raises(torch.OutOfMemoryError):
            captured(batch)


def test_a_step_that_finds_no_memory_begins_again_without_recordings(captures, trainer):
    """It fails in its second pass, when the first has added its gradients."""
    learner = trainer.learner
    micro_batches = [batches_of(trainer, 4)[0:2], batches_of(trainer, 4)[0:2]]
    for batches in micro_batches:
        learner.accumulate_gradients(0, batches, 2)
        assert learner.captured.recordings or Rerun.made == 0
    assert learner.captured.recordings
    launch, calls = learner.captured.losses_of, []

    def fail_once(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return launch(batch)

    learner.captured.losses_of = fail_once
    found, _ = learner.accumulate_gradients(0, micro_batches[0], 2)
    mine = [p.grad.clone() for p in learner.trained]
    assert len(calls) == 4
    assert not learner.captured.recordings

    learner.captured = None
    learner.optimizer.zero_grad(set_to_none=True)
    expected, _ = learner.accumulate_gradients(0, micro_batches[0], 2)
    assert_same_gradients(mine, [p.grad for p in learner.trained])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def fail(batch, share):
        raise torch.OutOfMemoryError

    learner.add_gradients = fail
    with pytest.raises(torch.OutOfMemoryError):
        learner.accumulate_gradients(0, micro_batches[0], 2)


# --- runs --------------------------------------------------------------------------------------------------------


def test_a_run_with_recordings_is_the_run_without(settings, tmp_path, monkeypatch):
    plain = replace(settings, checkpoints=type(settings.checkpoints).at(tmp_path / "plain"))
    expected, ended = train_alone(plain), []
    monkeypatch.setattr(step, "can_capture", lambda *_: True)
    monkeypatch.setattr(step, "Recordings", stand_ins)
    monkeypatch.setattr(Recordings, "forget", lambda self: ended.append(len(self)))
    found = train_alone(settings)
    assert ended == [Rerun.made]
    assert Rerun.made > 0
    assert found["last"] == pytest.approx(expected["last"], rel=1e-4)
    assert_close_weights(latest_weights(settings), latest_weights(plain))


def test_a_run_with_recordings_that_was_killed_goes_on_as_if_it_had_not_been(settings, tmp_path, captures):
    """What the first run has recorded, the second one launches first: that must make no difference."""
    with pytest.raises(Killed):
        train_alone(settings, kill_at(3))
    train_alone(settings)
    whole = replace(settings, checkpoints=type(settings.checkpoints).at(tmp_path / "whole"))
    train_alone(whole)
    assert_same_weights(settings, whole)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"cuda_graphs": False}, False),
        ({"batch_size": 900}, False),
        ({"batch_frames": passes.MAX_FRAMES}, True),
        ({"batch_frames": passes.MAX_FRAMES + 1}, False),
        ({"activation_checkpointing": 1.0}, True),
        ({"lora_dropout": 0.1}, True),
        ({"lora_dropout": 0.1, "activation_checkpointing": 1.0}, False),
        ({"lora": None}, False),
        ({"workers": 2}, False),
        ({"fused": False}, False),
    ],
)
def test_where_passes_are_recorded(settings, tiny_cache, change, expected):
    of_config = {name: value for name, value in change.items() if hasattr(settings.config, name)}
    config = replace(settings.config, **of_config)
    lora = None if "lora" in change else {**settings.lora, "lora_dropout": change.get("lora_dropout", 0.0)}
    settings = replace(settings, config=config, lora=lora)
    cpu = torch.device("cpu")
    place = WorkerPlace(rank=0, workers=1, device=cpu)
    plan = build_plan(CacheIndex.open(tiny_cache).latent_frames, config)
    transformer = Learner(settings, place, plan).transformer
    assert transformer.draws_in_blocks == has_dropout(transformer) == ("lora_dropout" in change)
    if change.get("fused", True):
        transformer.prepare = lambda *given: given  # as a fused model has one
    place = replace(place, workers=change.get("workers", 1))
    assert can_capture(transformer, settings, place, plan) is expected


def test_the_lengths_of_these_songs_differ():
    """Or the tests above would record one kind of batch."""
    assert len(set(SECONDS.values())) > 2
