"""Where the encoders of precompute lie: how many actors, and what of the cluster's CPUs and GPUs each takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from acestep_ray.cache.graph import EncoderPool
from acestep_ray.config import PrecomputeConfig
from acestep_ray.device import gpu_memory
from acestep_ray.errors import InputError
from acestep_ray.ray_runtime import nodes_with, wait_for_first_node

if TYPE_CHECKING:
    from acestep_ray.models.checkpoint import CheckpointDir

# Several actors share a GPU: while one copies a song's audio and builds rows, others compute. With six an H100 is never
# without work. All models and the largest pass over a 240 s song take about 8 GB.
_ACTORS_PER_GPU, _GPU_MEMORY_PER_ACTOR = 6, 12e9
_CPUS_PER_GPU = 2
_GPU_SHARES = {"latents": 0.45, "ssl": 0.45, "text": 0.1}


def choose_pools(
    config: PrecomputeConfig, features: tuple[str, ...], checkpoint: CheckpointDir
) -> list[EncoderPool]:
    """One pool of actors with all models, or with `--separate_encoders` one for each group of features.

    Raises InputError where the cluster has no place for them.
    """
    resource = config.encode_resource
    wait_for_first_node(config.device, resource)
    nodes = [node["Resources"] for node in nodes_with(resource, "--encode_resource")]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    the_nodes = "the Ray cluster has" if resource is None else f"the nodes with {resource} have"
    cores = [node["CPU"] for node in nodes if node.get("CPU")]
    if not cores:
        raise InputError(f"{the_nodes} no CPUs", fix="start Ray with --num-cpus 2 or more")
    device = config.device if config.device != "auto" else ("cuda" if gpus else "cpu")
    if device == "cuda" and not gpus:
        raise InputError(
            f"--device is cuda, and {the_nodes} no GPU",
            fix="give --device cpu, or start Ray where torch sees a GPU",
        )
    if "ssl" in features and not checkpoint.ssl_names:
        features = tuple(name for name in features if name != "ssl") or features
    if not config.separate_encoders:
        if device == "cpu":
            return [_cpu_pool(features, config.encoder_workers or len(cores), cores, resource)]
        actors = config.encoder_workers or _actors_per_gpu(resource) * gpus
        together = -(-actors // gpus)
        share = config.encoder_gpus if config.encoder_gpus is not None else 1 / together
        num_cpus = min(1, _CPUS_PER_GPU * (share or 1 / together))
        return [EncoderPool(features, device, actors, num_cpus, num_gpus=share, resource=resource)]
    pools = []
    for group in features:
        flag = {"latents": "codec"}.get(group, group)
        actors, share = getattr(config, f"{flag}_workers"), getattr(config, f"{flag}_gpus")
        if device == "cpu" or share == 0:
            pools.append(_cpu_pool((group,), actors or len(cores), cores, resource, pools=len(features)))
            continue
        share = share if share is not None else _GPU_SHARES[group]
        pools.append(EncoderPool((group,), device, actors or gpus, 0.5, num_gpus=share, resource=resource))
    return pools


def _actors_per_gpu(resource: str | None) -> int:
    """As many as the memory of the smallest GPU of these nodes has room for."""
    nodes = nodes_with(resource, "--encode_resource")
    smallest = min(_gpu_memories([node["NodeID"] for node in nodes if node["Resources"].get("GPU")]))
    if not smallest:
        raise InputError(
            "torch sees no GPU on a node that has one for Ray",
            fix="install a build of torch for CUDA there, or give --device cpu",
        )
    return max(1, min(_ACTORS_PER_GPU, int(smallest / _GPU_MEMORY_PER_ACTOR)))


def _gpu_memories(nodes: Sequence[str]) -> list[int]:
    """Bytes of memory of a GPU on each of these nodes."""
    memory = ray.remote(num_cpus=0, num_gpus=0.01)(gpu_memory)
    places = [NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes]
    return ray.get([memory.options(scheduling_strategy=place).remote() for place in places])


def _cpu_pool(
    features: tuple[str, ...], actors: int, cores: list[float], resource: str | None, pools: int = 1
) -> EncoderPool:
    share = min(cores) / -(-actors // len(cores)) / pools
    # Whole cores but one, as decoding needs the rest. Of a few cores more than half: when a node is lost, its encoder
    # finds no place on another, where no room would be left to decode in.
    num_cpus = int(share - 1) if share >= 3 else 0.6 * share
    return EncoderPool(features, "cpu", actors, num_cpus, num_gpus=0, resource=resource)
