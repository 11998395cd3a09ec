"""Experiments in object storage, brought to this machine for as long as their page is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import yaml

from acestep_ray.plain_files import SETTINGS
from acestep_ray.plain_text import read_utf8
from acestep_ray.plain_yaml import load_yaml
from acestep_ray.reporting.curves import EVENTS
from acestep_ray.storage import Store, is_url, scratch_folder
from acestep_ray.storage.folders import download_files, told_of
from acestep_ray.training.experiment import CHECKPOINTS, SETTINGS_FILE

_TENSORS = ".safetensors"


@contextlib.contextmanager
def fetched_experiment(experiment: Store) -> Iterator[Path]:
    """A folder on this machine with all of an experiment but its checkpoints' tensors, and its logs beside it.

    A local experiment is where it is. Mistakes that are found in the copy are told of the original.
    """
    if experiment.is_local:
        yield experiment.path
        return
    with scratch_folder() as temporary:
        folder = temporary / experiment.name
        folder.mkdir()
        names = [
            name for name in experiment.names() if not (name.endswith(_TENSORS) and f"{CHECKPOINTS}/" in name)
        ]
        download_files(experiment, names, folder)
        logs = _logs_of(experiment, folder)
        if logs is not None:
            events = [name for name in logs.names() if name.rpartition("/")[2].startswith(EVENTS)]
            download_files(logs, events, folder.parent / "logs" / experiment.name)
        with told_of(experiment, folder):
            yield folder


def _logs_of(experiment: Store, folder: Path) -> Store | None:
    """Where the experiment's events are, if that is in object storage."""
    for settings in (folder / SETTINGS_FILE, folder / "best" / SETTINGS_FILE):
        with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError):
            logger_dir = load_yaml(read_utf8(settings, SETTINGS))["logger_dir"]
            return Store.at(logger_dir).child(experiment.name) if is_url(logger_dir) else None
    return None
