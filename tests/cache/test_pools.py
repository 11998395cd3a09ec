from __future__ import annotations

from dataclasses import replace

import pytest
import ray

from acestep_ray.cache.graph import EncoderPool, decode_cpus
from acestep_ray.cache.pools import _actors_per_gpu, choose_pools
from acestep_ray.cache.schema import FEATURE_GROUPS
from acestep_ray.config import PrecomputeConfig
from acestep_ray.errors import InputError
from acestep_ray.models.checkpoint import CheckpointDir


@pytest.fixture
def config() -> PrecomputeConfig:
    return PrecomputeConfig(dataset_path="songs", checkpoint_dir="checkpoint", output_dir="cache")


def pools(
    monkeypatch, config: PrecomputeConfig, checkpoint: CheckpointDir, nodes: list[dict]
) -> list[EncoderPool]:
    alive = [{"Alive": True, "Resources": resources} for resources in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"GPU": 9, "CPU": 1}}])
    monkeypatch.setattr("acestep_ray.cache.pools._actors_per_gpu", lambda resource: 4)
    return choose_pools(replace(config, device="auto"), FEATURE_GROUPS, checkpoint)


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([{"CPU": 2}], None, ("cpu", 1, 1.2, 0)),
        ([{"CPU": 1}], None, ("cpu", 1, 0.6, 0)),
        ([{"CPU": 64}], None, ("cpu", 1, 63, 0)),
        ([{"CPU": 64}], 4, ("cpu", 4, 15, 0)),
        ([{"CPU": 2}], 4, ("cpu", 4, 0.3, 0)),
        ([{"CPU": 8}, {"CPU": 16}, {"memory": 1}], None, ("cpu", 2, 7, 0)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2}], None, ("cuda", 16, 0.5, 0.25)),
        ([{"CPU": 8, "GPU": 2}], 2, ("cuda", 2, 1, 1)),
        ([{"CPU": 8, "GPU": 2}], 5, ("cuda", 5, 2 / 3, 1 / 3)),
    ],
)
def test_encoders_leave_room_for_decoding_and_share_the_gpus(
    monkeypatch, config, checkpoint, nodes, workers, expected
):
    (pool,) = pools(monkeypatch, replace(config, encoder_workers=workers), checkpoint, nodes)
    assert (pool.device, pool.actors, pool.num_cpus, pool.num_gpus) == expected
    assert pool.features == FEATURE_GROUPS


def test_encoders_for_gpus_that_are_still_to_come_have_the_share_that_they_are_given(
    monkeypatch, config, checkpoint
):
    """Or all would lie on the first GPU of an autoscaler."""
    config = replace(config, encoder_workers=48, encoder_gpus=0.16)
    (pool,) = pools(monkeypatch, config, checkpoint, [{"CPU": 16, "GPU": 1}])
    assert (pool.actors, pool.num_cpus, pool.num_gpus) == (48, 0.32, 0.16)


@pytest.mark.parametrize(
    ("gigabytes", "actors"), [([80], 6), ([140, 24], 2), ([48, 48], 4), ([16], 1), ([8], 1)]
)
def test_a_gpu_is_shared_by_as_many_encoders_as_fit_the_smallest(monkeypatch, gigabytes, actors):
    nodes = [{"NodeID": n, "Alive": True, "Resources": {"GPU": 1}} for n in range(len(gigabytes))]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"NodeID": 9, "Alive": True, "Resources": {"CPU": 1}}])
    monkeypatch.setattr(
        "acestep_ray.cache.pools._gpu_memories", lambda ids: [1e9 * gigabytes[n] for n in ids]
    )
    assert _actors_per_gpu(None) == actors


def test_a_gpu_that_torch_does_not_see_is_told_before_anything_starts(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "n", "Alive": True, "Resources": {"GPU": 1}}])
    monkeypatch.setattr("acestep_ray.cache.pools._gpu_memories", lambda ids: [0])
    with pytest.raises(InputError, match="torch sees no GPU"):
        _actors_per_gpu(None)


def test_separate_encoders_have_resources_of_their_own(monkeypatch, config, checkpoint):
    config = replace(
        config, separate_encoders=True, codec_workers=3, codec_gpus=0.25, text_gpus=0, text_workers=2
    )
    found = pools(monkeypatch, config, checkpoint, [{"CPU": 16, "GPU": 2}])
    assert [(pool.features, pool.device, pool.actors, pool.num_gpus) for pool in found] == [
        (("latents",), "cuda", 3, 0.25),
        (("text",), "cpu", 2, 0),
        (("ssl",), "cuda", 2, 0.45),
    ]


@pytest.mark.parametrize("nodes", [[1], [2], [3], [1] * 4, [2] * 2, [3] * 2, [4, 4], [64, 8], [1, 16]])
def test_decoding_finds_a_place_beside_encoders_of_which_no_two_lie_on_a_small_node(
    monkeypatch, config, checkpoint, nodes
):
    nodes = [{"CPU": cores} for cores in nodes]
    (pool,) = pools(monkeypatch, config, checkpoint, nodes)
    assert pool.num_cpus + decode_cpus(nodes) <= max(node["CPU"] for node in nodes)
    if len({node["CPU"] for node in nodes}) == 1:  # of which one may be lost
        assert 2 * pool.num_cpus > nodes[0]["CPU"]


def test_encoders_lie_on_the_nodes_with_the_resource_that_was_asked_for(monkeypatch, config, checkpoint):
    nodes = [{"CPU": 4, "cpu_node": 1}, {"CPU": 8, "GPU": 2}, {"CPU": 16, "cpu_node": 1}]
    (pool,) = pools(monkeypatch, replace(config, encode_resource="cpu_node"), checkpoint, nodes)
    assert (pool.device, pool.actors, pool.num_cpus, pool.resource) == ("cpu", 2, 3, "cpu_node")
    with pytest.raises(InputError, match=r"no node(?s:.*)--encode_resource gpu_node(?s:.*)--resources"):
        pools(monkeypatch, replace(config, encode_resource="gpu_node"), checkpoint, nodes)


def test_pools_of_one_machine_fit_on_it(monkeypatch, config, checkpoint):
    for cores in (1, 2, 4, 64):
        found = pools(monkeypatch, replace(config, separate_encoders=True), checkpoint, [{"CPU": cores}])
        assert len(found) == 3
        assert sum(pool.actors * pool.num_cpus for pool in found) < cores
