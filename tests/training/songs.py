"""Songs as the cache gives them, without a cache."""

from __future__ import annotations

import torch

from acestep_ray.cache.schema import CachedSong


def cached_song(
    key: str, *, frames: int = 12, lyrics: int = 5, text: tuple[int, ...] = (4, 6, 3)
) -> CachedSong:
    """A song of random features; one prompt from the tags, then one of each recaption."""
    generator = torch.Generator().manual_seed(sum(map(ord, key)) + frames)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return CachedSong(
        key=key,
        latents=normal(8, 16, frames).half(),
        prompts=[f"prompt {i}" for i in range(len(text))],
        prompt_sources=["tags", *(f"recaption/{i}" for i in range(1, len(text)))],
        text_embeddings=[normal(tokens, 24).half() for tokens in text],
        lyric_ids=torch.randint(1, 60, (lyrics,), generator=generator) if lyrics else torch.zeros(1).long(),
        has_lyrics=lyrics > 0,
        speaker=normal(16),
        ssl={
            "mert": (normal(2 * frames, 20) * 40).to(torch.int8),
            "m-hubert": normal(frames, 12).to(torch.int8),
        },
        ssl_frames={"mert": 2 * frames, "m-hubert": frames},
    )
