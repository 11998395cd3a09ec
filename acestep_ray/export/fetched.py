"""LoRAs and runs in object storage, brought to this machine for as long as they are read: what is needed of them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from acestep_ray.export.reading import LORA_FILE, PEFT_CONFIG, PEFT_FILE
from acestep_ray.export.source import checkpoint_folder
from acestep_ray.paths import expand_home
from acestep_ray.plain_files import SETTINGS
from acestep_ray.plain_text import read_utf8
from acestep_ray.plain_yaml import load_yaml
from acestep_ray.reporting.curves import EVENTS
from acestep_ray.storage import Store, StoredFile, is_url, scratch_folder
from acestep_ray.storage.folders import download_files, told_of
from acestep_ray.training.experiment import CHECKPOINTS, SETTINGS_FILE
from acestep_ray.training.state import STATE_FILE

_STEP = re.compile(r"step=\d+")


@contextlib.contextmanager
def fetched_lora(place: str | os.PathLike[str], checkpoint: str = "last") -> Iterator[Path]:
    """A path on this machine for what `open_source` and `find_lora_file` take; of a URL a copy, while the block runs.

    Of an experiment or a training checkpoint come its settings, the LoRAs of the checkpoint that is chosen, and its
    logs; of another folder the LoRAs. Mistakes that are found in the copy are told of the URL. Raises what
    `open_source` raises of an experiment.
    """
    if not is_url(place):
        yield Path(expand_home(os.fspath(place)))
        return
    store = Store.at(place)
    with scratch_folder() as root:
        folder, path = _fetch(store, root, checkpoint)
        with told_of(folder, root / folder.name):
            yield path


def _fetch(store: Store, root: Path, checkpoint: str) -> tuple[Store, Path]:
    """Copy what is needed below `root`; the folder whose copy is `root`/NAME, and the copy of `store`."""
    is_bucket = "/" not in store.url.partition("://")[2]
    file = None if is_bucket else StoredFile.at(store.url)
    if file is not None and file.status() is not None:
        names = [file.name] + ([PEFT_CONFIG] if file.name == PEFT_FILE else [])
        there = [name for name in names if file.store.status(name) is not None]
        folder = root / file.store.name
        download_files(file.store, there, folder)
        return file.store, folder / file.name
    experiment, below = _experiment_of(store)
    folder = root / experiment.name
    folder.mkdir()
    names = list(experiment.names())
    if any(re.fullmatch(rf"{CHECKPOINTS}/step=\d+/{STATE_FILE}", name) for name in names):
        _fetch_run(experiment, names, folder, below, checkpoint)
    else:
        _fetch_loras(experiment, names, folder)
    return experiment, folder / below


def _experiment_of(store: Store) -> tuple[Store, str]:
    """The experiment that a URL is of, if it is of one, and the folder within it that is meant."""
    if store.name == CHECKPOINTS:
        return store.parent, CHECKPOINTS
    if _STEP.fullmatch(store.name) and store.parent.name == CHECKPOINTS:
        return store.parent.parent, f"{CHECKPOINTS}/{store.name}"
    return store, ""


def _fetch_run(experiment: Store, names: list[str], folder: Path, below: str, checkpoint: str) -> None:
    states = [name for name in names if name.endswith(f"/{STATE_FILE}")]
    download_files(experiment, [*(name for name in names if "/" not in name), *states], folder)
    with told_of(experiment, folder):
        chosen = checkpoint_folder(folder / below, checkpoint)
    if chosen is not None:
        step = chosen.relative_to(folder.resolve()).as_posix()
        files = [name for name in names if name.startswith(f"{step}/") and name.endswith(f"/{LORA_FILE}")]
        download_files(experiment, files, folder)
    logs = _logs_of(experiment, folder)
    if logs is not None:
        events = [name for name in logs.names() if name.startswith(EVENTS)]
        download_files(logs, events, folder.parent / "logs" / experiment.name)


def _logs_of(experiment: Store, folder: Path) -> Store | None:
    """Where the run's events are, if that is in object storage."""
    try:
        settings = load_yaml(read_utf8(folder / SETTINGS_FILE, SETTINGS))
        logger_dir = settings["logger_dir"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    return Store.at(logger_dir).child(experiment.name) if is_url(logger_dir) else None


def _fetch_loras(store: Store, names: list[str], folder: Path) -> None:
    """Copy LoRAs by their usual names, or the only file that may be one; of other files only the names."""
    usual = [name for name in names if name.rpartition("/")[2] in (LORA_FILE, PEFT_FILE, PEFT_CONFIG)]
    usual = [name for name in usual if name.count("/") <= 1]
    beside = [name for name in names if "/" not in name and name not in usual]
    files = [name for name in beside if name.endswith(".safetensors")]
    download_files(store, usual or (files if len(files) == 1 else []), folder)
    for name in beside:
        (folder / name).touch()
