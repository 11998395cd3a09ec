"""The text files beside a song, of every trainer, and what they say together.

| file | holds |
|---|---|
| `NAME_prompt.txt` | tags |
| `NAME_lyrics.txt`, `NAME.lyrics.txt`, `NAME.lyrics`, `NAME.lrc`, `NAME.srt`, `NAME.vtt` | lyrics |
| `NAME.caption.txt`, `NAME_caption.txt`, `NAME.caption` | a description |
| `NAME_recaption.json` | recaptions by name |
| `NAME.json` | fields: caption, lyrics, bpm, keyscale, timesignature, language |
| `NAME.txt` | by its content: tags, lyrics, `key: value` lines, markup (`layouts`) |
"""

from __future__ import annotations

import posixpath
import threading
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from acestep_ray.data import layouts
from acestep_ray.data.fields import SongTexts, cells_by_field, read_texts, settle_instrumental
from acestep_ray.data.findings import Findings
from acestep_ray.data.same_names import Names, folded, told_apart
from acestep_ray.data.texts import printable, read_text, recaptions_of, split_tags
from acestep_ray.plain_files import JSON, LYRICS, PROMPT, Limit
from acestep_ray.storage import Store

_ENDINGS = {
    "prompt": ("_prompt.txt", ".prompt.txt", "_tags.txt", ".tags.txt", ".tags"),
    "lyrics": ("_lyrics.txt", ".lyrics.txt", ".lyrics", ".lrc", ".srt", ".vtt"),
    "caption": (".caption.txt", "_caption.txt", ".caption"),
    "recaption": ("_recaption.json",),
    "json": (".json",),
    "text": (".txt",),
}
_ALL_ENDINGS = tuple(ending for endings in _ENDINGS.values() for ending in endings)
# Of Parquet only Hugging Face's: a feature cache within the folder has many.
_TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", "metadata.parquet")
_KIND_OF_ENDING = tuple(kind for kind, endings in _ENDINGS.items() for _ in endings)
_V15_ENDINGS = (".lyrics.txt", ".caption.txt")
_LIMITS = {"prompt": PROMPT, "caption": PROMPT, "recaption": JSON, "json": JSON}
"""Of kinds of texts; `NAME.txt` may be lyrics."""
# A JSON file with one of these was meant for a song.
_TELLING_NAMES = ("caption", "lyrics", "bpm", "keyscale")
# A JSON file may be anything; all other endings of a text belong to a song.
_OF_NO_SONG = (".json",)


class Sidecars:
    """The text files of a folder, by the songs that they belong to. Threads may read songs side by side."""

    def __init__(self, root: Store, audio: Iterable[str], others: Iterable[str], layout: str = "auto"):
        """`audio` and `others` are names relative to `root`; `layout` is one of `TEXT_LAYOUTS`."""
        self._root = root
        self._layout = layout
        self._used: set[str] = set()
        self._lock = threading.Lock()
        self.parsing = threading.Lock()
        stems: set[str] = set()
        for name in audio:
            stems.update((_stem(name), name))
        self._files: dict[str, list[tuple[int, str]]] = defaultdict(list)
        """Of each song's stem: places of endings in `_ALL_ENDINGS`, and files' names."""
        self.tables: list[str] = []
        """Files that may be tables of songs."""
        unclaimed: dict[str, list[tuple[str, int]]] = {}
        for name in others:
            lower = name.lower()
            if _may_be_table(name, stems):
                self.tables.append(name)
            splits = [(name[: -len(e)], place) for place, e in enumerate(_ALL_ENDINGS) if lower.endswith(e)]
            own = [split for split in splits if split[0] in stems]
            for stem, place in own:
                self._files[stem].append((place, name))
            if splits and not own:
                unclaimed[name] = splits
        self._unclaimed = set(unclaimed)
        wanted = {folded(stem) for splits in unclaimed.values() for stem, _ in splits}
        self._alike = Names(stem for stem in stems if folded(stem) in wanted) if wanted else Names()
        """Songs whose names are those of texts, spelled otherwise."""
        for name, splits in unclaimed.items():
            for stem, place in splits:
                if (song := self._alike.find(stem)) is not None:
                    self._files[song].append((place, name))

    def texts_of(
        self, name: str, row: tuple[str, SongTexts] | None, problems: list[str], findings: Findings
    ) -> SongTexts:
        """What the files beside the song `name`, and the row of a table in the folder, say of it.

        A row wins over files, as in ACE-Step 1.5's trainer. `problems` gets what makes the song unusable; `findings`
        gets warnings and the layout.
        """
        reader = _SongReader(self, name, problems, findings)
        return reader.read(row)

    def left_over(self) -> list[str]:
        """Warnings about text files that belong to no song."""
        everything = self._unclaimed.union(name for files in self._files.values() for _, name in files)
        names = sorted(
            name
            for name in everything - self._used - set(self.tables)
            if not name.lower().endswith(_OF_NO_SONG)
        )
        return [self._why_left_over(name) for name in names]

    def _why_left_over(self, name: str) -> str:
        stems = [name[: -len(ending)] for ending in _ALL_ENDINGS if name.lower().endswith(ending)]
        for stem in stems:
            songs = [song for song in self._alike.alike(stem) if song != stem]
            if len(songs) > 1:
                shown = told_apart([stem, *songs])
                return (
                    f"{printable(name)}: belongs to no song, since {shown[0]} is the name of several but for the size "
                    f"of letters or the form of accents: {', '.join(shown[1:])}"
                )
        return f"{printable(name)}: belongs to no song, since no audio file has its name"

    def files_of(self, name: str) -> dict[str, list[str]]:
        """The files beside a song by their kinds, each kind's in the order in which they are preferred."""
        found = sorted({*self._files.get(_stem(name), ()), *self._files.get(name, ())})
        kinds: dict[str, list[str]] = {}
        for place, file in found:
            kinds.setdefault(_KIND_OF_ENDING[place], []).append(file)
        return kinds

    def read(self, file: str, problems: list[str]) -> str:
        """The text of a file, which is a song's from now on."""
        self.skip(file)
        return read_text(self._root.file(file), printable(file), problems, _limit_of(file))

    def skip(self, file: str) -> None:
        """Note that a file is a song's, without reading it."""
        with self._lock:
            self._used.add(file)

    @property
    def layout(self) -> str:
        """What `NAME.txt` holds, one of `TEXT_LAYOUTS`."""
        return self._layout


class _SongReader:
    """Reads the texts of one song."""

    def __init__(self, sidecars: Sidecars, name: str, problems: list[str], findings: Findings):
        self.sidecars, self.name = sidecars, name
        self.files = sidecars.files_of(name)
        self.origin = printable(name)
        self.problems, self.findings = problems, findings
        self.layouts: list[str] = []
        self.prompt: str | None = None
        """Text of the file that holds nothing but the prompt; None where there is none."""
        self.has_lyrics = False

    def read(self, row: tuple[str, SongTexts] | None) -> SongTexts:
        texts = SongTexts()
        self._read_own_files(texts)
        facts = self._read_json()
        plain = self._read_plain(texts, facts, row)
        for more in (plain, facts):
            if more is not None:
                self._fill(texts, more, "files beside it")
        if row is not None:
            table, said = row
            merged = SongTexts()
            merged.filled_with(said)
            self._fill(merged, texts, f"{table}, which is used, and files beside it")
            texts = merged
            self.layouts.insert(0, table)
        settle_instrumental(texts, self.origin, self.findings.warnings)
        if self.layouts:
            self.findings.layouts[self.layouts[0]] += 1
        return texts

    def _read_own_files(self, texts: SongTexts) -> None:
        """Files that hold one text each."""
        self.prompt = prompt = self._read_first("prompt")
        texts.tags = split_tags(prompt or "")
        lyrics = self._read_first("lyrics")
        texts.lyrics = lyrics or ""
        caption = self._read_first("caption")
        texts.caption = caption or ""
        recaption = self._read_first("recaption")
        texts.recaption = recaptions_of(recaption, self.origin, self.problems)
        if prompt is not None or recaption is not None:
            self.layouts.append(layouts.V1)
        elif caption is not None:
            self.layouts.append(layouts.V15)
        elif lyrics is not None:
            (first, *_) = self.files["lyrics"]
            self.layouts.append(layouts.V15 if first.lower().endswith(_V15_ENDINGS) else layouts.V1)
        self.has_lyrics = lyrics is not None

    def _read_json(self) -> SongTexts | None:
        files = self.files.get("json")
        if not files:
            return None
        own: list[str] = []
        text = self.sidecars.read(files[0], own)
        # One at a time: what a JSON file holds may take twenty times its size.
        with self.sidecars.parsing:
            said = self._parse_json(text, files[0], own) if not own else None
        self.problems += own
        if said is None and not own:
            self.findings.group("has no field that is known, and is not used", printable(files[0]))
        if said is not None:
            self.layouts.append(layouts.V15)
        return said

    def _parse_json(self, text: str, file: str, problems: list[str]) -> SongTexts | None:
        try:
            found = layouts.json_fields(text)
            fields = None if found is None else layouts.sample_fields(found, {}, uses_genre=False)
        except (ValueError, RecursionError) as error:
            fields = None
            if any(f'"{name}"' in text for name in _TELLING_NAMES):
                problems.append(f"{printable(file)}: not JSON ({error})")
        return None if fields is None else self._texts_of_fields(fields, printable(file))

    def _read_plain(
        self, texts: SongTexts, facts: SongTexts | None, row: tuple[str, SongTexts] | None
    ) -> SongTexts | None:
        """What `NAME.txt` says."""
        files = self.files.get("text")
        if not files:
            self._warn_of_no_prompt(texts, facts, row)
            return None
        before = len(self.problems)
        text = self.sidecars.read(files[0], self.problems)
        said = SongTexts() if len(self.problems) > before else self._parse(text, files[0], texts, facts, row)
        known = SongTexts(**vars(said)) if said else SongTexts()
        known.filled_with(texts)
        self._warn_of_no_prompt(known, facts, row)
        return said

    def _parse(
        self,
        text: str,
        file: str,
        texts: SongTexts,
        facts: SongTexts | None,
        row: tuple[str, SongTexts] | None,
    ) -> SongTexts | None:
        mode, origin = self.sidecars.layout, printable(file)
        if mode in ("auto", "ai-toolkit") and (markup := layouts.markup_fields(text)) is not None:
            self.layouts.append(layouts.AI_TOOLKIT)
            return self._texts_of_fields(markup, origin)
        if mode == "auto" and text.startswith("{") and (facts_here := _json_object(text)) is not None:
            self.layouts.append(layouts.V15)
            return self._texts_of_fields(layouts.sample_fields(facts_here, {}, uses_genre=False), origin)
        if mode in ("auto", "side-step") and (lines := layouts.line_fields(text)) is not None:
            self.layouts.append(layouts.SIDE_STEP)
            return self._texts_of_fields(layouts.sample_fields(lines, {}, uses_genre=False), origin)
        if mode in ("ai-toolkit", "side-step"):
            self.findings.group(
                f"is not in {mode}'s layout, and is not used; --texts auto decides for each file", origin
            )
            return None
        if mode == "caption":
            self.layouts.append(layouts.CAPTIONS)
            return SongTexts(caption=" ".join(text.split("\n")))
        if mode == "v1":
            self.layouts.append(layouts.V1)
            return None if self.prompt is not None else SongTexts(tags=split_tags(text))
        if mode == "v15":
            self.layouts.append(layouts.V15)
            return SongTexts(lyrics=text)
        return self._by_content(text, origin, texts, facts, row)

    def _by_content(
        self,
        text: str,
        origin: str,
        texts: SongTexts,
        facts: SongTexts | None,
        row: tuple[str, SongTexts] | None,
    ) -> SongTexts | None:
        """A plain text: lyrics or tags, by how it looks and by what else there is."""
        is_lyrics = layouts.looks_like_lyrics(text)
        others = [some for some in (texts, facts, row[1] if row else None) if some is not None]
        described = any(some.tags or some.caption for some in others)
        has_lyrics = self.has_lyrics or any(some.lyrics for some in others)
        if described and has_lyrics:
            if any(text == some.caption for some in others):
                return None
            if not is_lyrics and not any(some.tags for some in others):
                return SongTexts(tags=split_tags(text))
            self.findings.group("is not used: other files hold the prompt and the lyrics", origin)
            return None
        if described and self.prompt is not None and not is_lyrics:
            self.findings.group("is not used: NAME_prompt.txt holds the prompt", origin)
            return None
        if described or (is_lyrics and not has_lyrics):
            self.layouts.append(layouts.V15)
            return SongTexts(lyrics=text)
        if is_lyrics is None and not has_lyrics and not layouts.looks_like_description(text):
            self.findings.group(
                "could be tags or lyrics, and is read as tags; pass --texts v15 if NAME.txt holds lyrics, "
                "--texts v1 if it holds tags",
                origin,
            )
        if layouts.looks_like_description(text):
            self.layouts.append(layouts.CAPTIONS)
            return SongTexts(caption=text)
        self.layouts.append(layouts.V1)
        return SongTexts(tags=split_tags(text))

    def _texts_of_fields(self, found: dict[str, Any], origin: str) -> SongTexts:
        cells, recaption = cells_by_field(found, {}, key_is_musical=True)
        return read_texts(cells, recaption, origin, self.problems, self.findings.warnings)

    def _read_first(self, kind: str) -> str | None:
        files = self.files.get(kind)
        if not files:
            return None
        for other in files[1:]:
            self.sidecars.skip(other)
            ending = next(ending for ending in _ALL_ENDINGS if files[0].lower().endswith(ending))
            self.findings.group(f"is not used: NAME{ending} is", printable(other))
        return self.sidecars.read(files[0], self.problems)

    def _fill(self, texts: SongTexts, more: SongTexts, where: str) -> None:
        differing = texts.filled_with(more)
        if differing:
            self.findings.group(f"{where} differ in {', '.join(differing)}", self.origin)

    def _warn_of_no_prompt(
        self, texts: SongTexts, facts: SongTexts | None, row: tuple[str, SongTexts] | None
    ) -> None:
        others = [some for some in (texts, facts, row[1] if row else None) if some is not None]
        if any(some.tags or some.caption or some.recaption for some in others):
            return
        state = "no prompt" if self.prompt is None else "an empty prompt"
        stem = posixpath.basename(_stem(self.origin))
        self.findings.warnings.append(
            f"{self.origin}: {state}; {stem}_prompt.txt would hold its tags, with commas between them"
        )


def _json_object(text: str) -> dict[str, Any] | None:
    """The fields of a song in a JSON text; None for any other text."""
    try:
        return layouts.json_fields(text)
    except (ValueError, RecursionError):
        return None


def _may_be_table(name: str, stems: set[str]) -> bool:
    """Whether a file within a folder of songs may be a table of them, and is no single song's, as `NAME.info.json`."""
    if not name.lower().endswith(_TABLE_ENDINGS):
        return False
    folder, base = posixpath.split(name)
    parts = base.split(".")
    return not any(posixpath.join(folder, ".".join(parts[:n])) in stems for n in range(1, len(parts)))


def _limit_of(file: str) -> Limit:
    """How much of a song's text file is read, by its longest ending."""
    endings = [
        (len(ending), place) for place, ending in enumerate(_ALL_ENDINGS) if file.lower().endswith(ending)
    ]
    return _LIMITS.get(_KIND_OF_ENDING[max(endings)[1]], LYRICS)


def _stem(name: str) -> str:
    """A name without its suffix."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, posixpath.splitext(base)[0])
