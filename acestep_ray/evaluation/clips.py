"""The clips that are scored: what a model makes of the songs' prompts and lyrics, or audio that is there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from acestep_ray.cache.schema import CachedSong
from acestep_ray.config import EvaluateConfig
from acestep_ray.diffusion.sampler import sample
from acestep_ray.errors import InputError
from acestep_ray.evaluation.embeddings import find_audio
from acestep_ray.generation.render import decode, decoding_bytes, free_bytes, starting_noise, write_audio
from acestep_ray.models.codec import SAMPLE_RATE, MusicCodec, latent_frames
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.terminal import Progress
from acestep_ray.training.batch import counter_seed

SUFFIX = ".wav"


@dataclass(frozen=True)
class Clip:
    """A piece of music that a model has made."""

    key: str
    """The song it was made from, or the name of its file."""
    path: Path | None
    """None where the model made nothing that could be written."""
    prompt: str | None = None
    seed: int | None = None


def generate_clips(
    transformer: ACEStepTransformer,
    codec: MusicCodec,
    songs: Sequence[CachedSong],
    folder: Path,
    config: EvaluateConfig,
    device: torch.device,
) -> list[Clip]:
    """Let the model make every song anew, `config.duration` seconds of it, as a file in `folder`.

    A song's noise is the same for every model. Sound that is not finite is not written.
    """
    clips = []
    frames = latent_frames(int(config.duration * SAMPLE_RATE))
    progress = Progress(f"clips of {folder.name}", len(songs), "clips")
    for number, song in enumerate(progress.over(songs), 1):
        seed = counter_seed("evaluation", config.seed, song.key)
        latents = sample(
            transformer,
            starting_noise(frames, seed).to(device),
            song.condition(device),
            steps=config.infer_steps,
            guidance_scale=config.guidance_scale,
            omega=config.omega,
            shift=config.shift,
        )
        wave = decode(codec, latents, overlapped=decoding_bytes(codec, frames) > free_bytes(device))
        path = None
        if np.isfinite(wave).all():
            path = folder / f"{number:03d}-{_file_name(song.key)}{SUFFIX}"
            write_audio(path, wave)
        clips.append(Clip(song.key, path, song.prompts[0], seed))
    return clips


def find_clips(generated_dir: str) -> dict[str, list[Clip]]:
    """The clips of a folder by the subfolder that they lie in, or all of it as one set where there are no subfolders.

    Raises InputError for a folder without audio, and for one that has audio both in itself and in subfolders.
    """
    flag, root = "--generated_dir", Path(generated_dir)
    sets: dict[str, list[Path]] = {}
    for path in find_audio(root, flag):
        parts = path.relative_to(root).parts
        sets.setdefault(parts[0] if len(parts) > 1 else "", []).append(path)
    if "" in sets and len(sets) > 1:
        raise InputError(
            "audio lies both in this folder and in subfolders of it",
            where=f"{flag} {generated_dir}",
            fix="give a folder of one model's audio, or one with a subfolder for each model",
        )
    return {
        name or root.resolve().name: [Clip(path.relative_to(root / name).as_posix(), path) for path in paths]
        for name, paths in sets.items()
    }


def _file_name(key: str) -> str:
    """A key as a part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_. " else "_" for c in key)[:80]
