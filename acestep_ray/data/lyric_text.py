"""Lyrics as people have them: timed, from a subtitle file, a web page, a shell or a table cell; read as plain text.

Pure functions without torch or Ray. Lyrics that need no reading come out unchanged, byte for byte: they are part of the
identity of cached songs. Every change is noted, and so is what looks wrong but has no certain meaning.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from html.entities import html5
from typing import NamedTuple

from acestep_ray.data.timed_lyrics import read_timed


class LyricNote(NamedTuple):
    """What was changed in a song's lyrics, or looks wrong in them, and how often."""

    what: str
    """A sentence with one `{}` for the count, equal for equal kinds of notes."""
    number: int

    def __str__(self) -> str:
        return _told(self.what, self.number)


def _told(what: str, count: int) -> str:
    text = what.format(count)
    return re.sub(r"\b(1 (?:invisible )?\w+?)s\b", r"\1", text) if count == 1 else text


class LyricNotes:
    """The notes of many songs, as one warning for each kind."""

    def __init__(self) -> None:
        self._songs: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}
        self._numbers: dict[str, int] = {}

    def add(self, song: str, notes: Iterable[LyricNote]) -> None:
        """Add the notes of a song, named as a message names it."""
        for note in notes:
            names = self._songs.setdefault(note.what, [])
            if len(names) < _NAMED_SONGS:
                names.append(song)
            self._counts[note.what] = self._counts.get(note.what, 0) + note.number
            self._numbers[note.what] = self._numbers.get(note.what, 0) + 1

    def update(self, other: LyricNotes) -> None:
        """Add the notes that another collection holds."""
        for what, names in other._songs.items():
            known = self._songs.setdefault(what, [])
            known += names[: _NAMED_SONGS - len(known)]
            self._counts[what] = self._counts.get(what, 0) + other._counts[what]
            self._numbers[what] = self._numbers.get(what, 0) + other._numbers[what]

    def warnings(self) -> list[str]:
        """One line for each kind, with the number of songs and the names of the first."""
        lines = []
        for what, names in self._songs.items():
            number = self._numbers[what]
            more = ", …" if number > len(names) else ""
            songs = f"{number} song{'s' * (number != 1)} ({', '.join(names)}{more})"
            lines.append(f"lyrics of {songs}: {_told(what, self._counts[what])}")
        return lines


_NAMED_SONGS = 3


def read_lyric_text(text: str) -> tuple[str, list[LyricNote]]:
    """The lyrics that `text` holds, and what was changed or looks wrong.

    In this order: invisible characters are removed, and letters that are composed of several characters or styled
    (`𝓵𝓸𝓿𝓮`, `ＬＯＶＥ`) become plain ones; `\\n`, `\\r\\n`, `\\t`, `\\uXXXX` and `\\'`, typed as characters,
    become what they stand for; HTML tags and entities likewise; times of LRC and subtitle files are removed, lines in
    the order of their times; lyrics that say that there are none become empty, unless they are the tag `[inst]` or
    `[instrumental]`; section headings become tags in brackets.
    """
    if not _MAY_NEED_READING.search(text):
        return text, []
    numbers: dict[str, int] = {}
    read, before = text, None
    for _ in range(_PASSES):
        if read == before:
            break
        before = read
        notes: list[LyricNote] = []
        for step in _STEPS:
            read = step(read, notes)
        read = before if read == before else read.strip()
        for note in notes:
            numbers[note.what] = max(note.number, numbers.get(note.what, 0))
    return read, [LyricNote(what, number) for what, number in numbers.items() if number]


# Read again until nothing changes, so that lyrics that were read once stay the same.
_PASSES = 5

# One search that finds nothing in most lyrics.
_MAY_NEED_READING = re.compile(
    r"[\\<&\u00ad\u200b\u200e\u200f\u202a-\u202e\u2028\u2029\u2060\u2066-\u2069\ufeff【［（(*#♪\x0b\x0c"
    r"\u0300-\u036f\u1100-\u11ff\u3099\u309aＡ-Ｚａ-ｚ\U0001d400-\U0001d7ff]"
    r"|\r(?!\n)|\d\s*[:：]\s*\d|\d,\d+\]|\[[A-Za-z#]+:"
    r"|^[^\w\n]*(?i:verse|chorus|bridge|intro|outro|refrain|pre|post|final|last|double|repeat|hook|interlude|guitar"
    r"|piano|sax|drum|inst|this|no|without|sans|ohne|纯|純|此歌|無歌|无歌|インスト|歌詞|연주|가사|инст|без)",
    re.MULTILINE,
)


# --- characters --------------------------------------------------------------------------------------------

# Not U+200C and U+200D, which shape Persian and Indic words and emoji. U+200B separates words in Thai, Lao, Burmese and
# Khmer.
_INVISIBLE = re.compile(
    r"[\u00ad\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
    r"|(?<![\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])\u200b"
)
_LINE_SEPARATOR = re.compile("[\u2028\u2029\x0b\x0c]|\r(?!\n)")


def _without_invisible(text: str, notes: list[LyricNote]) -> str:
    text, count = _INVISIBLE.subn("", text)
    notes.append(LyricNote("{} invisible characters removed", count))
    text, count = _LINE_SEPARATOR.subn("\n", text)
    notes.append(LyricNote("{} line separators read as line ends", count))
    return text


# Letters with accents of their own, as macOS stores them. Not all of NFC: it takes Devanagari letters apart.
_DECOMPOSED = re.compile("[^\\W\\d_][\u0300-\u036f]+|[\u1100-\u11ff]+|[\u3041-\u30ff][\u3099\u309a]")
# Full-width letters amid kana are read with them.
_FULL_WIDTH_LETTERS = re.compile("^[^\u3041-\u30fa\n]*[Ａ-Ｚａ-ｚ][^\u3041-\u30fa\n]*$", re.MULTILINE)
_FULL_WIDTH_LETTER = re.compile("[Ａ-Ｚａ-ｚ０-９]")
_STYLED_LETTER = re.compile("[\U0001d400-\U0001d7ff]")


def _with_plain_letters(text: str, notes: list[LyricNote]) -> str:
    before = text
    text = _DECOMPOSED.sub(lambda match: unicodedata.normalize("NFC", match[0]), text)
    notes.append(LyricNote("{} separate accents joined with their letters", len(before) - len(text)))
    text, styled = _STYLED_LETTER.subn(lambda match: unicodedata.normalize("NFKC", match[0]), text)

    def in_line(line: re.Match[str]) -> str:
        nonlocal styled
        plain, count = _FULL_WIDTH_LETTER.subn(lambda match: unicodedata.normalize("NFKC", match[0]), line[0])
        styled += count
        return plain

    text = _FULL_WIDTH_LETTERS.sub(in_line, text)
    notes.append(LyricNote("{} styled letters written plainly", styled))
    return text


# --- escapes -----------------------------------------------------------------------------------------------

# One backslash, or the two that a second quoting left.
_LINE_END = r"\\{1,2}r\\{1,2}n|\\{1,2}[nN]|\\{1,2}r(?![a-z])"
_TYPED_LINE_END = re.compile(rf"(?<![ \t])[ \t]*(?:{_LINE_END})[ \t]*")
# In lyrics with line ends of their own: at the end of a line, doubled, or beside a tag in brackets.
_CERTAIN_LINE_END = re.compile(
    rf"(?<![ \t])[ \t]*(?:(?:{_LINE_END})[ \t]*(?:$|(?=\[))|(?:(?:{_LINE_END})[ \t]*){{2,}})"
    rf"|(?<=\])[ \t]*(?:{_LINE_END})[ \t]*",
    re.MULTILINE,
)
_TYPED_TAB = re.compile(r"\\{1,2}t")
_TYPED_CHARACTER = re.compile(r"\\u([0-9a-fA-F]{4})(?:\\u([dD][c-fC-F][0-9a-fA-F]{2}))?")
_ESCAPED_QUOTE = re.compile(r"\\{1,3}(['\"’])")


def _with_line_ends(text: str, notes: list[LyricNote]) -> str:
    if "\\" not in text:
        return text
    if "\n" not in text.strip():
        text, count = _TYPED_LINE_END.subn("\n", text)
    else:
        text, count = _CERTAIN_LINE_END.subn(_typed_line_end, text)
    notes.append(LyricNote(r"{} typed \n read as line ends", count))
    notes.append(
        LyricNote(
            r"{} typed \n kept, since the lyrics also have line ends: write line ends",
            len(_TYPED_LINE_END.findall(text)),
        )
    )
    text, tabs = _TYPED_TAB.subn(" ", text) if count else (text, 0)
    text, characters = _TYPED_CHARACTER.subn(_typed_character, text)
    text, quotes = _ESCAPED_QUOTE.subn(r"\1", text)
    notes.append(LyricNote(r"{} escapes such as \t, \u2019 and \' read", tabs + characters + quotes))
    return text


def _typed_line_end(match: re.Match[str]) -> str:
    """Nothing before a line end of the text, else as many as were typed."""
    return "" if match.string.startswith(("\n", "\r\n"), match.end()) else "\n"


def _typed_character(match: re.Match[str]) -> str:
    codes = [int(code, 16) for code in match.groups() if code is not None]
    character = b"".join(code.to_bytes(2, "little") for code in codes).decode("utf-16-le", "replace")
    return match[0] if "\ufffd" in character or ord(character[0]) < 32 else character


# --- HTML --------------------------------------------------------------------------------------------------

_BREAK = re.compile(r"(?<![ \t])[ \t]*(?:<br\s*/?>|</(?:p|div|li)>)[ \t]*(\r?\n)?", re.IGNORECASE)
_TAG = re.compile(
    r"</?(?:p|div|span|i|b|u|em|strong|font|a|li|ul|ol|pre|code|small|big|sup|sub|h[1-6]|blockquote|body|html)"
    r"(?:\s[^<>\n]*)?/?>",
    re.IGNORECASE,
)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


def _without_html(text: str, notes: list[LyricNote]) -> str:
    if "<" not in text and "&" not in text:
        return text
    entities = 0
    for _ in range(2):  # "&amp;#39;" was escaped twice
        text, count = _ENTITY.subn(_character, text)
        entities += count
    text, breaks = _BREAK.subn("\n", text)
    text, tags = _TAG.subn("", text)
    notes.append(LyricNote("{} HTML tags read or removed", breaks + tags))
    notes.append(LyricNote("{} HTML entities such as &amp; read", entities))
    return text


def _character(match: re.Match[str]) -> str:
    name = match[0][1:]
    if not name.startswith("#") and name not in html5:
        return match[0]
    return html.unescape(match[0]).replace("\xa0", " ").replace("\xad", "")


# --- times -------------------------------------------------------------------------------------------------


def _without_times(text: str, notes: list[LyricNote]) -> str:
    timed = read_timed(text)
    notes.extend(LyricNote(what, count) for what, count in timed.counts.items())
    return timed.text


def _without_no_lyrics(text: str, notes: list[LyricNote]) -> str:
    if not says_instrumental(text) or is_instrumental_tag(text):
        return text
    notes.append(LyricNote("{} text that says that nothing is sung read as no lyrics", 1))
    return ""


# --- headings ----------------------------------------------------------------------------------------------

_SECTION = (
    r"(?:(?:pre|post)[ -]?chorus|(?:final|last|double|repeat)[ -]?chorus|verse|chorus|bridge|intro|outro|refrain"
    r"|interlude|hook|instrumental(?:[ -](?:break|solo|bridge|intro|outro|interlude))?"
    r"|(?:guitar|piano|sax|saxophone|drum)[ -]solo)"
)
_CJK_SECTION = (
    r"(?:主歌|副歌|前奏|间奏|間奏|尾奏|过门|桥段|橋段|导歌|導歌|[ABCDＡＢＣＤ]メロ|サビ|イントロ|アウトロ|間奏"
    r"|절|후렴|브릿지|인트로|아웃트로)"
)
_NUMBER = (
    r"(?:[ _-]?(?:[0-9]{1,2}|[IVX]{1,4}|[A-D]))?(?:[ ]?[x×][ ]?[0-9]{1,2}|[ ]?\([x×]?[0-9]{1,2}[x×]?\))?"
)
_FULL_WIDTH = re.compile(
    r"^([^\S\n]*)(?:［([^\[\]［］\n]+)］"
    rf"|【((?:{_SECTION}{_NUMBER}|{_CJK_SECTION}[0-9０-９]*)(?:[ ]?[:：][^【】\n]*)?)】)"
    r"([^\S\n]*)$",
    re.IGNORECASE | re.MULTILINE,
)
# Marks that only a heading has: parentheses around the whole line, a colon behind it, a number, Markdown.
_HEADING = re.compile(
    rf"^[^\S\n]*(?:[(（](?P<round>{_SECTION}{_NUMBER})[)）]:?"
    rf"|(?:\*\*|__|\#{{1,6}}[ ]?)\[?(?P<bold>{_SECTION}{_NUMBER})\]?:?(?:\*\*|__)?:?"
    rf"|(?P<colon>{_SECTION}{_NUMBER})[ ]?[:：]"
    rf"|(?P<number>{_SECTION}[ ][0-9]{{1,2}}))[^\S\n]*$",
    re.IGNORECASE | re.MULTILINE,
)
_BOLD_TAG = re.compile(r"^([^\S\n]*)(?:\*\*|\#{1,6}[ ]?)(\[[^\[\]\n]+\])(?:\*\*)?([^\S\n]*)$", re.MULTILINE)
_BARE = re.compile(
    rf"(?:\A|\n[^\S\n]*\n)[^\S\n]*{_SECTION}[^\S\n]*\n(?=[^\S\n]*\S)",
    re.IGNORECASE,
)


def _with_tags(text: str, notes: list[LyricNote]) -> str:
    """Headings on a line of their own as tags; other brackets are left, since they hold sung words as often."""
    text, wide = _FULL_WIDTH.subn(lambda match: f"{match[1]}[{match[2] or match[3]}]{match[4]}", text)
    text, bold = _BOLD_TAG.subn(r"\1\2\3", text)
    text, headings = _HEADING.subn(lambda match: f"[{next(filter(None, match.groups()))}]", text)
    notes.append(LyricNote("{} headings written as tags such as [chorus]", wide + bold + headings))
    notes.append(
        LyricNote(
            "headings without a mark, such as Chorus, on {} lines kept: write them as [chorus]",
            len(_BARE.findall(text)),
        )
    )
    return text


# --- no lyrics ---------------------------------------------------------------------------------------------

_INSTRUMENTAL = re.compile(
    r"[\W_]*(?:(?:this (?:song|track) is (?:an )?)?instrumental(?: (?:music|track|song|version|only))?|inst|instr"
    r"|no (?:lyrics|vocals?|words|singing)|without (?:lyrics|vocals)|instrumentale?s?|sans paroles|ohne (?:text|gesang)"
    r"|纯音乐(?:[\W_]*请(?:您)?欣赏)?|純音樂(?:[\W_]*請(?:您)?欣賞)?|此歌曲为没有填词的纯音乐[\W_]*请(?:您)?欣赏"
    r"|無歌詞|无歌词|インスト(?:ゥルメンタル|ルメンタル)?|歌詞なし|연주곡|가사 ?없음"
    r"|инструментал(?:ьная)?|без слов)[\W_]*",
    re.IGNORECASE,
)
_MUSIC_SIGNS = frozenset("♩♪♫♬🎵🎶")
_BESIDE_MUSIC_SIGNS = frozenset("♭♯\ufe0f()[]*~～.…-")
# The tags by which the released models know instrumental music.
_INSTRUMENTAL_TAG = re.compile(r"\s*\[\s*inst(?:rumental)?\s*\]\s*", re.IGNORECASE)


def says_instrumental(text: str) -> bool:
    """Whether the whole of `text` says that nothing is sung: `[Instrumental]`, `(no lyrics)`, `♪`, `纯音乐，请欣赏`."""
    if _INSTRUMENTAL.fullmatch(text):
        return True
    characters = {character for character in text if not character.isspace()}
    return bool(characters & _MUSIC_SIGNS) and characters <= _MUSIC_SIGNS | _BESIDE_MUSIC_SIGNS


def is_instrumental_tag(text: str) -> bool:
    """Whether the whole of `text` is `[inst]` or `[instrumental]`, which the released models read as a tag."""
    return bool(_INSTRUMENTAL_TAG.fullmatch(text))


_STEPS = (
    _without_invisible,
    _with_plain_letters,
    _with_line_ends,
    _without_html,
    _without_times,
    _without_no_lyrics,
    _with_tags,
)
