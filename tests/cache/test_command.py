"""`acestep-ray cache` as a user types it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from acestep_ray import cli
from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.parts import store_rows
from tests.cache.conftest import noise
from tests.cache.rows import song_row
from tests.processes import wait_until


def test_the_command_prints_summaries_and_exits_as_it_should(cache, capsys):
    assert cli.main(["cache", "verify", cache.url]) == 0
    assert "4 in 2 parts" in capsys.readouterr().out
    assert cli.main(["cache", "stats", cache.url]) == 0
    assert "210" not in capsys.readouterr().out
    store_rows(cache, [song_row("e")])
    assert cli.main(["cache", "prune", cache.url, "--dry-run"]) == 0
    assert "would delete 2 files" in capsys.readouterr().out
    assert len(cache.names(".incoming")) == 2
    assert cli.main(["cache", "prune", cache.url]) == 0
    assert "deleted 2 files" in capsys.readouterr().out
    cache.delete([next(iter(cache.names("samples")))])
    assert cli.main(["cache", "verify", cache.url]) == 1
    assert "1 things are wrong" in capsys.readouterr().err
    assert cli.main(["cache", "stats", f"{cache.url}/nowhere"]) == 2
    assert "not a feature cache" in capsys.readouterr().err


@pytest.mark.ray
def test_a_command_that_is_told_to_end_says_so_and_goes_on_the_next_time(
    two_cpus, song_folder, checkpoint, tmp_path
):
    """SIGTERM, as `ray job stop` sends it, while songs are encoded."""
    for i in range(12):
        song_folder.add(f"song{i}", noise(4.0, seed=i))
    song_folder.write()
    cache = tmp_path / "cache"
    command = [sys.executable, "-m", "acestep_ray", "precompute", "--device", "cpu", "--features", "latents"]
    command += ["--dataset_path", str(song_folder.path), "--checkpoint_dir", str(checkpoint.path)]
    command += ["--output_dir", str(cache)]
    environment = {**os.environ, "RAY_ADDRESS": two_cpus}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        wait_until(lambda: (cache / ".incoming" / "songs").exists(), lambda: process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=100)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "interrupted" in told
    assert "SIGTERM" not in told
    assert "Traceback" not in told
    assert cli.main(command[3:]) == 0
    assert len(CacheIndex.open(cache)) == 12
