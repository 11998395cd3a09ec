"""Timed lyrics as plain text: LRC files, subtitles (SRT, WebVTT, SBV) and lists of times."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass
class TimedText:
    """A text without its times, and how many lines each change concerns, by what was done."""

    text: str
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, what: str, number: int) -> None:
        if number:
            self.counts[what] = self.counts.get(what, 0) + number


_TIMES_REMOVED = "times of {} lines removed"
_WORD_TIMES_REMOVED = "times within {} lines removed"
_ORDERED = "{} lines put in the order of their times"
_REPEATED = "{} lines with several times repeated at each"
_METADATA_REMOVED = "{} lines of LRC metadata removed"
_CREDITS_REMOVED = "{} lines of credits removed"
_SAME_TIME = "same time as the line before in {} lines: remove translations, which would be sung"
_TIMES_KEPT = "times at the start of {} lines kept, too few to take these for timed lyrics"

_TIME = r"-?(?:\d{1,2}[:：])?\d{1,3}[:：]\d{1,2}(?:[.,:：]\d{1,3})?"
_STAMP = re.compile(rf"\s*[\[［]\s*({_TIME})\s*[\]］]")
# `[mm:ss.xx]`: no sung line has hundredths of a second.
_EXACT = re.compile(r"[\[［]\s*-?(?:\d{1,2}[:：])?\d{1,3}[:：]\d{2}[.,:：]\d{2,3}\s*[\]］]")
_WORD_STAMP = re.compile(r"<\s*(?:\d{1,2}:)?\d{1,3}:\d{2}(?:[.,:]\d{1,3})?\s*>")
# Times in milliseconds, of a line and of its words: [171960,5040]<0,240,0>word, [171960,5040](171960,240)word.
_MILLISECONDS = re.compile(r"\s*\[(\d+),\d+\]")
_WORD_MILLISECONDS = re.compile(r"[<(]\d+,\d+(?:,\d+)?[>)]")
_LISTED = re.compile(r"\s*[(（]?((?:\d{1,2}:)?\d{1,2}:\d{2}(?:[.,]\d{1,3})?)[)）]?(?:\s*[-–—|]\s*|\s+|$)")
_TAG = re.compile(r"\s*\[[^\[\]]*\]\s*$")

_METADATA = re.compile(
    r"\s*\[\s*(?:(?:ti|ar|al|au|by|re|ve|lr|tool|offset|id|hash|sign|qq|total|kana|la|#)\s*:[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*"
    r"|#[^\[\]]*|length\s*:\s*[\d:. ]+"
    r"|(?:artist|title|album|author|creator|editor|version|encoding|lyricist|composer|language)\s*:[^\[\]]*)\]\s*$",
    re.IGNORECASE,
)
# Without times, only what no structure tag looks like.
_CERTAIN_METADATA = re.compile(
    r"\s*\[(?:(?:ti|ar|al|au|by|re|ve|lr|offset)\s*:[^\[\]]*|length\s*:\s*\d[\d:. ]*)\]\s*$", re.IGNORECASE
)
_CREDIT = re.compile(
    r"\s*(?:(?:作?词|作?詞|作?曲|填词|填詞|原唱|演唱|歌手|编曲|編曲|监制|監製|制作人?|製作人?|出品人?|发行|发行方|企划|统筹|統籌"
    r"|录音师?|錄音師?|混音师?|混音師?|母带\w*|母帶\w*|和声\w*|和聲\w*|吉他|贝斯|贝司|鼓|键盘|鍵盤|弦乐|OP|SP"
    r"|lyrics|lyricist|composer|arranger|producer)\s*[:：]"
    r"|(?:lyrics|music|composed|written|produced|arranged) by\b\s*[:：]?)\s*\S.*$",
    re.IGNORECASE,
)


def read_timed(text: str) -> TimedText:
    """Return `text` without times, its lines in the order of their times, or unchanged where it has none.

    A text is timed lyrics where at least half of its lines begin with a time in brackets, tags, metadata and blank
    lines aside: one line is enough where a time has hundredths (`[00:12.34]`), else two. A line with several times is
    repeated at each. In other texts only times with hundredths are removed; a line that begins with `[12:34]` stays.
    Subtitles are known by their `-->`. Structure tags stay before the line that they stand before.
    """
    if ("-->" in text and _CUE.search(text)) or _SBV_CUE.search(text):
        return _read_subtitles(text)
    result = TimedText(text)
    lines = text.splitlines()
    if ":" not in text.replace("：", ":") and not any(map(_MILLISECONDS.match, lines)):
        return result
    if any(map(_WORD_STAMP.search, lines)):
        found = [bool(_WORD_STAMP.search(line)) for line in lines]
        lines = [_without(_WORD_STAMP, line) for line in lines]
        result.count(_WORD_TIMES_REMOVED, sum(found))
        result.text = "\n".join(lines)
    for times_of in (_bracketed_times, _millisecond_times, _listed_times):
        timed = [times_of(line) for line in lines]
        if _is_timed(lines, timed, times_of is _listed_times):
            return _without_times(lines, timed, times_of is _listed_times, result)
    return _without_exact_times(lines, result)


Timed = tuple[list[float], str, bool]
"""Times of a line, its text, and whether its times can mean nothing else."""


def _bracketed_times(line: str) -> Timed:
    times, rest, is_exact = [], line, False
    while stamp := _STAMP.match(rest):
        times.append(_seconds(stamp[1]))
        is_exact |= _EXACT.match(stamp[0].strip()) is not None
        rest = rest[stamp.end() :]
    return times, rest, is_exact


def _millisecond_times(line: str) -> Timed:
    stamp = _MILLISECONDS.match(line)
    if stamp is None:
        return [], line, False
    return [int(stamp[1]) / 1000], _without(_WORD_MILLISECONDS, line[stamp.end() :]), True


def _listed_times(line: str) -> Timed:
    stamp = _LISTED.match(line)
    return ([], line, False) if stamp is None else ([_seconds(stamp[1])], line[stamp.end() :], False)


def _seconds(time: str) -> float:
    """Seconds of h:mm:ss.xx, mm:ss.xx, mm:ss or mm:ss:xx."""
    sign = -1.0 if time.startswith("-") else 1.0
    parts = time.lstrip("-").replace(",", ".").replace("：", ":").split(":")
    if len(parts) == 3 and "." not in parts[2]:
        parts = [parts[0], f"{parts[1]}.{parts[2]}"]
    seconds = 0.0
    for part in parts:
        seconds = seconds * 60 + float(part)
    return sign * seconds


def _is_timed(lines: list[str], timed: list[Timed], is_listed: bool) -> bool:
    with_times = [times for times, _, _ in timed if times]
    if not with_times:
        return False
    others = sum(
        1
        for line, (times, _, _) in zip(lines, timed, strict=True)
        if not times and line.strip() and not _TAG.match(line) and not _METADATA.match(line)
    )
    if is_listed:  # "12:30 and I am still awake": at least three, and in their order
        ascending = all(before[0] <= after[0] for before, after in pairwise(with_times))
        # The time may have a line to itself, above the words.
        alone = sum(1 for times, rest, _ in timed if times and not rest.strip())
        return len(with_times) >= 3 and ascending and len(with_times) >= others - alone
    is_exact = any(exact for _, _, exact in timed)
    return len(with_times) >= others and (is_exact or len(with_times) >= 2)


def _without_times(lines: list[str], timed: list[Timed], is_listed: bool, result: TimedText) -> TimedText:
    entries: list[tuple[float, list[str]]] = []
    lead: list[str] = []
    time, repeated = float("-inf"), 0
    for line, (times, words, _) in zip(lines, timed, strict=True):
        if is_listed and times and not words.strip():  # above its words
            result.count(_TIMES_REMOVED, 1)
            time = times[0]
            continue
        if not times:
            if _METADATA.match(line):
                result.count(_METADATA_REMOVED, 1)
            elif not line.strip() or _TAG.match(line):
                lead.append(line)
            else:
                entries.append((time, [*lead, line]))
                lead = []
            continue
        result.count(_TIMES_REMOVED, 1)
        words, inner = _EXACT.subn(" ", words) if _EXACT.search(words) else (words, 0)
        result.count(_WORD_TIMES_REMOVED, bool(inner))
        words = re.sub(r"(?<=\S)[ \t]{2,}", " ", words).strip() if inner else words.strip()
        if _METADATA.match(words):
            result.count(_METADATA_REMOVED, 1)
            continue
        if _CREDIT.match(words):
            result.count(_CREDITS_REMOVED, 1)
            continue
        repeated += len(times) > 1
        entries += [(at, [*lead, words]) for at in times]
        lead, time = [], times[0]
    result.count(_REPEATED, repeated)
    ordered = sorted(entries, key=lambda entry: entry[0])
    if not repeated:
        result.count(_ORDERED, sum(1 for a, b in zip(entries, ordered, strict=True) if a is not b))
    with_words = [(at, words) for at, words in ordered if words[-1] and at != float("-inf")]
    result.count(
        _SAME_TIME,
        sum(
            1
            for before, after in pairwise(with_words)
            if before[0] == after[0] and not _TAG.match(before[1][-1]) and len(after[1]) == 1
        ),
    )
    result.text = _joined([line for _, words in ordered for line in words] + lead)
    return result


def _without_exact_times(lines: list[str], result: TimedText) -> TimedText:
    kept, changed = [], False
    for line in lines:
        if _CERTAIN_METADATA.match(line):
            result.count(_METADATA_REMOVED, 1)
            changed = True
            continue
        if _EXACT.search(line):
            result.count(_TIMES_REMOVED, 1)
            changed = True
            line = _without(_EXACT, line)
        elif _STAMP.match(line):
            result.count(_TIMES_KEPT, 1)
        kept.append(line)
    if changed:
        result.text = _joined(kept)
    return result


def _without(pattern: re.Pattern[str], line: str) -> str:
    return re.sub(r"(?<=\S)[ \t]{2,}", " ", pattern.sub("", line)).strip()


def _joined(lines: list[str]) -> str:
    """Lines as a text: an LRC line without words is the end of a stanza, so one blank line."""
    kept: list[str] = []
    for line in lines:
        if line.strip() or (kept and kept[-1].strip()):
            kept.append(line.rstrip())
    return "\n".join(kept).strip()


# --- subtitles ---------------------------------------------------------------------------------------------

_CUE_TIME = r"(?:\d{1,2}:)?\d{1,2}:\d{2}[.,]\d{1,3}"
_CUE = re.compile(rf"^[^\S\n]*({_CUE_TIME})[^\S\n]*-->[^\S\n]*{_CUE_TIME}[^\n]*$", re.MULTILINE)
_SBV_CUE = re.compile(
    r"^[^\S\n]*(\d{1,2}:\d{2}:\d{2}\.\d{3}),\d{1,2}:\d{2}:\d{2}\.\d{3}[^\S\n]*$", re.MULTILINE
)
_CUE_MARKUP = re.compile(
    r"</?(?:[biucv]|ruby|rt|lang|font)(?:[.\s][^<>\n]*)?>|\{\\[^{}\n]*\}|[♩♪♫♬🎵🎶]", re.IGNORECASE
)
_VTT_BLOCK = re.compile(r"\s*(?:WEBVTT|NOTE|STYLE|REGION)\b")


def _read_subtitles(text: str) -> TimedText:
    """Lines of the cues, in the order of their times. Blank lines between cues are no stanzas."""
    result = TimedText(text)
    cues: list[tuple[float, list[str]]] = []
    for block in re.split(r"\n\s*\n", "\n".join(text.splitlines())):
        lines = block.splitlines()
        places = [i for i, line in enumerate(lines) if _CUE.match(line) or _SBV_CUE.match(line)]
        if not places:
            if not _VTT_BLOCK.match(block) and block.strip() and not block.strip().isdigit():
                cues.append((cues[-1][0] if cues else float("-inf"), lines))
            continue
        for place, end in pairwise([*places, len(lines)]):
            stamp = _CUE.match(lines[place]) or _SBV_CUE.match(lines[place])
            assert stamp is not None
            words = lines[place + 1 : end]
            # The counter of a cue that follows without a blank line between.
            if end < len(lines) and words and words[-1].strip().isdigit():
                words.pop()
            result.count(_TIMES_REMOVED, 1)
            cues.append((_seconds(stamp[1]), words))
    ordered = sorted(cues, key=lambda cue: cue[0])
    result.count(_ORDERED, sum(1 for a, b in zip(cues, ordered, strict=True) if a is not b))
    lines = [_without(_WORD_STAMP, _CUE_MARKUP.sub("", line)) for _, words in ordered for line in words]
    result.text = _joined([line for line in lines if line])
    return result
