"""`acestep-ray cache stats`: what a feature cache holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from acestep_ray.cache.index import read_manifest
from acestep_ray.cache.schema import FEATURE_GROUPS, LEDGER_SCHEMA, REJECT_SCHEMA
from acestep_ray.cache.verify import verified_table
from acestep_ray.errors import InputError
from acestep_ray.paths import shell_command
from acestep_ray.storage import Store
from acestep_ray.terminal import fact_table
from acestep_ray.units import size_text

_HISTOGRAM_SECONDS = 30
_BAR_WIDTH = 40


@dataclass(frozen=True)
class StatsSummary:
    """What a cache holds."""

    cache: str
    songs: int
    parts: int
    seconds: float
    """Of audio, padding excluded."""
    num_bytes: int
    """Of the songs; index and ledger are a few dozen bytes a song more."""
    group_bytes: dict[str, int]
    """By feature group; `other` is the rest: texts, lyric tokens, footers."""
    lengths: list[int]
    """Songs by length, a number for each 30 s."""
    languages: dict[str, int]
    """In how many songs a language is sung; the empty name counts songs without lyrics."""
    prompts: tuple[int, float, int]
    """Least, mean and most prompts of a song."""
    rejects: dict[str, int]
    """By reason."""

    def render(self) -> str:
        """The figures as a table."""
        per_240s = 240 / self.seconds if self.seconds else 0
        num_bytes = [f"{size_text(self.num_bytes)}, {size_text(self.num_bytes * per_240s)} for 240 s"]
        for name, of_group in self.group_bytes.items():
            num_bytes.append(f"{name:<10} {size_text(of_group)}, {size_text(of_group * per_240s)} for 240 s")
        least, mean, most = self.prompts
        lengths = []
        for i, count in enumerate(self.lengths):
            seconds = f"{i * _HISTOGRAM_SECONDS}–{(i + 1) * _HISTOGRAM_SECONDS} s"
            bar = "█" * round(_BAR_WIDTH * count / max(1, *self.lengths))
            lengths.append(f"{seconds:<10} {count:>8} {bar}")
        languages = [f"{name or 'none':<10} {count:>8}" for name, count in self.languages.items()]
        rejects = [f"{reason:<14} {count:>4}" for reason, count in self.rejects.items()]
        return fact_table(
            [
                ("cache", self.cache),
                ("songs", f"{self.songs} in {self.parts} parts, {self.seconds / 3600:.1f} h of audio"),
                ("bytes", "\n".join(num_bytes)),
                ("prompts", f"{least} to {most} a song, {mean:.1f} in the mean"),
                ("lengths", "\n".join(lengths)),
                ("lyrics", "\n".join(["by language", *languages])),
                ("rejects", "\n".join([str(sum(self.rejects.values())), *rejects])),
            ]
        )


def cache_stats(place: str) -> StatsSummary:
    """Figures of the cache at a path or URL, from its ledger and rejects. Raises InputError if there is none."""
    store = Store.at(place)
    manifest = read_manifest(store)
    problems: list[str] = []
    ledger = verified_table(store, manifest, "ledger", LEDGER_SCHEMA, problems)
    rejects = verified_table(store, manifest, "rejects", REJECT_SCHEMA, problems)
    if problems:
        verify = shell_command("acestep-ray", "cache", "verify", store.url)
        raise InputError(problems[0], where=store.url, fix=f"run `{verify}`")
    seconds = ledger["duration_seconds"].to_numpy()
    bins = max(1, int(np.ceil(seconds.max(initial=0) / _HISTOGRAM_SECONDS)))
    lengths, _ = np.histogram(seconds, bins, (0, bins * _HISTOGRAM_SECONDS))
    prompts = ledger["prompt_count"].to_numpy()
    total = int(ledger["length"].to_numpy().sum())
    groups = {name: int(ledger[f"{name}_bytes"].to_numpy().sum()) for name in FEATURE_GROUPS}
    return StatsSummary(
        cache=store.url,
        songs=len(ledger),
        parts=pc.count_distinct(ledger["file"]).as_py(),
        seconds=float(seconds.sum()),
        num_bytes=total,
        group_bytes={**groups, "other": total - sum(groups.values())},
        lengths=lengths.tolist(),
        languages=_languages(ledger["languages"]),
        prompts=(int(prompts.min()), float(prompts.mean()), int(prompts.max()))
        if len(prompts)
        else (0, 0.0, 0),
        rejects=dict(Counter(rejects["reason"].to_pylist()).most_common()),
    )


def _languages(column: pa.ChunkedArray) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for batch in column.chunks:
        for languages in batch.to_pylist():
            counts.update(languages or [""])
    return dict(counts.most_common())
