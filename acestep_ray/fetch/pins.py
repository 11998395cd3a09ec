"""Models that the release names without a revision: the first run notes which it takes, and later runs take it too."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from acestep_ray.errors import AceStepError, InputError
from acestep_ray.fetch.download import Content, Downloader, NotPublishedError, shown
from acestep_ray.models.checkpoint import Release
from acestep_ray.models.fingerprints import file_sha256
from acestep_ray.plain_files import JSON, read_limited
from acestep_ray.plain_json import load_json
from acestep_ray.storage import Store

PINS = "checkpoint.lock.json"
"""Revisions and sums of the SSL models; another directory that gets a copy of this file gets the same models."""

_FORMAT = 1
_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class PinnedModel:
    """A model at one revision."""

    repository: str
    revision: str
    files: dict[str, Content]
    """By name in the repository."""


def newest(repository: str, endpoint: str, downloader: Downloader, say: Callable[[str], None]) -> PinnedModel:
    """The newest commit of a model, and what the Hub tells of the files that `SSLEncoder` reads.

    Raises AceStepError where the server does not tell them.
    """
    try:
        revision = downloader.describe(file_url(endpoint, repository, "main", _CONFIG), say).commit
    except NotPublishedError:
        revision = None
    files = {}
    if revision is not None:
        url = file_url(endpoint, repository, revision, _CONFIG)
        files[_CONFIG] = downloader.describe(url, say).content
        for name in _WEIGHTS:
            try:
                url = file_url(endpoint, repository, revision, name)
                files[name] = downloader.describe(url, say).content
            except NotPublishedError:
                if name == _WEIGHTS[-1]:
                    raise
            else:
                break
    if revision is None or not all(content.has_sum for content in files.values()):
        raise AceStepError(
            f"{shown(endpoint)} does not tell the revision and the sums of {repository}\n"
            f"  → put the {PINS} of a directory that was fetched from huggingface.co into this one"
        )
    return PinnedModel(repository, revision, files)


def with_sha256(folder: Path, model: PinnedModel) -> PinnedModel:
    """With the SHA-256 of every file; all are in `folder`, and are those that the Hub published."""
    files = {
        name: replace(content, sha256=content.sha256 or file_sha256(folder / name), git_blob=None)
        for name, content in model.files.items()
    }
    return replace(model, files=files)


def read_pins(root: Path, release: Release) -> dict[str, PinnedModel]:
    """The pinned models by folder. Raises InputError for a file that is damaged or of other models."""
    path = root / PINS
    try:
        stored = load_json(read_limited(path, JSON))
        if stored["format"] != _FORMAT:
            raise ValueError(f"its format is {stored['format']!r}, not {_FORMAT}")
        pins = {folder: _parse_pin(model) for folder, model in stored["models"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"cannot read which revisions are pinned ({error})",
            where=str(path),
            fix="copy it again, or delete it: the newest revisions are taken then",
        ) from None
    repositories = {folder: model.repository for folder, model in pins.items()}
    if not repositories.items() <= release.ssl_repositories.items():
        raise InputError(
            "it pins other models than the checkpoint's",
            where=str(path),
            fix="delete it, or take another directory",
        )
    return pins


def _parse_pin(stored: Mapping[str, Any]) -> PinnedModel:
    """Raises what a value of a wrong kind raises; the names are those of files without a folder."""
    files = {name: Content(**values) for name, values in stored["files"].items()}
    for name, content in files.items():
        if name not in (_CONFIG, *_WEIGHTS):
            raise ValueError(f"it names the file {name!r}")
        if not content.has_sum or not isinstance(content.size, int):
            raise ValueError(f"it has no size or no sum of {name!r}")
    return PinnedModel(str(stored["repository"]), str(stored["revision"]), files)


def write_pins(root: Path, pins: Mapping[str, PinnedModel]) -> None:
    """Note the models by folder, whole or not at all."""
    if not pins:
        return
    models = {}
    for folder, model in pins.items():
        models[folder] = asdict(model)
        for values in models[folder]["files"].values():
            for name in [name for name, value in values.items() if value is None]:
                del values[name]
    text = json.dumps({"format": _FORMAT, "models": models}, indent=2) + "\n"
    path = root / PINS
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        Store.at(root).write_bytes(PINS, text.encode())


def file_url(endpoint: str, repository: str, revision: str, name: str) -> str:
    """Address of a file of the Hub's, or of a mirror's."""
    return f"{endpoint}/{repository}/resolve/{quote(revision, safe='')}/{quote(name)}"
