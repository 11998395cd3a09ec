"""The songs that a run trains on: those of a feature cache, or songs that are encoded while it trains."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import numpy as np

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.schema import FEATURE_GROUPS, INCOMING, MANIFEST, hash_of
from acestep_ray.cache.songs import Recipe, Settings
from acestep_ray.config import PrecomputeConfig, TrainConfig
from acestep_ray.data.lyrics import LyricTokenizer
from acestep_ray.data.songs import SongTable
from acestep_ray.errors import InputError
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.storage import Store
from acestep_ray.terminal import show_line, show_summary
from acestep_ray.training.holdout import recordings_of_cache
from acestep_ray.training.scan import SONGS, read_songs, scan
from acestep_ray.training.streaming import Stream


@dataclass(frozen=True)
class Songs:
    """The usable songs of a run, sorted by key."""

    latent_frames: np.ndarray
    """(songs,)."""
    recordings: list[str]
    """Which rows are of one recording: equal names."""
    fingerprint: str
    stream: Stream | None
    """Where there is no cache."""


def open_songs(config: TrainConfig, checkpoint: CheckpointDir) -> CacheIndex | SongTable:
    """The feature cache, or the songs themselves. Raises InputError for what the model cannot be trained on."""
    place = Store.at(config.dataset_path)
    if place.status(MANIFEST) is not None or place.names(INCOMING):
        index = CacheIndex.open(place)
        check_cache_fits(index, checkpoint, config)
        if config.texts != "auto" or config.tag_metas:
            raise InputError(
                "the texts of a feature cache are read already",
                where="--texts" if config.texts != "auto" else "--tag_metas",
                fix="give the flag to precompute, and leave it out here",
            )
        return index
    songs = SongTable.open(config.dataset_path, layout=config.texts, tag_metas=config.tag_metas)
    missing = [name for name in checkpoint.transformer_config.ssl_names if name not in checkpoint.ssl_names]
    if config.ssl_coeff > 0 and missing:
        raise InputError(
            f"the SSL losses need the features of {' and '.join(missing)}, the checkpoint has no such encoder",
            where=config.checkpoint_dir,
            fix="give a checkpoint that holds mert/ and mhubert/, or train with --ssl_coeff 0",
        )
    checkpoint.lyric_vocab_path()
    return songs


def check_cache_fits(index: CacheIndex, checkpoint: CheckpointDir, config: TrainConfig) -> None:
    """Raise InputError when the cache was computed for a model of other sizes, or lacks what the losses need."""
    model = checkpoint.transformer_config
    where = config.dataset_path
    fix = "give the checkpoint that the cache was computed with, or run precompute with this one"
    if index.text_dim != model.text_embedding_dim:
        raise InputError(
            f"the cache's prompts have width {index.text_dim}, the model reads {model.text_embedding_dim}",
            where=where,
            fix=fix,
        )
    check_encoders(index, checkpoint, config)
    if config.ssl_coeff == 0:
        return
    wanted = dict(zip(model.ssl_names, model.ssl_latent_dims, strict=True))
    if index.ssl_dims != wanted:
        raise InputError(
            f"the SSL losses need the features {wanted}, the cache has {index.ssl_dims or 'none'}",
            where=where,
            fix="run precompute with a checkpoint that holds mert/ and mhubert/, or train with --ssl_coeff 0"
            if "ssl" in index.features
            else f"run precompute with --features {','.join((*index.features, 'ssl'))}, or train with --ssl_coeff 0",
        )


def check_encoders(index: CacheIndex, checkpoint: CheckpointDir, config: TrainConfig) -> None:
    """Raise InputError when the features come from other models than the checkpoint's, unless that is allowed."""
    noted = index.manifest.get("checkpoint", {})
    parts = ["codec", "text_encoder", *(checkpoint.ssl_names if config.ssl_coeff > 0 else ())]
    others = [part for part in parts if part in noted and noted[part] != checkpoint.fingerprint(part)]
    if others and not config.allow_changes:
        raise InputError(
            f"the cache was computed with another {' and another '.join(others)} than the checkpoint's",
            where=f"{config.dataset_path} and {config.checkpoint_dir}",
            fix="give the checkpoint that the cache was computed with, run precompute with this one, or train "
            "all the same with --allow_changes",
        )


def find_songs(
    songs: CacheIndex | SongTable,
    checkpoint: CheckpointDir,
    config: TrainConfig,
    experiment: Store,
    use_gpu: bool,
) -> Songs:
    """The songs of the cache, or of the scan that finds out which can be used."""
    if isinstance(songs, CacheIndex):
        recordings = recordings_of_cache(songs)
        return Songs(songs.latent_frames, recordings, songs.fingerprint, stream=None)
    stream = scan_for_stream(songs, checkpoint, config, experiment, use_gpu)
    encoders = [checkpoint.fingerprint(part) for part in ("codec", "text_encoder", *checkpoint.ssl_names)]
    fingerprint = hash_of(
        encoders, stream.recipe.models, hashlib.sha256(experiment.read_bytes(SONGS)).hexdigest()
    )
    table = read_songs(stream.scan)
    recordings = [json.loads(song)["filename"] for song in table["song"].to_pylist()]
    return Songs(table["latent_frames"].to_numpy(), recordings, fingerprint, stream)


def scan_for_stream(
    songs: SongTable, checkpoint: CheckpointDir, config: TrainConfig, experiment: Store, use_gpu: bool
) -> Stream:
    """Find out which songs can be used, with the settings of a cache that was computed without any flags."""
    show_line(
        f"{config.dataset_path} is no feature cache: every epoch decodes and encodes its songs again. "
        "`acestep-ray precompute` does that once, and training on its cache gives the same numbers."
    )
    defaults = PrecomputeConfig(dataset_path="", checkpoint_dir="", output_dir="")
    tokenizer = LyricTokenizer.from_file(checkpoint.lyric_vocab_path())
    settings = Settings(
        window=defaults.window,
        window_seconds=defaults.window_seconds,
        loudness_lufs=defaults.loudness_lufs,
        tag_shuffles=defaults.tag_shuffles,
        ssl_frame_stride=defaults.ssl_frame_stride,
        seed=defaults.seed,
        speaker_dim=checkpoint.transformer_config.speaker_embedding_dim,
    )
    recipe = Recipe(
        settings,
        {"lyric_tokenizer": tokenizer.fingerprint},
        config.min_decoded,
        config.keep_unknown_lyrics,
    )
    show_summary(scan(songs, recipe, tokenizer, experiment).render())
    features = FEATURE_GROUPS if config.ssl_coeff > 0 else tuple(g for g in FEATURE_GROUPS if g != "ssl")
    encoding = replace(settings, features=features, precision="16" if use_gpu else "32")
    return Stream(songs.root, experiment, str(checkpoint.path), replace(recipe, settings=encoding))
