"""Songs of the cache as a padded batch, with every random draw made from counters.

A draw is a function of (seed, epoch, song's key) and of nothing else; a song comes once an epoch, so no two draws of a
run are alike. Neither workers, nor batch mates, nor a resume change them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from acestep_ray.cache.schema import CachedSong
from acestep_ray.diffusion.objective import SSLTarget, TrainingBatch
from acestep_ray.diffusion.schedule import sigma_index


@dataclass(frozen=True)
class ConditionDropout:
    """Probabilities that a sample's conditions are dropped, each on its own."""

    text: float = 0.15
    speaker: float = 0.5
    lyrics: float = 0.15


@dataclass(frozen=True)
class Draws:
    """Every random choice for one song in one step."""

    noise: Tensor
    """(8, 16, frames)."""
    sigma: Tensor
    """Scalar noise level."""
    prompt: int
    """Which of the song's cached prompts."""
    drop_text: bool
    drop_speaker: bool
    drop_lyrics: bool
    dropout_seed: int | None
    """Seed of the lyric encoder's dropout; None turns it off."""


def counter_seed(*counters: object) -> int:
    """A 63-bit seed from any counters."""
    digest = hashlib.blake2b("/".join(map(str, counters)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def song_noise(song: CachedSong, seed: int) -> Tensor:
    """Standard normal noise of the song's shape, the same on every device."""
    return torch.randn(song.latents.shape, generator=torch.Generator().manual_seed(seed))


def draw(song: CachedSong, sigmas: Tensor, dropout: ConditionDropout, *, seed: int, epoch: int) -> Draws:
    """The draws for a song's one appearance in `epoch`; `sigmas` (1000,) is the training schedule."""
    base = counter_seed(seed, epoch, song.key)
    random = np.random.default_rng(base)
    u = torch.sigmoid(torch.tensor(random.standard_normal()))
    drops = random.random(3)
    return Draws(
        noise=song_noise(song, base),
        sigma=sigmas[sigma_index(u)],
        prompt=choose_prompt(song.prompt_sources, random),
        drop_text=bool(drops[0] < dropout.text),
        drop_speaker=bool(drops[1] < dropout.speaker),
        drop_lyrics=bool(drops[2] < dropout.lyrics),
        dropout_seed=base,
    )


def choose_prompt(sources: Sequence[str], random: np.random.Generator) -> int:
    """One source (the tags, or a recaption) uniformly, then one of its variants."""
    chosen = random.choice(sorted(set(sources)))
    return int(random.choice([i for i, source in enumerate(sources) if source == chosen]))


def build_batch(
    songs: Sequence[CachedSong], draws: Sequence[Draws], *, ssl_stride: int, with_ssl: bool
) -> TrainingBatch:
    """Pad songs to one batch in float32, conditions dropped as drawn.

    A dropped prompt is zeros under its own mask, a dropped speaker zeros, dropped lyrics zeros with an empty mask. A
    song without lyrics has one token 0 outside the mask, as the released model is sampled.
    """
    texts = [song.text_embeddings[d.prompt].float() for song, d in zip(songs, draws, strict=True)]
    seeds = [d.dropout_seed for d in draws]
    return TrainingBatch(
        latents=_pad_time([song.latents.float() for song in songs]),
        noise=_pad_time([d.noise for d in draws]),
        sigmas=torch.stack([d.sigma for d in draws]).float(),
        frame_mask=_lengths_mask([song.latents.shape[-1] for song in songs]),
        text=pad_sequence(
            [text * (not d.drop_text) for text, d in zip(texts, draws, strict=True)], batch_first=True
        ),
        text_mask=_lengths_mask([len(text) for text in texts]),
        speaker=torch.stack(
            [song.speaker * (not d.drop_speaker) for song, d in zip(songs, draws, strict=True)]
        ),
        lyric_ids=pad_sequence(
            [song.lyric_ids * (not d.drop_lyrics) for song, d in zip(songs, draws, strict=True)],
            batch_first=True,
        ),
        lyric_mask=pad_sequence(
            [
                torch.full(song.lyric_ids.shape, song.has_lyrics and not d.drop_lyrics)
                for song, d in zip(songs, draws, strict=True)
            ],
            batch_first=True,
        ),
        lyric_start=torch.tensor([1 + len(text) for text in texts]),
        dropout_seeds=None if None in seeds else torch.tensor(seeds),
        ssl={name: _ssl_target(songs, name, ssl_stride) for name in songs[0].ssl} if with_ssl else {},
        keys=[song.key for song in songs],
    )


def _ssl_target(songs: Sequence[CachedSong], name: str, stride: int) -> SSLTarget:
    features = pad_sequence([song.ssl[name] for song in songs], batch_first=True)
    return SSLTarget(features, torch.tensor([song.ssl_frames[name] for song in songs]), stride)


def _pad_time(rows: Sequence[Tensor]) -> Tensor:
    """Rows (C, H, frames) → (B, C, H, W), zeros at the end."""
    width = max(row.shape[-1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[-1])) for row in rows])


def _lengths_mask(lengths: Sequence[int]) -> Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
