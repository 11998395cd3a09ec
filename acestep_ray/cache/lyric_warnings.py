"""What the summary of a run says of its songs' lyrics: what was changed in them, and what the model cannot read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from acestep_ray.data.lyric_text import LyricNotes, read_lyric_text
from acestep_ray.data.schema import row_text
from acestep_ray.errors import InputError

if TYPE_CHECKING:
    from acestep_ray.data.lyrics import LyricTokenizer, LyricTokens

_NAMED_SONGS = 5
# Lyrics are encoded where a look at their characters is not enough, which takes milliseconds each.
_MEASURED_SONGS = 5_000


def lyric_warnings(
    rows: Iterable[Mapping[str, Any]], tokenizer: LyricTokenizer | None, rejected: Collection[str]
) -> list[str]:
    """Warnings on the lyrics of all songs, a line for each kind; `tokenizer` is None where no lyrics are encoded.

    The lyrics of `rejected` songs, by key, are not encoded here: they may be what ended a worker.
    """
    notes = LyricNotes()
    unknown: list[tuple[float, str, str]] = []
    measured = 0
    for row in rows:
        lyrics, of_song = read_lyric_text(row_text(row, "norm_lyrics"))
        notes.add(row["keys"], of_song)
        language = row_text(row, "language")
        if (
            tokenizer is None
            or row["keys"] in rejected
            or measured == _MEASURED_SONGS
            or not tokenizer.may_lack_tokens(lyrics, language)
        ):
            continue
        measured += 1
        tokens = _encoded(lyrics, language, tokenizer)
        if tokens is not None and _is_warned(tokens):
            unknown.append((tokens.unknown_share, row["keys"], lyrics))
    warnings = notes.warnings()
    if unknown:
        warnings.append(_unknown_warning(unknown))
    return warnings


def has_unusable_lyrics(lyrics: str, language: str, tokenizer: LyricTokenizer) -> bool:
    """Whether a song is rejected for its unknown tokens, unless such songs are kept."""
    from acestep_ray.data.lyrics import is_unusable

    if not tokenizer.may_lack_tokens(lyrics, language):
        return False
    tokens = _encoded(lyrics, language, tokenizer)
    return tokens is not None and is_unusable(tokens)


def _encoded(lyrics: str, language: str, tokenizer: LyricTokenizer) -> LyricTokens | None:
    """None where the lyrics cannot be encoded, which the song's reject says."""
    try:
        return tokenizer.encode(lyrics, language or None)
    except (MemoryError, ImportError):
        raise
    except InputError:
        return None
    except Exception:  # as in `encode_lyrics`
        return None


def _is_warned(tokens: LyricTokens) -> bool:
    from acestep_ray.data.lyrics import WARNED_UNKNOWN_SHARE

    return tokens.unknown_share > WARNED_UNKNOWN_SHARE


def _unknown_warning(unknown: list[tuple[float, str, str]]) -> str:
    from acestep_ray.data.lyrics import percent, scripts_without_tokens

    unknown.sort(key=lambda song: (-song[0], song[1]))
    named = ", ".join(f"{key} {percent(share)}" for share, key, _ in unknown[:_NAMED_SONGS])
    more = ", …" if len(unknown) > _NAMED_SONGS else ""
    scripts = dict.fromkeys(script for *_, lyrics in unknown for script in scripts_without_tokens(lyrics))
    names = f" ({', '.join(scripts)})" if scripts else ""
    songs = f"{len(unknown)} song{'s' * (len(unknown) != 1)}"
    return f"lyrics of {songs} have tokens that are unknown to the model{names}: {named}{more}"
