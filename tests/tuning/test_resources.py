"""What trials take of a cluster, and what is refused before they wait for ever."""

from __future__ import annotations

import pytest

from acestep_ray.config import TuneConfig
from acestep_ray.errors import InputError
from acestep_ray.tuning.resources import HEAD_CPUS, reserve

LAPTOP = [{"CPU": 2.0}]
CARD = [{"CPU": 16.0, "GPU": 1.0}]
CLUSTER = [{"CPU": 32.0, "GPU": 4.0}, {"CPU": 32.0, "GPU": 4.0}, {"CPU": 8.0}]


def config(**values) -> TuneConfig:
    return TuneConfig(dataset_path="cache", checkpoint_dir="checkpoint", **values)


@pytest.mark.parametrize(
    ("nodes", "values", "at_once", "per_trial"),
    [
        (LAPTOP, {}, 2, {"cpu": 1.0, "gpu": 0.0}),
        (LAPTOP, {"cpus_per_trial": 2.0}, 1, {"cpu": 2.0, "gpu": 0.0}),
        (CARD, {}, 1, {"cpu": 1.0, "gpu": 1.0}),
        (CARD, {"gpus_per_trial": 0.125}, 8, {"cpu": 1.0, "gpu": 0.125}),
        (CARD, {"gpus_per_trial": 0.3}, 3, {"cpu": 1.0, "gpu": 0.3}),
        (CARD, {"gpus_per_trial": 0.125, "cpus_per_trial": 4.0}, 4, {"cpu": 4.0, "gpu": 0.125}),
        (CARD, {"device": "cpu"}, 16, {"cpu": 1.0, "gpu": 0.0}),
        (CLUSTER, {"gpus_per_trial": 0.5}, 16, {"cpu": 1.0, "gpu": 0.5}),
    ],
)
def test_as_many_trials_run_at_a_time_as_fit(nodes, values, at_once, per_trial):
    reserved = reserve(config(**values), nodes, streamed=False)
    assert (reserved.at_once, reserved.per_trial) == (at_once, per_trial)
    assert reserved.use_gpu == (per_trial["gpu"] > 0)


def test_trials_lie_on_the_nodes_with_the_resource_that_was_asked_for():
    nodes = [{"CPU": 4.0, "cpu_node": 1.0}, {"CPU": 2.0, "gpu_node": 1.0}]
    reserved = reserve(config(worker_resource="gpu_node"), nodes, streamed=False)
    assert reserved.at_once == 2
    assert 0 < reserved.per_trial["gpu_node"] < 0.01
    (host,) = reserve(config(worker_resource="gpu_node", share_base=True), nodes, streamed=False).hosts
    assert host.node == 1
    with pytest.raises(InputError, match=r"no node(?s:.*)--worker_resource tpu_node"):
        reserve(config(worker_resource="tpu_node"), nodes, streamed=False)


def test_a_shared_base_is_one_a_gpu_with_a_seat_for_every_share():
    reserved = reserve(config(share_base=True, gpus_per_trial=0.125), CLUSTER, streamed=False)
    assert [(host.node, host.gpus, host.seats) for host in reserved.hosts] == [(0, 1, 8)] * 4 + [
        (1, 1, 8)
    ] * 4
    assert reserved.at_once == 64
    assert reserved.per_trial == {"cpu": HEAD_CPUS}


def test_without_gpus_a_shared_base_is_one_a_node():
    (host,) = reserve(config(share_base=True), LAPTOP, streamed=False).hosts
    assert (host.cpus, host.gpus, host.seats) == (1, 0, 2)


def test_a_trial_of_several_workers_leaves_its_own_process_a_little():
    reserved = reserve(config(workers_per_trial=2, cpus_per_trial=2.0), LAPTOP, streamed=False)
    assert reserved.at_once == 1
    assert 2 * reserved.worker_cpus + HEAD_CPUS <= 2
    assert reserve(config(workers_per_trial=4), CLUSTER, streamed=False).at_once == 2


def test_songs_without_a_cache_leave_half_of_the_cpus_to_decoding():
    assert reserve(config(), LAPTOP, streamed=True).at_once == 1
    assert reserve(config(), CARD, streamed=True).at_once == 1


@pytest.mark.parametrize(
    ("nodes", "values", "said"),
    [
        (LAPTOP, {"gpus_per_trial": 0.5}, "no GPU for the trials: --gpus_per_trial 0.5"),
        (LAPTOP, {"device": "cuda"}, "no GPU for the trials: --device cuda"),
        (LAPTOP, {"cpus_per_trial": 3.0}, "2 CPUs for trials: --cpus_per_trial 3"),
        (CARD, {"gpus_per_trial": 2.0}, "one process trains on one GPU(?s:.*)--workers_per_trial 2"),
        (CARD, {"gpus_per_trial": -1.0}, "--gpus_per_trial -1"),
        (CARD, {"workers_per_trial": 2}, "room for 1: --workers_per_trial 2"),
        (LAPTOP, {"workers_per_trial": 4, "cpus_per_trial": 4.0}, "room for 2: --workers_per_trial 4"),
        (CLUSTER, {"workers_per_trial": 2, "gpus_per_trial": 0.5}, "takes one GPU: --gpus_per_trial 0.5"),
        (CLUSTER, {"workers_per_trial": 2, "share_base": True}, "--share_base --workers_per_trial 2"),
        (LAPTOP, {"workers_per_trial": 0}, "--workers_per_trial 0"),
        (LAPTOP, {"cpus_per_trial": 0.0}, "--cpus_per_trial 0"),
    ],
)
def test_a_trial_that_would_wait_for_ever_is_refused(nodes, values, said):
    with pytest.raises(InputError, match=said):
        reserve(config(**values), nodes, streamed=False)
