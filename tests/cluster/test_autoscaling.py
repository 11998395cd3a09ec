"""Jobs on a cluster that begins with a head alone: Ray's autoscaler brings the nodes that they ask for."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.util import get_node_ip_address

from acestep_ray.cache.verify import verify_cache
from acestep_ray.data.demo import write_demo_songs
from cluster.local.nodes import (
    CPU_NODE,
    GPU_NODE,
    HEAD,
    LocalNode,
    NodeSettings,
    free_ports,
    listens,
    wait_for,
)

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.timeout(900)]

NODE = {"CPU": 2, "object_store_memory": 200_000_000}


@dataclass
class FromZero:
    """A head whose autoscaler starts nodes on this machine."""

    address: str
    environment: dict[str, str]

    def run(self, job: str, **flags: object) -> subprocess.CompletedProcess[str]:
        """Run a job to its end, with the cluster's address."""
        given = [f"--{name}={value}" for name, value in flags.items()]
        return subprocess.run(
            [sys.executable, "-m", "acestep_ray", job, *given],
            env={**os.environ, **self.environment, "RAY_ADDRESS": self.address, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[FromZero]:
    folder = tmp_path_factory.mktemp("head")
    gcs, dashboard, client = free_ports(3)
    host = get_node_ip_address()
    kinds = {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "cpu": {"resources": {**NODE, CPU_NODE: 1}, "node_config": {}, "min_workers": 0, "max_workers": 1},
        "gpu": {"resources": {**NODE, GPU_NODE: 1}, "node_config": {}, "min_workers": 0, "max_workers": 1},
    }
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config = {
        "cluster_name": "from-zero",
        "max_workers": 2,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"{host}:{gcs}",
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": kinds,
        "head_node_type": "head",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 30,
        **{f"{name}_commands": [] for name in commands},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
    }
    (folder / "cluster.json").write_text(json.dumps(config))
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    mark = f"from-zero/{secrets.token_hex(4)}"
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--port", gcs, "--dashboard-port", dashboard, "--ray-client-server-port", client),
        *("--num-cpus", 0, "--object-store-memory", 200_000_000),
        *("--temp-dir", f"/tmp/from-zero-{secrets.token_hex(4)}"),  # sockets have long names
        f"--autoscaling-config={folder / 'cluster.json'}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            list(map(str, command)),
            env={
                **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
                **environment,
                "ACESTEP_LOCAL_NODE": mark,
                "SPT_NOENV": "1",
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    head = LocalNode(NodeSettings(HEAD, cpus=0), HEAD, mark, process, folder / "log", None)
    try:
        wait_for(lambda: listens(host, gcs), "the head does not answer", head)
        yield FromZero(f"{host}:{gcs}", environment)
    finally:
        head.kill()


@pytest.fixture(scope="module")
def cache(cluster, checkpoint, tmp_path_factory) -> Path:
    """A cache that was made where no node was there to make it."""
    folder = tmp_path_factory.mktemp("jobs")
    write_demo_songs(folder / "songs")
    done = cluster.run(
        "precompute",
        dataset_path=folder / "songs",
        checkpoint_dir=checkpoint.path,
        output_dir=folder / "cache",
        features="latents,text",
        device="cpu",
        decode_resource=CPU_NODE,
        encode_resource=GPU_NODE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in (CPU_NODE, f"1 CPU, {GPU_NODE}"):
        assert f"waiting for 1 × ({kind}), for which the autoscaler was asked" in done.stderr
    return folder / "cache"


def test_precompute_brings_a_node_that_decodes_and_one_that_encodes(cache):
    verify_cache(str(cache))  # raises for what is not whole


def test_training_waits_for_no_node_that_is_there(cluster, cache, checkpoint, tmp_path):
    (tmp_path / "lora.json").write_text("{}")
    done = cluster.run(
        "train",
        dataset_path=cache,
        checkpoint_dir=checkpoint.path,
        lora_config_path=tmp_path / "lora.json",
        exp_dir=tmp_path / "exps",
        logger_dir=tmp_path / "logs",
        exp_name="from-zero",
        tracking_uri="none",
        device="cpu",
        worker_resource=GPU_NODE,
        max_steps=2,
        ssl_coeff=0,
        every_plot_step=100,
        num_workers=0,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "exps/from-zero/checkpoints/step=2/pytorch_lora_weights.safetensors").exists()
