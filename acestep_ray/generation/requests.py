"""What is asked for: songs of the flags of the command, or of the rows of a JSON-lines file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from acestep_ray.config import GenerateConfig
from acestep_ray.data.languages import language_code
from acestep_ray.data.lyric_text import LyricNote, LyricNotes, read_lyric_text
from acestep_ray.data.lyrics import (
    WARNED_UNKNOWN_SHARE,
    LyricTokenizer,
    describe_unknown,
    is_unusable,
    parse_language,
)
from acestep_ray.data.speaker import SpeakerEmbeddingError, load_speaker_embedding
from acestep_ray.data.text_files import text_or_file
from acestep_ray.data.texts import is_unicode
from acestep_ray.diffusion.solvers import SCHEDULERS
from acestep_ray.errors import InputError
from acestep_ray.foreign_files import seems_to_be
from acestep_ray.generation.song import Song
from acestep_ray.models.codec import SAMPLE_RATE, latent_frames
from acestep_ray.paths import expand_home
from acestep_ray.plain_files import LINE, PROMPT, SONG_LIST
from acestep_ray.plain_json import load_json
from acestep_ray.plain_text import read_text
from acestep_ray.storage import is_url
from acestep_ray.terminal import show_line

MAX_DURATION = 240.0

NAME = "name"
SETTINGS = (
    "prompt",
    "lyrics",
    "language",
    "duration",
    "seed",
    "infer_steps",
    "guidance_scale",
    "scheduler",
    "omega",
    "shift",
    "speaker_emb_path",
)
"""What a song is made of: flags of the command, and fields of a row beside its name."""

_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("duration", "guidance_scale", "omega", "shift"), ((int, float), "a number")),
    "infer_steps": ((int,), "a whole number"),
    "seed": ((int, str, list), "a whole number, or a list of them"),
}
_TEXT = ((str,), "text")
# Files carry a suffix, and a longer one while they are written.
_LONGEST_NAME = 200
_LISTED = 10
_MOST_PROBLEMS = 1000
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Request:
    """The songs of one description, and what was odd in it."""

    songs: list[Song]
    warnings: list[str]

    def show_warnings(self) -> None:
        """Tell what was odd, a line each."""
        for warning in self.warnings:
            show_line(f"warning: {warning}", sys.stderr)


def songs_of_flags(config: GenerateConfig, name: str, speaker_dim: int) -> Request:
    """The songs of the flags, one for each seed; `name` is that of a single one.

    Raises InputError for the first flag that is wrong.
    """
    reader = _SettingsReader(Path(), speaker_dim)
    values = reader.read_flags(config)
    notes = [f"lyrics: {note}" for note in reader.lyric_notes]
    return Request(_songs(values, name, line=0), [*reader.warnings, *notes])


def songs_of_file(path: Path, config: GenerateConfig, speaker_dim: int) -> Request:
    """The songs of `--batch_path`, which is `path`, in their order; what a row does not set comes from the flags.

    Files that rows name are relative to the folder of `path`. Raises one InputError with every line that is
    wrong.
    """
    where = f"--batch_path {path}"
    try:
        lines = read_text(path, SONG_LIST).split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot read the songs ({reason})", where=where, fix="give a file with one JSON object a line"
        ) from None
    if lines != [""] and (impostor := seems_to_be(path)):
        raise InputError(f"the file of the songs is {impostor.what}", where=where, fix=impostor.fix)
    flags = _SettingsReader(Path(), speaker_dim)
    defaults = flags.read_flags(config)
    reader = _SettingsReader(path.parent, speaker_dim)
    lyric_notes = LyricNotes()
    lyric_notes.add("--lyrics", flags.lyric_notes)
    songs: list[Song] = []
    problems: list[str] = []
    lines_of_names: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = len(problems)
        if len(line) > LINE.size:
            problems.append(f"line {number}: longer than {LINE.size >> 20} MB")
            continue
        problems += (f"line {number}: {problem}" for problem in _problems_of_form(line))
        if len(problems) > found:
            continue
        row = {name: value for name, value in load_json(line).items() if value is not None}
        name = row.pop(NAME, f"{number:04d}")
        values, wrong = reader.read(row)
        problems += (f"line {number}: `{setting}`: {_told(error)}" for setting, error in wrong.items())
        if wrong:
            continue
        lyric_notes.add(name, reader.lyric_notes)
        made = _songs(defaults | values, name, line=number)
        for song in made:
            first = lines_of_names.setdefault(song.name, number)
            if first != number:
                problems.append(f"line {number}: `{song.name}` is the name of a song of line {first} already")
        songs += made
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in _listed(problems, _MOST_PROBLEMS))
        raise InputError(
            f"{len(problems)} mistakes in the songs",
            where=f"{where}{listed}",
            fix="what rows hold: docs/generate.md",
        )
    if not songs:
        raise InputError("there are no songs", where=where, fix="give a file with one JSON object a line")
    return Request(songs, [*flags.warnings, *reader.warnings, *lyric_notes.warnings()])


def read_lyrics(lyrics: str, folder: Path) -> tuple[str, list[LyricNote]]:
    """The lyrics, or those of the file that they name, relative to `folder`, and what was changed in them.

    Raises InputError for a file that is missing or no text.
    """
    return read_lyric_text(text_or_file(lyrics, folder, words_name_files=True))


def read_prompt(prompt: str, folder: Path) -> str:
    """The prompt, or that of the file that it names, its lines joined by commas."""
    text = text_or_file(prompt, folder, words_name_files=False, limit=PROMPT)
    if text == prompt:
        return prompt
    return ", ".join(line.strip().rstrip(",") for line in text.split("\n") if line.strip())


def check_lyrics(
    request: Request, tokenizer: LyricTokenizer, keep_unknown_lyrics: bool, where: str
) -> Request:
    """The request with warnings on lyrics that have unknown tokens. `where` names the lyrics in errors.

    Raises InputError for lyrics of which most is unknown, unless `keep_unknown_lyrics`.
    """
    unusable: dict[str, str] = {}
    warned: dict[str, str] = {}
    for song in request.songs:
        if (
            song.lyrics in unusable
            or song.lyrics in warned
            or not tokenizer.may_lack_tokens(song.lyrics, song.language)
        ):
            continue
        tokens = tokenizer.encode(song.lyrics, song.language)
        told = describe_unknown(song.lyrics, tokens, song.language)
        if song.line:
            told = f"line {song.line}: {told}"
        if is_unusable(tokens) and not keep_unknown_lyrics:
            unusable[song.lyrics] = told
        elif tokens.unknown_share > WARNED_UNKNOWN_SHARE:
            warned[song.lyrics] = told
    if unusable:
        listed = "".join(f"\n  - {told}" for told in _listed(list(unusable.values())))
        raise InputError(
            "the model cannot sing these lyrics",
            where=f"{where}{listed}",
            fix="romanise them, or sing them all the same with --keep_unknown_lyrics",
        )
    return Request(request.songs, [*request.warnings, *_listed(list(warned.values()))])


def _listed(lines: list[str], most: int = _LISTED) -> list[str]:
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return lines[:most] + more


def _speaker_place(folder: Path, name: str) -> str | Path:
    """Where a speaker embedding is that a row names: relative to the folder of the file, or a URL."""
    return name if is_url(name) else folder / expand_home(name)


def parse_seeds(value: int | str | list[Any]) -> list[int]:
    """The seeds of a number, of a list, or of a text with commas. Raises InputError."""
    given = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        seeds = [int(seed) if isinstance(seed, str) else seed for seed in given]
    except ValueError:
        seeds = []
    fix = "whole numbers from 0, with commas between them"
    if not seeds or any(type(seed) is not int or not 0 <= seed < 2**63 for seed in seeds):
        raise InputError("not a list of seeds", fix=fix)
    if len(set(seeds)) < len(seeds):
        raise InputError("a seed is given twice", fix="it would make the same song twice")
    return seeds


class _SettingsReader:
    """Reads settings of songs; files are relative to one folder. What is not supported is noted, not refused."""

    def __init__(self, folder: Path, speaker_dim: int):
        self.folder = folder
        self.speaker_dim = speaker_dim
        self.warnings: list[str] = []
        self.lyric_notes: list[LyricNote] = []
        """Of the row that was read last."""

    def read(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, InputError]]:
        """The settings as songs hold them, and by name what is wrong with the others."""
        read, wrong = {}, {}
        self.lyric_notes = []
        for name, value in values.items():
            try:
                read[name] = None if value is None else self._read(name, value)
            except InputError as error:
                wrong[name] = error
        return read, wrong

    def read_flags(self, config: GenerateConfig) -> dict[str, Any]:
        """The settings that the flags give. Raises InputError for the first that is wrong."""
        given = {name: getattr(config, name) for name in SETTINGS}
        read, wrong = self.read(given)
        for name, error in wrong.items():
            raise InputError(error.what, where=f"--{name} {given[name]}", fix=error.fix)
        return read

    def _read(self, name: str, value: Any) -> Any:
        # Bytes of a terminal, and halves of characters in JSON.
        if isinstance(value, str) and not is_unicode(value):
            raise InputError("not Unicode text", fix="write it in UTF-8")
        if name == "seed":
            return parse_seeds(value)
        if name == "lyrics":
            lyrics, notes = read_lyrics(value, self.folder)
            self.lyric_notes += notes
            return lyrics
        if name == "language":
            return self._language(value)
        if name == "speaker_emb_path":
            return self._speaker(value)
        if name == "prompt":
            return read_prompt(value, self.folder)
        if name == "scheduler":
            _check(value in SCHEDULERS, "unknown scheduler", ", ".join(SCHEDULERS))
            return value
        if name == "infer_steps":
            _check(value >= 1, "at least one step is needed", "60 is usual")
            return value
        # Whole numbers of JSON can be larger than any float.
        _check(abs(value) <= sys.float_info.max, "not a finite number", None)
        if name == "duration":
            _check(0 < value <= MAX_DURATION, "out of range", "from 1 to 240 seconds")
            _check(
                latent_frames(int(value * SAMPLE_RATE)) >= 1, "shorter than one latent frame", "from 1 second"
            )
        if name == "shift":
            _check(value > 0, "has to be above 0", "3 is usual")
        return float(value)

    def _language(self, code: str) -> str | None:
        language_code(code)  # nonsense is an error
        try:
            return parse_language(code)
        except InputError as error:
            warning = f"{error.what}: their languages are found line by line"
            if warning not in self.warnings:
                self.warnings.append(warning)
            return None

    def _speaker(self, name: str) -> list[float]:
        try:
            return load_speaker_embedding(_speaker_place(self.folder, name), self.speaker_dim).tolist()
        except SpeakerEmbeddingError as error:
            raise InputError(str(error)) from None


def _check(is_right: bool, what: str, fix: str | None) -> None:
    if not is_right:
        raise InputError(what, fix=fix)


def _told(error: InputError) -> str:
    return error.what if error.fix is None else f"{error.what} ({error.fix})"


def _problems_of_form(line: str) -> Iterator[str]:
    """What is wrong with a row before its values are read."""
    try:
        row = load_json(line)
    except json.JSONDecodeError as error:
        yield f"not JSON ({error.msg} at column {error.colno})"
        return
    except ValueError as error:
        yield f"not JSON ({error})"
        return
    if not isinstance(row, dict):
        yield "not a JSON object"
        return
    for name, value in row.items():
        if name != NAME and name not in SETTINGS:
            yield f"`{_shortened(name)}` is unknown (rows have {', '.join((NAME, *SETTINGS))})"
            continue
        types, described = _TYPES.get(name, _TEXT)
        if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
            yield f"`{name}` is {_shortened(json.dumps(value))}, and has to be {described}"
        elif name == NAME and isinstance(value, str) and not is_name(value):
            yield f"`{NAME}` is {_shortened(json.dumps(value))}, and has to name a file within the output folder"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def is_name(name: str) -> bool:
    """Whether a song's file, without its suffix, may be called so: within the output folder, and not hidden."""
    parts = name.split("/")
    return (
        not PurePosixPath(name).is_absolute()
        and not any(part.startswith(".") or not part.strip() for part in parts)
        and not any(character in '\\:*?"<>|' or not character.isprintable() for character in name)
        and all(len(part.encode("utf-8", "replace")) <= _LONGEST_NAME for part in parts)
    )


def _songs(values: Mapping[str, Any], name: str, *, line: int) -> list[Song]:
    seeds = values["seed"]
    return [
        Song(
            name=name if len(seeds) == 1 else f"{name}-seed{seed}",
            line=line,
            prompt=values["prompt"],
            lyrics=values["lyrics"],
            language=values["language"],
            frames=latent_frames(int(values["duration"] * SAMPLE_RATE)),
            seed=seed,
            infer_steps=values["infer_steps"],
            guidance_scale=values["guidance_scale"],
            scheduler=values["scheduler"],
            omega=values["omega"],
            shift=values["shift"],
            speaker=values["speaker_emb_path"],
        )
        for seed in seeds
    ]
