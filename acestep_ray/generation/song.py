"""What a song is made of; light to import, for processes that make none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Song:
    """One piece of music to make: a request with one of its seeds."""

    name: str
    """Its file's name without the suffix, with `/` between folders."""
    line: int
    """Of its request in the file, counted from 1; 0 for the flags' own."""
    prompt: str
    lyrics: str
    language: str | None
    """Of all lyrics, a supported one; None is found line by line."""
    frames: int
    """Latent frames."""
    seed: int
    infer_steps: int
    guidance_scale: float
    scheduler: str
    omega: float
    shift: float
    speaker: list[float] | None

    @property
    def sampled_with(self) -> tuple[int | float | str, ...]:
        """Songs for which this is the same can be sampled together."""
        return (
            self.frames,
            self.infer_steps,
            self.guidance_scale,
            self.scheduler,
            self.omega,
            self.shift,
        )

    def settings(self) -> dict[str, Any]:
        """What decides its sound, beside the models."""
        return {name: value for name, value in asdict(self).items() if name not in ("name", "line")}


def together(songs: Sequence[Song], batch_size: int) -> list[list[Song]]:
    """Groups of at most `batch_size` songs that can be sampled together, in the order of each one's first song."""
    groups: list[list[Song]] = []
    open_groups: dict[tuple[int | float | str, ...], list[Song]] = {}
    for song in songs:
        group = open_groups.get(song.sampled_with)
        if group is None or len(group) == batch_size:
            group = open_groups[song.sampled_with] = []
            groups.append(group)
        group.append(song)
    return groups
