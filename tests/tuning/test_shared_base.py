"""Trials that share a base model are, number for number, trials that have one each."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorDiedError, ActorUnschedulableError
from safetensors.torch import load_file

from acestep_ray.config import TrainConfig
from acestep_ray.errors import GpuMemoryError
from acestep_ray.storage import Store
from acestep_ray.training.lora_config import DEFAULT_LORA
from acestep_ray.training.model import build_transformer
from acestep_ray.training.state import OPTIMIZER_FILE, WEIGHTS_FILE, Checkpoints
from acestep_ray.tuning import trainable
from acestep_ray.tuning.host import SharedBaseHost
from acestep_ray.tuning.loop import Turns
from acestep_ray.tuning.shared_base import SharedBase
from acestep_ray.tuning.trial import TrialPlan, start_loop, trial_settings

CPU = torch.device("cpu")


class HostStandIn:
    """The handle of a host, whose call of `start` gives or raises this."""

    def __init__(self, answer: bool | Exception):
        self.answer = answer
        self.start = SimpleNamespace(remote=lambda *_: self)


def test_a_trial_takes_the_host_that_is_left_when_others_are_lost_with_their_nodes(monkeypatch):
    def answer_of(host: HostStandIn) -> bool:
        if isinstance(host.answer, Exception):
            raise host.answer
        return host.answer

    monkeypatch.setattr(trainable.ray, "get", answer_of)
    monkeypatch.setattr(trainable.random, "sample", lambda hosts, _: hosts)
    lost = [HostStandIn(ActorDiedError()), HostStandIn(ActorUnschedulableError("its node is gone"))]
    left = HostStandIn(True)
    assert trainable.HostedLoop(None, [*lost, left], "trial-0000", {}, None).host is left
    with pytest.raises(RuntimeError, match="all shared base models are lost"):
        trainable.HostedLoop(None, lost, "trial-0000", {}, None)


def test_a_trials_own_process_loads_no_torch_for_the_handle_of_its_host():
    # A handle brings its actor's class, and with it the module that this is in.
    code = (
        "import sys, acestep_ray.tuning.trainable, acestep_ray.tuning.host;"
        "print([m for m in ('torch', 'peft', 'transformers') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


TRIALS = {
    "low": {
        "rank": 4,
        "alpha": "r",
        "learning_rate": 1e-3,
        "targets": "attention+feed_forward",
        "dropout": 0.2,
    },
    "high": {"rank": 16, "alpha": "rslora", "learning_rate": 3e-3, "targets": "cross_attention+speaker"},
    "again": {"rank": 8, "alpha": "2r", "learning_rate": 1e-2, "targets": "attention", "dropout": 0.1},
}


@pytest.fixture
def plan(checkpoint, problem, tmp_path):
    config = TrainConfig(
        dataset_path=str(problem),
        checkpoint_dir=str(checkpoint.path),
        lora_config_path="lora_config.json",
        max_steps=4,
        batch_size=2,
        precision="32",
        num_workers=0,
        ssl_coeff=0.0,
        every_n_train_steps=2,
        val_check_interval=2,
        keep_last=1,
    )
    return TrialPlan(
        config=config,
        lora=dict(DEFAULT_LORA),
        folder=Store.at(tmp_path / "search"),
        log_dir=Store.at(tmp_path / "logs"),
        total_steps=4,
        stream=None,
        held_out=(0, 5),
        use_gpu=False,
        say=print,
        stop=SimpleNamespace(asked=lambda: False),
    )


def run_alone(plan: TrialPlan, name: str) -> list[dict]:
    """All validations of a trial with a model of its own."""
    loop = start_loop(plan, name, TRIALS[name], None, CPU)
    return list(iter(loop.next, None))


def files_of(plan: TrialPlan, name: str) -> dict[str, torch.Tensor]:
    """Weights and moments of a trial's last checkpoint."""
    checkpoints = Checkpoints(trial_settings(plan, name, TRIALS[name], None).checkpoints)
    folder = checkpoints.folder(checkpoints.steps()[-1]).path
    return load_file(folder / WEIGHTS_FILE) | load_file(folder / OPTIMIZER_FILE)


def test_trials_on_a_shared_base_are_those_with_a_model_each_bit_for_bit(plan, tmp_path):
    apart = replace(plan, folder=Store.at(tmp_path / "apart"), log_dir=Store.at(tmp_path / "logs-apart"))
    expected = {name: run_alone(apart, name) for name in TRIALS}
    host = SharedBaseHost(seats=3)
    assert all(host.start(plan, name, params, None) for name, params in TRIALS.items())
    found = {name: [] for name in TRIALS}
    while running := [name for name in TRIALS if len(found[name]) < 2]:
        for name in running:  # in turns, so that each begins where another has left torch's random numbers
            found[name].append(host.next(name)[0])
    assert found == expected
    for name in TRIALS:
        host.leave(name)
        theirs, mine = files_of(apart, name), files_of(plan, name)
        assert theirs.keys() == mine.keys()
        for key, value in theirs.items():
            assert torch.equal(mine[key], value), (name, key)


@pytest.mark.parametrize(
    "changes", [{"precision": "bf16-true"}, {"quantize_base": "int8"}, {"quantize_base": "nf4"}]
)
def test_a_model_on_a_stored_base_has_its_tensors_and_gives_what_its_own_would(plan, changes):
    config = replace(plan.config, **changes)
    shared = SharedBase(config, CPU)
    lora = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["attn.to_q", "ff.inverted_conv.conv", "speaker_embedder"],
    }
    first, second = (shared.build(config, lora, CPU) for _ in range(2))
    own = build_transformer(config, lora, CPU)
    mine = dict(first.named_parameters())
    for name, parameter in own.named_parameters():
        assert mine[name].dtype == parameter.dtype, name
        assert mine[name].requires_grad == parameter.requires_grad, name
        assert torch.equal(mine[name], parameter), name
    theirs = dict(second.named_parameters())
    for name, parameter in mine.items():
        is_shared = parameter.data_ptr() == theirs[name].data_ptr()
        assert is_shared == (not parameter.requires_grad), name
    base = {parameter.data_ptr() for parameter in shared.base.parameters()}
    assert {p.data_ptr() for p in mine.values() if not p.requires_grad} == base


def test_there_are_as_many_seats_as_were_made_and_a_trial_takes_its_own_over(plan):
    host = SharedBaseHost(seats=1)
    assert host.start(plan, "low", TRIALS["low"], None)
    assert not host.start(plan, "high", TRIALS["high"], None)
    assert host.next("low")[0]["step"] == 2
    assert host.start(plan, "low", TRIALS["low"], None)
    assert host.next("low")[0]["step"] == 4
    host.leave("low")
    assert host.start(plan, "high", TRIALS["high"], None)
    host.leave("high")


def test_an_error_of_one_trial_is_its_own(plan, monkeypatch):
    turns = Turns()

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    failing = start_loop(plan, "low", TRIALS["low"], None, CPU, build=fail, turns=turns)
    with pytest.raises(GpuMemoryError, match="CUDA out of memory"):
        failing.next()
    other = start_loop(plan, "high", TRIALS["high"], None, CPU, turns=turns)
    assert other.next()["step"] == 2
    with contextlib.suppress(Exception):
        failing.stop()
    other.stop()


@pytest.mark.parametrize("hosts", [[], [HostStandIn(True)]])
def test_a_trial_that_finds_too_little_memory_is_started_again_and_says_what_would_leave_more(hosts):
    def fail():
        raise GpuMemoryError("too small")

    actor = object.__new__(trainable.TrialActor)
    ended = []
    actor.hosts, actor.workers, actor.loop = (
        hosts,
        1,
        SimpleNamespace(next=fail, stop=lambda: ended.append(True)),
    )
    with pytest.raises(GpuMemoryError, match="too small, or fewer trials at a time") as raised:  # for Tune
        actor.step()
    assert ended == [True]
    assert actor.loop is None
    assert ("--share_base" in str(raised.value)) == (not hosts)


def test_others_work_while_a_trials_checkpoint_is_written(plan, monkeypatch):
    turns, others_worked, waited = Turns(), threading.Event(), []
    write = Checkpoints._write

    def slowly(self, snapshot, values):
        if "low" in self.store.url and values["step"] == plan.total_steps:
            waited.append(others_worked.wait(20))
        write(self, snapshot, values)

    monkeypatch.setattr(Checkpoints, "_write", slowly)
    low, high = (start_loop(plan, name, TRIALS[name], None, CPU, turns=turns) for name in ("low", "high"))
    assert low.next()["step"] == high.next()["step"] == 2
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(low.next)  # waits for what it writes
        assert high.next()["step"] == 4
        others_worked.set()
        assert last.result()["step"] == 4
    assert waited == [True]
    low.stop()
    high.stop()
