"""Which songs of a feature cache a model is measured on, and what the model is given to make each of them anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.reader import CacheReader
from acestep_ray.config import EvaluateConfig
from acestep_ray.data.lyrics import MAX_UNKNOWN_SHARE, WARNED_UNKNOWN_SHARE, LyricTokenizer, percent
from acestep_ray.errors import InputError
from acestep_ray.evaluation.candidates import Candidate
from acestep_ray.evaluation.notes import Notes
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.plain_files import NOTES, SETTINGS
from acestep_ray.plain_json import load_json
from acestep_ray.plain_text import read_utf8
from acestep_ray.plain_yaml import load_yaml
from acestep_ray.training.experiment import FINGERPRINTS, IDENTITY_FILE, SETTINGS_FILE
from acestep_ray.training.holdout import hold_out, recordings_of_cache


def open_cache(config: EvaluateConfig, checkpoint: CheckpointDir) -> CacheIndex:
    """The feature cache. Raises InputError where it is none, or was computed with other models."""
    if config.dataset_path is None:
        raise InputError("no feature cache is given", where="--dataset_path", fix="give one")
    index = CacheIndex.open(config.dataset_path)
    fix = "give the checkpoint that the cache was computed with, or run precompute with this one"
    missing = [group for group in ("latents", "text") if group not in index.features]
    if missing:
        raise InputError(
            f"the feature cache holds no {' and no '.join(missing)}",
            where=config.dataset_path,
            fix=f"run `acestep-ray precompute` with --features {','.join((*index.features, *missing))}",
        )
    width = checkpoint.transformer_config.text_embedding_dim
    if index.text_dim != width:
        raise InputError(
            f"the cache's prompts have width {index.text_dim}, the model reads {width}",
            where=config.dataset_path,
            fix=fix,
        )
    noted = index.manifest.get("checkpoint", {})
    others = [
        part
        for part in ("codec", "text_encoder")
        if part in noted and noted[part] != checkpoint.fingerprint(part)
    ]
    if others:
        raise InputError(
            f"the cache was computed with another {' and another '.join(others)} than the checkpoint's",
            where=f"{config.dataset_path} and {config.checkpoint_dir}",
            fix=fix,
        )
    return index


def choose_songs(
    index: CacheIndex, candidates: Sequence[Candidate], config: EvaluateConfig, notes: Notes
) -> list[int]:
    """Positions of the songs to measure on: such as no model was trained on, as far as that is known.

    Those that `--val_songs` holds out; else those that all runs which were trained on this cache held out. A cache that
    no run among the models knows is taken as a whole. Raises InputError for more recordings than there are.
    """
    held_out = held_out_by(index, candidates, config, notes)
    if held_out is None:
        held_out = np.arange(len(index))
        notes.tell(f"measured on the songs of {config.dataset_path}, all taken to be new to the models")
    elif not len(held_out):
        held_out = np.arange(len(index))
        notes.warn("the models' runs held out no songs: the figures are of songs that they were trained on")
    return [int(song) for song in held_out[: config.songs]]


def check_lyrics(
    reader: CacheReader,
    songs: Sequence[int],
    checkpoint: CheckpointDir,
    config: EvaluateConfig,
    notes: Notes,
) -> None:
    """Warn of songs with unknown lyric tokens; `songs` are positions in the cache.

    Raises InputError for lyrics of which most is unknown, unless such songs are kept.
    """
    tokenizer = LyricTokenizer.from_file(checkpoint.lyric_vocab_path())
    shares = {}
    for position in songs:
        song = reader.read(position)
        if song.has_lyrics:
            shares[song.key] = tokenizer.unknown_share(song.lyric_ids.tolist())
    unusable = [f"{key} {percent(share)}" for key, share in shares.items() if share > MAX_UNKNOWN_SHARE]
    if unusable and not config.keep_unknown_lyrics:
        raise InputError(
            "the model cannot sing the lyrics of these songs, since most of their tokens are unknown",
            where=f"{config.dataset_path}, {', '.join(unusable)}",
            fix="run `acestep-ray precompute` again, which rejects them, or measure on them with --keep_unknown_lyrics",
        )
    for key, share in shares.items():
        if share > WARNED_UNKNOWN_SHARE:
            notes.warn(f"{percent(share)} of the lyric tokens of {key} are unknown to the model")


def held_out_by(
    index: CacheIndex, candidates: Sequence[Candidate], config: EvaluateConfig, notes: Notes
) -> np.ndarray | None:
    """Positions of the songs that training held out; None where nothing says that it held out any of this cache."""
    if config.val_songs is not None:
        return hold_out(recordings_of_cache(index), config.val_songs)
    counts = []
    for experiment in dict.fromkeys(c.experiment for c in candidates if c.experiment is not None):
        known, count = _held_out_by_run(experiment, index)
        if known:
            counts.append(count)
        else:
            notes.warn(
                f"{experiment.name} was not trained on this cache; it may have heard songs of it elsewhere"
            )
    if not counts:
        return None
    recordings = recordings_of_cache(index)
    # The smaller of two such sets is a part of the larger.
    return min((hold_out(recordings, count) for count in counts), key=len)


def _held_out_by_run(experiment: Path, index: CacheIndex) -> tuple[bool, int | None]:
    """Whether a run was trained on this cache, and its `val_songs`. Raises InputError for files that do not read."""
    try:
        identity = load_json(read_utf8(experiment / IDENTITY_FILE, NOTES))
        settings = load_yaml(read_utf8(experiment / SETTINGS_FILE, SETTINGS))
        return identity.get(FINGERPRINTS["dataset"]) == index.fingerprint, settings.get("val_songs")
    except FileNotFoundError:
        return False, None
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise InputError(
            f"cannot read what the run held out ({error})",
            where=str(experiment),
            fix="say it yourself with --val_songs",
        ) from None
