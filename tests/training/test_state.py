"""Checkpoints bring a run back exactly, and are there whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import threading

import pytest
import torch

from acestep_ray.diffusion.objective import flow_matching_losses
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.export.lora import ADAPTER_NAME, lora_bytes
from acestep_ray.export.reading import LORA_FILE
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.storage import StorageError, Store
from acestep_ray.training import state as state_module
from acestep_ray.training.lora import add_lora
from acestep_ray.training.model import choose_trained
from acestep_ray.training.optim import build_optimizer, set_learning_rate, stored_parts
from acestep_ray.training.state import (
    OPTIMIZER_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    Checkpoints,
    TrainingState,
    best_step,
    locate_checkpoint,
    restore,
    take_snapshot,
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


def save(checkpoints: Checkpoints, model, optimizer, state: TrainingState) -> None:
    files = {LORA_FILE: lora_bytes(model, ADAPTER_NAME)}
    checkpoints.save(take_snapshot(model, optimizer, files), state)


def load_latest(checkpoints: Checkpoints, model, optimizer, warn) -> TrainingState | None:
    found = checkpoints.read_latest(model, warn)
    if found is None:
        return None
    restore(model, optimizer, found[1])
    return found[0]


def saved(store: Store, *steps: int, **options) -> Checkpoints:
    """Checkpoints of a run after one step, under these numbers."""
    model, optimizer = new_run()
    take_step(model, optimizer, 0)
    checkpoints = Checkpoints(store, **options)
    for step in steps:
        save(
            checkpoints,
            model,
            optimizer,
            TrainingState(step, {"fixed_noise": {"1": 3.0, "2": 1.0, "3": 2.0}}),
        )
    checkpoints.finish()
    return checkpoints


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> Store:
    return Store.at(tmp_path if request.param == "local" else f"memory://{tmp_path.name}")


def test_a_resumed_run_is_the_same_run(store, monkeypatch):
    write, training_goes_on = Store.write_bytes, threading.Event()

    def slow(self: Store, name: str, content) -> None:
        assert training_goes_on.wait(timeout=60)
        write(self, name, content)

    monkeypatch.setattr(Store, "write_bytes", slow)
    model, optimizer = new_run()
    for song in (0, 1):
        take_step(model, optimizer, song)
    checkpoints = Checkpoints(store)
    save(checkpoints, model, optimizer, TrainingState(2, {"fixed_noise": {}}))
    # What is written is the state at that step, whatever training does meanwhile.
    take_step(model, optimizer, song=3)
    training_goes_on.set()
    checkpoints.finish()
    resumed, resumed_optimizer = new_run()
    state = load_latest(Checkpoints(store), resumed, resumed_optimizer, pytest.fail)
    assert state.step == 2
    take_step(resumed, resumed_optimizer, song=3)
    for name, parameter in trainable_parameters(model).items():
        assert torch.equal(parameter, trainable_parameters(resumed)[name]), name


def new_full_run(optimizer_name: str):
    """A run of a feed-forward's own weights, some large enough for moments of eight bits and some not."""
    torch.manual_seed(0)
    model = ACEStepTransformer(CONFIG)
    choose_trained(model, "transformer_blocks.*.ff", with_ssl=True)
    optimizer = build_optimizer(trainable_parameters(model).values(), 0.01, optimizer_name)
    set_learning_rate(optimizer, 1e-3)
    return model, optimizer


def save_full_run(store: Store, optimizer_name: str):
    """Two steps of such a run, saved."""
    model, optimizer = new_full_run(optimizer_name)
    for song in (0, 1):
        take_step(model, optimizer, song)
    checkpoints = Checkpoints(store)
    checkpoints.save(take_snapshot(model, optimizer, {}), TrainingState(2, {}))
    checkpoints.finish()
    return model, optimizer


def states_of(model, optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as plain tensors."""
    return {
        f"{name}/{part}": tensor
        for name, parameter in trainable_parameters(model).items()
        for key, value in optimizer.state[parameter].items()
        for part, tensor in stored_parts(key, value).items()
    }


def in_32_bits(moment: torch.Tensor) -> torch.Tensor:
    return moment.dequantize() if hasattr(moment, "codes") else moment


@pytest.mark.torchao
def test_moments_of_eight_bits_come_back_bit_for_bit(store):
    model, optimizer = save_full_run(store, "adamw-8bit")
    resumed, resumed_optimizer = new_full_run("adamw-8bit")
    load_latest(Checkpoints(store), resumed, resumed_optimizer, pytest.fail)
    expected, found = states_of(model, optimizer), states_of(resumed, resumed_optimizer)
    assert {tensor.dtype for tensor in expected.values()} == {torch.uint8, torch.float32}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for run in ((model, optimizer), (resumed, resumed_optimizer)):
        take_step(*run, song=3)
    for name, parameter in trainable_parameters(model).items():
        assert torch.equal(parameter, trainable_parameters(resumed)[name]), name


@pytest.mark.torchao
@pytest.mark.parametrize(("before", "after"), [("adamw", "adamw-8bit"), ("adamw-8bit", "adamw")])
def test_another_optimizer_takes_the_moments_over_in_its_own_form(store, before, after):
    model, optimizer = save_full_run(store, before)
    resumed, resumed_optimizer = new_full_run(after)
    load_latest(Checkpoints(store), resumed, resumed_optimizer, pytest.fail)
    fresh, fresh_optimizer = new_full_run(after)
    take_step(fresh, fresh_optimizer, song=0)
    found, own_form = states_of(resumed, resumed_optimizer), states_of(fresh, fresh_optimizer)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in own_form.items()}
    parameters = zip(*(trainable_parameters(m).values() for m in (model, resumed)), strict=True)
    for wanted, parameter in parameters:
        for key in ("exp_avg", "exp_avg_sq"):
            expected = in_32_bits(optimizer.state[wanted][key])
            difference = in_32_bits(resumed_optimizer.state[parameter][key]) - expected
            assert difference.abs().max() <= 0.02 * expected.abs().max()
    take_step(resumed, resumed_optimizer, song=3)


def test_it_holds_what_is_trained_and_never_the_frozen_model(tmp_path):
    checkpoints = saved(Store.at(tmp_path), 1)
    path = checkpoints.folder(1).path
    size = sum(file.stat().st_size for file in path.iterdir())
    model, _ = new_run()
    trained = sum(p.numel() for p in trainable_parameters(model).values()) * 4
    assert (path / LORA_FILE).is_file()
    assert size < 4 * trained + 40_000 < sum(p.numel() for p in model.parameters()) * 4


def test_a_run_without_checkpoints_starts_from_nothing(store):
    assert load_latest(Checkpoints(store), *new_run(), pytest.fail) is None
    assert Checkpoints(store).latest_state() is None


def test_the_latest_is_that_of_the_highest_step(store):
    checkpoints = saved(store, 9, 10)
    assert checkpoints.steps() == [9, 10]
    assert checkpoints.latest_state()["step"] == 10


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(
            (file, damage)
            for file in (WEIGHTS_FILE, OPTIMIZER_FILE)
            for damage in ("cut", "changed", "deleted")
        ),
        (STATE_FILE, "cut"),
        (STATE_FILE, "deleted"),
    ],
)
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_it_taken(store, file, damage):
    checkpoints = saved(store, 9, 10)
    folder = checkpoints.folder(10)
    content = folder.read_bytes(file)
    if damage == "deleted":
        folder.delete([file])
    else:
        place = len(content) - 40
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        folder.write_bytes(file, content[: len(content) // 2] if damage == "cut" else changed)
    told = []
    state = load_latest(checkpoints, *new_run(), told.append)
    assert state.step == 9
    if file == STATE_FILE and damage == "deleted":
        assert told == []  # without it, the checkpoint was never there
    else:
        assert len(told) == 1
        assert "step 10" in told[0]


def test_checkpoints_of_which_none_can_be_used_are_not_written_over(store):
    checkpoints = saved(store, 9, 10)
    for step in (9, 10):
        checkpoints.folder(step).write_bytes(WEIGHTS_FILE, b"")
    told = []
    with pytest.raises(AceStepError, match="none of the 2 checkpoints"):
        load_latest(checkpoints, *new_run(), told.append)
    assert len(told) == 2


def test_a_checkpoint_of_another_version_is_refused(store):
    checkpoints = saved(store, 1)
    state = json.loads(checkpoints.folder(1).read_bytes(STATE_FILE))
    checkpoints.folder(1).write_bytes(STATE_FILE, json.dumps({**state, "format": 1}).encode())
    with pytest.raises(AceStepError, match="has the format 1"):
        load_latest(checkpoints, *new_run(), pytest.fail)


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_message_too(store, monkeypatch):
    def fail(*_):
        raise OSError(errno.EACCES, "Permission denied")

    saved(store, 1, 2)
    delete = Store.delete
    monkeypatch.setattr(
        Store, "delete", lambda self, names: fail() if "step=1" in self.url else delete(self, names)
    )
    with pytest.raises(AceStepError, match=r"Permission denied(?s:.*)goes on from step 3"):
        saved(store, 3, keep_last=1)


def fail_to_write(monkeypatch, step: int, *errors: Exception) -> None:
    """The next attempts to write anything of a step fail with these errors, one after another."""
    write, remaining = Store.write_bytes, list(errors)

    def failing(self: Store, name: str, content) -> None:
        if self.url.endswith(f"step={step}") and name == OPTIMIZER_FILE and remaining:
            raise remaining.pop(0)
        write(self, name, content)

    monkeypatch.setattr(Store, "write_bytes", failing)
    monkeypatch.setattr(state_module, "_RETRY_AFTER_SECONDS", (0.0, 0.0))


def test_a_full_disk_is_one_message_and_the_checkpoints_before_stay(store, monkeypatch):
    saved(store, 9, 10)
    fail_to_write(monkeypatch, 11, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(
        AceStepError, match=r"step 11 cannot be written.*No space left(?s:.*)goes on from step 10"
    ):
        saved(store, 11)
    assert load_latest(Checkpoints(store), *new_run(), pytest.fail).step == 10


def test_storage_that_fails_now_and_then_is_asked_again(store, monkeypatch):
    fail_to_write(monkeypatch, 1, StorageError("slow down"), OSError(errno.EIO, "Input/output error"))
    assert load_latest(saved(store, 1), *new_run(), pytest.fail).step == 1


def test_storage_that_keeps_failing_ends_the_run(store, monkeypatch):
    fail_to_write(monkeypatch, 1, *[StorageError("slow down")] * 3)
    with pytest.raises(AceStepError, match=r"slow down(?s:.*)goes on from the start"):
        saved(store, 1)
    assert Checkpoints(store).steps() == []


def test_large_weights_lie_in_several_files_and_come_back(store, monkeypatch):
    monkeypatch.setattr(state_module, "_FILE_BYTES", 4_000)
    checkpoints = saved(store, 1)
    names = checkpoints.folder(1).names()
    assert {"trainable.safetensors", "trainable-1.safetensors", "optimizer-1.safetensors"} <= set(names)
    model, optimizer = new_run()
    load_latest(checkpoints, model, optimizer, pytest.fail)
    expected_model, expected = new_run()
    take_step(expected_model, expected, 0)
    pairs = zip(*(trainable_parameters(m).values() for m in (model, expected_model)), strict=True)
    for found, wanted in pairs:
        assert torch.equal(optimizer.state[found]["exp_avg"], expected.state[wanted]["exp_avg"])
    checkpoints.folder(1).delete(["optimizer-1.safetensors"])
    with pytest.raises(AceStepError, match="none of the 1 checkpoints"):
        load_latest(checkpoints, *new_run(), lambda line: None)


def test_held_out_songs_decide_which_checkpoint_is_best_where_there_are_some():
    trained_on = {"fixed_noise": {"1": 3.0, "2": 2.0, "3": 1.0}}
    assert best_step(trained_on, [1, 2]) == 2
    assert best_step({**trained_on, "validation": {"1": 3.0, "2": 2.0, "3": 2.5}}, [1, 2, 3]) == 2
    assert best_step({"fixed_noise": {}}, [1]) is None


def test_a_loss_that_is_not_finite_is_never_the_best():
    assert best_step({"validation": {"0": math.nan, "1": 3.0, "2": 2.0, "3": math.inf}}, [0, 1, 2, 3]) == 2
    assert best_step({"validation": {"1": math.nan}}, [1]) is None


@pytest.mark.parametrize(("path", "step"), [("step=2", 2), ("", 3), ("step=1/", 1)])
def test_a_checkpoint_is_found_by_its_folder_or_the_one_above(tmp_path, path, step):
    saved(Store.at(tmp_path), 1, 2, 3)
    assert locate_checkpoint(f"{tmp_path}/{path}")[1] == step
    with pytest.raises(InputError, match="step=N"):
        locate_checkpoint(f"{tmp_path}/step=7")


def test_the_last_ones_and_the_best_are_kept(store):
    assert saved(store, 1, 2, 3, 4, 5, keep_last=2).steps() == [2, 4, 5]
    assert {name.partition("/")[0] for name in store.names()} == {"step=2", "step=4", "step=5"}
    assert saved(store, 6, keep_last=0).steps() == [2, 4, 5, 6]


def test_a_step_can_be_written_again_and_is_not_there_until_it_is_whole(store, monkeypatch):
    saved(store, 3, 4, 4)
    assert load_latest(Checkpoints(store), *new_run(), pytest.fail).step == 4
    fail_to_write(monkeypatch, 4, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(AceStepError, match="goes on from step 3"):
        saved(store, 4)
    assert load_latest(Checkpoints(store), *new_run(), pytest.fail).step == 3


def test_a_checkpoint_of_another_lora_is_refused(store):
    checkpoints = saved(store, 1)
    with pytest.raises(AceStepError, match="other trained parameters"):
        load_latest(checkpoints, *new_run(rank=8), pytest.fail)
