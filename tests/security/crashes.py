"""Commands that are killed, stopped or run on a full disk, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file

from acestep_ray.models.checkpoint import TRANSFORMER
from acestep_ray.tuning.records import DONE, SEARCH_FILE, Records

ANSWER_SECONDS = 100
"""After which the server and all that it runs are killed."""


@dataclass
class Ended:
    """How a command came to its end."""

    code: int
    text: str
    count: int
    """Changes of the file system that it made."""
    pid: int = 0


class Commands:
    """Runs commands in forks of one process."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.security.crash_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *arguments: Any, **options: Any) -> Ended:
        """Run a command; `at` and `then` say before which change it gets which signal."""
        return Ended(**self._ask({"arguments": [str(one) for one in arguments], **options}))

    def wait(self, pid: int) -> int:
        """The exit code of a command that stood still."""
        return self._ask({"wait": pid})["code"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()


@contextlib.contextmanager
def standing_still(commands: Commands, *arguments: Any, at: int) -> Iterator[int]:
    """A command that is alive and does nothing before its n-th change; killed at the end, if it still stands there."""
    stopped = commands(*arguments, at=at, then="SIGSTOP")
    assert stopped.code == -signal.SIGSTOP, stopped
    try:
        yield stopped.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped.pid, signal.SIGKILL)
            commands.wait(stopped.pid)


def moments(count: int, wanted: int) -> list[int]:
    """So many of a command's changes, from the first to the last."""
    return sorted({round(1 + (count - 1) * step / (wanted - 1)) for step in range(wanted)})


def write_songs(folder: Path, *names: str) -> Path:
    """A folder of songs with prompts."""
    folder.mkdir()
    for number, name in enumerate(names):
        wave = np.random.default_rng(number).standard_normal((4_800, 2)) / 10
        soundfile.write(folder / f"{name}.wav", wave, 48_000)
        (folder / f"{name}_prompt.txt").write_text("piano")
    return folder


def write_tar(path: Path, folder: Path) -> Path:
    """The files of a folder as a tar."""
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    return path


def write_lora(path: Path, checkpoint: Path) -> Path:
    """A LoRA of one module of a checkpoint."""
    width = json.loads((checkpoint / TRANSFORMER / "config.json").read_text())["inner_dim"]
    torch.manual_seed(0)
    pair = {"lora_A": torch.randn(2, width), "lora_B": torch.randn(width, 2)}
    save_file({f"transformer_blocks.0.attn.to_q.{n}.weight": t for n, t in pair.items()}, path)
    return path


def write_search(folder: Path, trials: int = 3) -> Path:
    """The folder of a search."""
    records = Records(folder)
    for number in range(trials):
        record = records.add({"rank": 2 + number, "learning_rate": 1e-4 * (number + 1)})
        records.note(record.name, {"step": 1, "validation": 2.0 - number / 10, "train": 2.0})
        records.end(record.name, DONE)
    (folder / SEARCH_FILE).write_text("{}")
    return folder


def hidden(folder: Path) -> list[str]:
    """What is in a folder that no user has put there."""
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


def tree(folder: Path) -> dict[str, bytes]:
    """Files below a folder with their bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
