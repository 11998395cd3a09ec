"""What reading a source of songs finds out about it, for the user."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from acestep_ray.data.lyric_text import LyricNotes

_NAMED = 3


@dataclass
class Findings:
    """Problems concern the whole source and stop the job; warnings are shown in its summary."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layouts: Counter[str] = field(default_factory=Counter)
    """Songs by what their texts were taken for."""
    kinds_of_tables: dict[str, str] = field(default_factory=dict)
    """What a table was taken for, by its name, where it is no plain table."""
    grouped: dict[str, list[str]] = field(default_factory=dict)
    """Files that share one warning, by its text."""

    lyrics: LyricNotes = field(default_factory=LyricNotes)
    """What was changed in lyrics."""

    def group(self, warning: str, origin: str) -> None:
        """Note a warning that many files may share: it is shown once, with their number and the first of them."""
        self.grouped.setdefault(warning, []).append(origin)

    def add(self, other: Findings) -> None:
        """Take what was found out about a part of the source."""
        self.problems += other.problems
        self.warnings += other.warnings
        self.layouts += other.layouts
        self.lyrics.update(other.lyrics)
        for warning, origins in other.grouped.items():
            self.grouped.setdefault(warning, []).extend(origins)

    def close_groups(self) -> None:
        """Turn the grouped warnings into one line each."""
        for warning, origins in self.grouped.items():
            if len(origins) == 1:
                self.warnings.append(f"{origins[0]}: {warning}")
                continue
            more = ", …" if len(origins) > _NAMED else ""
            self.warnings.append(f"{len(origins):,} files: {warning} ({', '.join(origins[:_NAMED])}{more})")
        self.grouped.clear()
        self.warnings += self.lyrics.warnings()
        self.lyrics = LyricNotes()

    def layout_lines(self) -> list[str]:
        """One line for each kind of texts: `120 songs in ACE-Step 1.5's layout`."""
        return [
            f"{count:,} song{'s' * (count != 1)} in {layout}"
            for layout, count in self.layouts.most_common()
            if count
        ]
