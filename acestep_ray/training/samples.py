"""Music that a run makes as it goes: the first song's conditions through the model as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from acestep_ray.cache.schema import CachedSong
from acestep_ray.config import TrainConfig
from acestep_ray.generation.render import render, write_audio
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.codec import SAMPLE_RATE, latent_frames
from acestep_ray.models.transformer import ACEStepTransformer

STEPS = 60
GUIDANCE_SCALE = 15.0
OMEGA = 10.0


def write_sample(
    directory: Path,
    transformer: ACEStepTransformer,
    song: CachedSong,
    config: TrainConfig,
    device: torch.device,
) -> tuple[np.ndarray, int]:
    """Generate with a song's prompt, lyrics and speaker, write `KEY.wav`, and return the sound and its sample rate."""
    frames = song.latents.shape[-1]
    if config.plot_seconds is not None:
        frames = latent_frames(int(config.plot_seconds * SAMPLE_RATE))
    text = song.text_embeddings[0].float()
    condition = {
        "text": text[None],
        "text_mask": torch.ones(1, len(text), dtype=torch.bool),
        "speaker": song.speaker[None],
        "lyric_ids": song.lyric_ids[None],
        "lyric_mask": torch.full((1, len(song.lyric_ids)), song.has_lyrics),
    }
    # The codec is needed for seconds in hours of training: it is loaded for a sample and let go.
    codec = CheckpointDir.open(config.checkpoint_dir).load_codec(device)
    waveform = render(
        transformer,
        codec,
        {name: value.to(device) for name, value in condition.items()},
        frames=frames,
        seed=config.seed,
        steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
        omega=OMEGA,
        shift=config.shift,
    )
    write_audio(directory / f"{song.key.replace('/', '_')}.wav", waveform)
    return waveform, SAMPLE_RATE
