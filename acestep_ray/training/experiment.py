"""The folder of a run: whose it is, what it was started with, and who is at work in it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from acestep_ray.config import TrainConfig
from acestep_ray.errors import InputError

IDENTITY_FILE = "run.json"
CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints."""
FINGERPRINTS = {"dataset": "songs of --dataset_path", "transformer": "transformer of --checkpoint_dir"}
"""What a run's identity calls them."""
_LOCK_FILE = ".lock"

# A change of any makes another run of what goes on from the last checkpoint. `max_steps` and `epochs` are not among
# them: a run is made longer with them.
_SETTINGS = (
    "seed",
    "learning_rate",
    "weight_decay",
    "optimizer",
    "warmup_steps",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "batch_size",
    "batch_frames",
    "precision",
    "quantize_base",
    "float8",
    "shift",
    "ssl_coeff",
    "train_parameters",
    "reload_dataloaders_every_n_epochs",
    "val_songs",
    "text_dropout",
    "speaker_dropout",
    "lyric_dropout",
)


def run_identity(
    config: TrainConfig, lora: Mapping[str, Any] | None, *, songs: str, transformer: str
) -> dict[str, Any]:
    """What decides a run's numbers, by the name that a user knows it by; `songs` and `transformer` are fingerprints.

    How many workers share a step's micro-batches decides nothing, their number in a step does.
    """
    identity = {f"--{name}": getattr(config, name) for name in _SETTINGS}
    identity["--devices × --num_nodes × --accumulate_grad_batches"] = (
        config.devices * config.num_nodes * config.accumulate_grad_batches
    )
    identity.update({f"LoRA {name}": value for name, value in (lora or {}).items()})
    return {
        FINGERPRINTS["dataset"]: songs,
        FINGERPRINTS["transformer"]: transformer,
        # As it is read back: a tuple is a list in JSON.
        **json.loads(json.dumps(identity)),
    }


def check_unchanged(experiment: Path, identity: Mapping[str, Any], *, allow_changes: bool) -> None:
    """Raise InputError with the differences to what the run in this folder was started with, unless they are allowed.

    Only for a folder that has checkpoints; one without any note of its identity passes.
    """
    noted = experiment / IDENTITY_FILE
    if allow_changes or not noted.exists():
        return
    before = json.loads(noted.read_text(encoding="utf-8"))
    lines = []
    for name in dict.fromkeys([*before, *identity]):
        old, new = before.get(name), identity.get(name)
        if old != new:
            is_fingerprint = name in FINGERPRINTS.values()
            lines.append(f"\n  - {name}: {'not the same' if is_fingerprint else f'{old} → {new}'}")
    if lines:
        raise InputError(
            "this run was started with other settings",
            where=f"{experiment}{''.join(lines)}",
            fix="use another --exp_name, set them back, or go on with the new ones with --allow_changes",
        )


def note_identity(experiment: Path, identity: Mapping[str, Any]) -> None:
    """Write down what the run is started, or goes on, with."""
    partial = experiment / f".{IDENTITY_FILE}.partial"
    partial.write_text(json.dumps(identity, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(experiment / IDENTITY_FILE)


def make_folder(path: Path, flag: str) -> None:
    """Make a folder that can be written to. Raises InputError."""
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write here ({error.strerror or error})",
            where=f"{flag} {path}",
            fix="choose another folder",
        ) from None


@contextlib.contextmanager
def only_run(experiment: Path) -> Iterator[None]:
    """Hold the folder of a run; the system lets it go when the process ends, however that happens.

    Raises InputError where another process holds it.
    """
    lock = FileLock(experiment / _LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            "a run with this --exp_name is under way",
            where=str(experiment),
            fix="wait for it to end, or use another --exp_name",
        ) from None
    try:
        yield
    finally:
        lock.release()
