"""One HTML file that holds all it shows: tables, figures, pictures and sound to play."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from acestep_ray.errors import AceStepError, InputError
from acestep_ray.hidden_secrets import without_secrets
from acestep_ray.reporting.drawing import PictureError, data_uri, draw, picture_file_uri, picture_uri
from acestep_ray.reporting.sound import MEDIA_TYPE, read_sound
from acestep_ray.reporting.style import STYLE
from acestep_ray.terminal.numbers import number_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIP_SECONDS = 60.0
PAGE_SOUND_BYTES = 32 * 2**20

# No script runs and nothing is fetched, whatever a text might hold.
_POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
_ALIGNMENTS = {"l": "", "r": "right", "c": "centre"}
_CONTENTS_FROM = 4
"""Sections from which a page has a list of them."""
# Of C0 and C1, HTML allows only white space; half a surrogate pair is no text.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Page:
    """A page, filled from top to bottom and then written. What is given to it is text, never HTML.

    A page holds at most `sound_bytes` of sound: of a clip beyond that, title, picture and text are shown, and the
    name of its file. So with many clips the most telling ones come first. Of each clip the first `clip_seconds` are
    held, which takes about 1.5 MB a minute in the page.
    """

    def __init__(
        self,
        title: str,
        text: str | None = None,
        *,
        clip_seconds: float = CLIP_SECONDS,
        sound_bytes: int = PAGE_SOUND_BYTES,
    ):
        self.notes: list[str] = []
        """What was given to `note`."""
        self._title = title
        self._parts: list[str] = []
        self._sections: list[str] = []
        self._figures = 0
        self._together: tuple[str, list[str]] = ("", [])
        self._clip_seconds = clip_seconds
        self._sound_bytes_left = sound_bytes
        self._beginning = "" if text is None else _paragraphs(text)

    def section(self, heading: str, text: str | None = None) -> None:
        """Begin a section; `text` is as in `text`."""
        self._sections.append(heading)
        self._add(f'<h2 id="section-{len(self._sections)}">{_escaped(heading)}</h2>')
        if text is not None:
            self.text(text)

    def text(self, text: str) -> None:
        """Add prose; an empty line parts paragraphs."""
        self._add(_paragraphs(text))

    def verbatim(self, text: str) -> None:
        """Add text as it is, with its spaces and lines."""
        self._add(f"<pre>{_escaped(text)}</pre>")

    def note(self, text: str) -> None:
        """Add what the reader should not miss: a warning, or that something is not there."""
        text = without_secrets(text)
        self.notes.append(text)
        self._add(f'<p class="note">{_escaped(text)}</p>')

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]],
        align: str | None = None,
        caption: str | None = None,
        marked: int | None = None,
    ) -> None:
        """Add a table.

        `align` has a letter a column, `l`, `r` or `c`; by default, numbers are on the right. `marked` is the row to
        be seen first.
        """
        rows = [list(row) for row in rows]
        align = _alignment(len(columns), rows) if align is None else align
        assert len(align) == len(columns), f"{len(align)} alignments for {len(columns)} columns"
        sides = [f' class="{_ALIGNMENTS[side]}"' if side != "l" else "" for side in align]
        head = "".join(
            f'<th scope="col"{side}>{_escaped(column)}</th>'
            for column, side in zip(columns, sides, strict=True)
        )
        lines = []
        for number, row in enumerate(rows):
            cells = "".join(
                f"<td{side}>{_escaped(shown(cell))}</td>" for cell, side in zip(row, sides, strict=True)
            )
            lines.append(f'<tr class="marked">{cells}</tr>' if number == marked else f"<tr>{cells}</tr>")
        label = _escaped(caption or (self._sections[-1] if self._sections else self._title))
        told = "" if caption is None else f"<caption>{_escaped(caption)}</caption>"
        # What scrolls has to be reached by keyboard, and needs a name.
        self._add(
            f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table>{told}'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
        )

    def facts(self, values: Mapping[str, Any]) -> None:
        """Add names and their values."""
        self._add(_facts(values))

    def figure(self, figure: Figure | str | os.PathLike[str], alt: str, caption: str | None = None) -> None:
        """Add a matplotlib figure, or a PNG file. `alt` says what it shows to who does not see it.

        Figures that follow each other stand side by side where there is room. Raises InputError for a file
        that cannot be read.
        """
        self._add_beside("figures", self._figure(figure, alt, caption))

    def clip(
        self,
        path: str | os.PathLike[str],
        title: str,
        picture: Figure | str | os.PathLike[str] | None = None,
        text: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Add sound to play, from any audio file that training reads, with a picture of it, facts and a text.

        Clips that follow each other stand side by side where there is room. A picture that cannot be read is noted
        in its place. Raises InputError for sound that cannot be read.
        """
        sound = read_sound(path, self._clip_seconds)
        parts = [f"<h3>{_escaped(title)}</h3>"]
        if len(sound.content) > self._sound_bytes_left:
            parts.append(
                f'<p class="note">Not in this page, which is full of sound: {_escaped(str(path))}</p>'
            )
        else:
            self._sound_bytes_left -= len(sound.content)
            parts.append(
                f'<audio controls preload="metadata" aria-label="{_escaped(title)}" '
                f'src="{data_uri(MEDIA_TYPE, sound.content)}"></audio>'
            )
            if sound.is_cut:
                whole = "" if sound.whole_seconds is None else f" of {sound.whole_seconds:.0f}"
                parts.append(f"<p>The first {sound.seconds:.0f}{whole} seconds.</p>")
        if picture is not None:
            try:
                parts.append(self._figure(picture, f"Picture of the sound: {title}", None))
            except InputError as error:
                self.notes.append(str(error))
                parts.append(f'<p class="note">{_escaped(str(error))}</p>')
        if facts:
            parts.append(_facts(facts))
        if text is not None:
            # What scrolls has to be reached by keyboard, and needs a name.
            parts.append(
                f'<pre dir="auto" tabindex="0" role="region" aria-label="Text of {_escaped(title)}">'
                f"{_escaped(text)}</pre>"
            )
        self._add_beside("clips", '<article class="clip">' + "\n".join(parts) + "</article>")

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Note that `what` is not in the page where a file of somebody else's holds other values than ours do.

        Such a file may have any type and any number in any place.
        """
        try:
            yield
        except AceStepError as error:
            self.note(str(error))
        except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
            self.note(
                f"Not in this page: {what}. What was found is not what training writes "
                f"({type(error).__name__}: {error})"
            )

    def render(self) -> str:
        """The page as HTML."""
        self._end_together()
        title = _escaped(self._title)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{title}</title><link rel="icon" href="data:,">\n<style>{STYLE}</style></head>\n'
            f"<body><main>\n<h1>{title}</h1>\n{self._beginning}\n{self._contents()}\n"
            + "\n".join(self._parts)
            + "\n</main></body></html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> int:
        """Write the page, whole or not at all, to a path or URL; returns its bytes. Raises InputError."""
        from acestep_ray.storage import DiskFullError, StoredFile

        file = StoredFile.at(path)
        content = self.render().encode()
        try:
            file.store.write_bytes(file.name, content)
        except DiskFullError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"the page cannot be written ({reason})", where=os.fspath(path)) from None
        return len(content)

    def _add(self, part: str) -> None:
        self._end_together()
        self._parts.append(part)

    def _add_beside(self, kind: str, part: str) -> None:
        """Add a part beside those of its kind that it follows."""
        if self._together[0] != kind:
            self._end_together()
            self._together = (kind, [])
        self._together[1].append(part)

    def _end_together(self) -> None:
        kind, parts = self._together
        if parts:
            self._parts.append(f'<div class="{kind}">\n' + "\n".join(parts) + "\n</div>")
        self._together = ("", [])

    def _contents(self) -> str:
        if len(self._sections) < _CONTENTS_FROM:
            return ""
        items = "".join(
            f'<li><a href="#section-{number}">{_escaped(heading)}</a></li>'
            for number, heading in enumerate(self._sections, 1)
        )
        return f'<nav aria-label="Sections"><ul>{items}</ul></nav>'

    def _figure(self, figure: Figure | str | os.PathLike[str], alt: str, caption: str | None) -> str:
        self._figures += 1
        label = _escaped(alt)
        if isinstance(figure, (str, os.PathLike)):
            shown_as = f'<img alt="{label}" src="{_picture(figure)}">'
        elif isinstance(drawn := draw(figure, f"figure-{self._figures}"), str):
            shown_as = drawn.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        else:
            shown_as = f'<img alt="{label}" src="{picture_uri(drawn)}">'
        told = "" if caption is None else f"<figcaption>{_escaped(caption)}</figcaption>"
        return f"<figure>{shown_as}{told}</figure>"


def shown(value: Any) -> str:
    """A value as a page shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number_text(value, 4)
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(map(shown, value))
    return str(value)


def _picture(path: str | os.PathLike[str]) -> str:
    try:
        return picture_file_uri(path)
    except PictureError as error:
        reason: object = error
    except OSError as error:
        reason = error.strerror or error
    raise InputError(f"the picture cannot be read ({reason})", where=os.fspath(path))


def _escaped(text: str) -> str:
    return html.escape(_NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", text))


def _paragraphs(text: str) -> str:
    return "\n".join(
        f"<p>{_escaped(part.strip())}</p>" for part in re.split(r"\n\s*\n", text) if part.strip()
    )


def _facts(values: Mapping[str, Any]) -> str:
    items = "\n".join(
        f'<dt>{_escaped(name)}</dt><dd dir="auto">{_escaped(shown(value))}</dd>'
        for name, value in values.items()
    )
    return f"<dl>{items}</dl>"


def _alignment(columns: int, rows: Sequence[Sequence[Any]]) -> str:
    """`r` for a column of numbers, `l` for another."""
    return "".join("r" if _are_numbers([row[column] for row in rows]) else "l" for column in range(columns))


def _are_numbers(cells: Sequence[Any]) -> bool:
    there = [cell for cell in cells if cell is not None]
    return bool(there) and all(
        isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in there
    )
