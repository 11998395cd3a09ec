"""The folder of a run: whose it is, what it was started with, and who is at work in it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from acestep_ray.config import TrainConfig
from acestep_ray.errors import InputError
from acestep_ray.plain_files import NOTES
from acestep_ray.plain_json import load_json
from acestep_ray.storage import (
    DiskFullError,
    HeldError,
    Lease,
    StorageError,
    Store,
    full_disk_explained,
    is_url,
)
from acestep_ray.storage.files import LOCK
from acestep_ray.storage.locks import LockFile
from acestep_ray.terminal import show_line
from acestep_ray.tracking.local_database import same_run

IDENTITY_FILE = "run.json"
SETTINGS_FILE = "train.yaml"
MLFLOW_FILE = "mlflow.json"
"""Which run of MLflow it is."""
CHECKPOINTS, SAMPLES = "checkpoints", "samples"
"""Folders of a run's checkpoints, and of the music that it made on the way."""
FINGERPRINTS = {"dataset": "songs of --dataset_path", "transformer": "transformer of --checkpoint_dir"}
"""What a run's identity calls them."""

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


Folder = Store | Path
"""Of a run: on this machine, or a `Store`."""


def check_unchanged(experiment: Folder, identity: Mapping[str, Any], *, allow_changes: bool) -> None:
    """Raise InputError with the differences to what the run in this folder was started with, unless they are allowed.

    Only for a folder that has checkpoints; one without any note of its identity passes.
    """
    experiment = Store.at(experiment)
    before = read_json(experiment, IDENTITY_FILE)
    if allow_changes or before is None:
        return
    lines = []
    for name in dict.fromkeys([*before, *identity]):
        old, new = before.get(name), identity.get(name)
        if old != new:
            is_fingerprint = name in FINGERPRINTS.values()
            lines.append(f"\n  - {name}: {'not the same' if is_fingerprint else f'{old} → {new}'}")
    if lines:
        raise InputError(
            "this run was started with other settings",
            where=f"{experiment.url}{''.join(lines)}",
            fix="use another --exp_name, set them back, or go on with the new ones with --allow_changes",
        )


def note_identity(experiment: Folder, identity: Mapping[str, Any]) -> None:
    """Write down what the run is started, or goes on, with."""
    write_json(Store.at(experiment), IDENTITY_FILE, identity)


def noted_place(value: str | None, experiment: Path) -> str | None:
    """A path of a run's settings where it is now: relative to the working directory, or to the project of the run.

    Settings note relative paths as they were given, and `exps/NAME` is where a project has its runs by default.
    """
    if value is None or is_url(value) or Path(value).is_absolute() or Path(value).exists():
        return value
    beside = experiment.absolute().parent.parent / value
    return str(beside) if beside.exists() else value


def read_json(folder: Store, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of a run's folder; None where there is none. Raises InputError for another content."""
    try:
        values = load_json(folder.read_bytes(name, NOTES))
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        return values
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"this file of the run does not read ({error})",
            where=folder.url_of(name),
            fix="bring it back from a copy, or use another --exp_name",
        ) from None


def known_mlflow_run(experiment: Store, tracking_uri: str | None) -> str | None:
    """The id of the experiment's run at this MLflow, None where it has none there."""
    known = read_json(experiment, MLFLOW_FILE) or {}
    return (
        None
        if tracking_uri is None
        else same_run(known.get("tracking_uri"), known.get("run_id"), tracking_uri)
    )


def write_json(folder: Store, name: str, values: Any) -> None:
    """Write a file of a run's folder, whole or not at all."""
    folder.write_bytes(name, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


def make_folder(folder: Folder, flag: str) -> None:
    """Make a folder that can be written to. Raises InputError."""
    store = Store.at(folder)
    if not store.is_local:
        _check_takes_objects(store, flag)
        return
    path = store.path
    probe = path / ".writable"
    try:
        with full_disk_explained(path):
            path.mkdir(parents=True, exist_ok=True)
            probe.touch()
        probe.unlink(missing_ok=True)  # another process may have looked at the same time
    except DiskFullError:
        raise
    except OSError as error:
        raise InputError(
            f"cannot write here ({error.strerror or error})",
            where=f"{flag} {path}",
            fix="choose another folder",
        ) from None


def _check_takes_objects(store: Store, flag: str) -> None:
    probe = f".writable-{uuid.uuid4().hex}"
    try:
        store.write_bytes(probe, b"")
        store.delete([probe])
    except (StorageError, FileNotFoundError) as error:
        raise InputError(
            f"cannot write here ({error})", where=f"{flag} {store.url}", fix="choose another folder"
        ) from None


@contextlib.contextmanager
def only_run(experiment: Folder) -> Iterator[None]:
    """Hold the folder of a run; the system lets it go when the process ends, however that happens.

    A folder in object storage is held by an object that is renewed: it is free a minute after the process has ended
    without letting it go. Raises InputError where another process holds it.
    """
    experiment = Store.at(experiment)
    if not experiment.is_local:
        with _leased(experiment):
            yield
        return
    lock = LockFile(experiment.path / LOCK)
    if not lock.acquire():
        raise _under_way(experiment, f" ({lock.holder()})")
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _leased(experiment: Store) -> Iterator[None]:
    lease = Lease(experiment, LOCK, lost=_end_this_run)
    try:
        lease.acquire()
    except HeldError as error:
        raise _under_way(experiment, f" ({error})") from None
    try:
        yield
    finally:
        lease.release()


def _end_this_run(why: str) -> None:
    """Bring this process to an end as SIGTERM does, so that two runs do not write to one folder."""
    show_line(f"{why}: this run was out of reach for too long, and ends")
    os.kill(os.getpid(), signal.SIGTERM)


def _under_way(experiment: Store, by: str = "") -> InputError:
    return InputError(
        f"a run with this --exp_name is under way{by}",
        where=experiment.url,
        fix="wait for it to end, or use another --exp_name",
    )
