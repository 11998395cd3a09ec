"""Music that a run makes as it goes: the first song's conditions through the model as it is."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from acestep_ray.cache.schema import CachedSong
from acestep_ray.config import TrainConfig
from acestep_ray.diffusion.sampler import sample
from acestep_ray.generation.render import decode, starting_noise, write_audio, write_mel_picture
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.codec import SAMPLE_RATE, latent_frames
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.storage import Store, scratch_folder, upload_folder
from acestep_ray.storage.files import written_whole


class Sampler(TypedDict):
    """How a run's samples are generated: arguments of `diffusion.sampler.sample`."""

    steps: int
    guidance_scale: float
    omega: float


SAMPLER: Sampler = {"steps": 60, "guidance_scale": 15.0, "omega": 10.0}


# Bytes: files carry a suffix, and a prefix while they are written.
_LONGEST_NAME = 200


class SampleFolder:
    """Where a run's samples are written: its own folder, or one on this machine that goes with the run, whose files are
    copied to object storage.

    MLflow reads them later, from this machine.
    """

    def __init__(self, store: Store):
        self._store = store
        self._stack = contextlib.ExitStack()
        self.path = store.path if store.is_local else self._stack.enter_context(scratch_folder())

    def publish(self, name: str) -> None:
        """Copy the files of a sample to where they belong."""
        if not self._store.is_local:
            upload_folder(self.path / name, self._store.child(name))

    def close(self) -> None:
        """Forget what was only kept for others to read."""
        self._stack.close()


def write_sample(
    directory: Path | None,
    transformer: ACEStepTransformer,
    song: CachedSong,
    config: TrainConfig,
    device: torch.device,
) -> tuple[np.ndarray, int] | None:
    """Generate with a song's prompt, lyrics and speaker; returns the sound and its sample rate.

    `directory` gets `KEY.wav`, its mel picture `KEY.png` and `KEY.json` with what it was made from, in the spelling of
    `file_name`. Without one, this worker only takes part in the model's passes.
    """
    frames = song.latents.shape[-1]
    if config.plot_seconds is not None:
        frames = latent_frames(int(config.plot_seconds * SAMPLE_RATE))
    latents = sample(
        transformer,
        starting_noise(frames, config.seed).to(device),
        song.condition(device),
        **SAMPLER,
        shift=config.shift,
    )
    if directory is None:
        return None
    # The codec is needed for seconds in hours of training: it is loaded for a sample and let go.
    waveform = decode(CheckpointDir.open(config.checkpoint_dir).load_codec(device), latents)
    name = file_name(song.key)
    write_audio(directory / f"{name}.wav", waveform)
    with written_whole(directory / f"{name}.png") as picture:
        write_mel_picture(picture, waveform, f"{song.key} · seed {config.seed}")
    made_from = {
        "key": song.key,
        "prompt": song.prompts[0],
        "lyrics": song.lyric_ids.tolist() if song.has_lyrics else [],
        "seed": config.seed,
        "seconds": waveform.shape[1] / SAMPLE_RATE,
        "shift": config.shift,
        **SAMPLER,
    }
    with written_whole(directory / f"{name}.json") as file:
        file.write((json.dumps(made_from, ensure_ascii=False, indent=1) + "\n").encode())
    return waveform, SAMPLE_RATE


def file_name(key: str) -> str:
    """A key as the name of files: what they cannot be called is `_`, and a long key ends in its hash."""
    name = "".join(character if character.isprintable() else "_" for character in key.replace("/", "_"))
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    return f"{name.encode()[:_LONGEST_NAME].decode(errors='ignore')}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
