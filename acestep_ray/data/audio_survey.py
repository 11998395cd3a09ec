"""The layout of a file that libsndfile reads, found before it is decoded: what is there, whatever the header says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import soundfile

from acestep_ray.data import audio_flac, audio_mpeg, audio_ogg, audio_pcm
from acestep_ray.data.audio_layout import ByteReader, Layout, Piece, Span, View, seconds_text, tag_length
from acestep_ray.data.audio_source import AudioSource

_MPEG_SUFFIXES = frozenset({".mp3", ".mp2", ".mpga", ".mpeg"})
# Without a header that says it is one, a file is taken for MPEG audio with so many frames one behind another.
_LEAST_FRAMES = 16
# What a header may be wrong by without a warning: a frame of MPEG audio, more or less.
_TOLERATED_SECONDS = 0.1
# More holes than this are damage beyond repair; nothing is to take for ever.
_MOST_SPANS = 10_000
# Frames of FLAC whose checksums are computed at once.
_FRAMES_AT_ONCE = 256


def open_view(source: AudioSource, pieces: Sequence[Piece]) -> soundfile.SoundFile:
    """Raises what soundfile raises."""
    return soundfile.SoundFile(View(source.read_at, pieces, source.note_failure))


def survey(source: AudioSource, file: soundfile.SoundFile | None, *, headers_only: bool) -> Layout | None:
    """The layout of a file, or None where libsndfile reads it correctly, or where no repair is known.

    `file` is the file as libsndfile opens it, None where it does not. `headers_only` leaves out what takes a look at
    the whole file.
    """
    head = source.read_at(0, 64)
    samples = audio_pcm.find_samples(source.read_at, source.size)
    if samples is not None:
        if samples.is_mpeg:
            return _mpeg_layout(source, None, samples.start, samples.start + samples.length)
        return _pcm_layout(source, file, samples)
    if headers_only and file is not None:
        return None
    start = behind_tags(source)
    if (head if start == 0 else source.read_at(start, 4))[:4] == b"fLaC":
        return flac_layout(source, file, start)
    if head[:4] == b"OggS" or (start and source.read_at(start, 4) == b"OggS"):
        return _ogg_layout(source, file, start)
    if file is not None and file.format == "MP3":
        return _mpeg_layout(source, file, 0, source.size)
    if file is None and (head[:3] == b"ID3" or source.suffix in _MPEG_SUFFIXES):
        return _mpeg_layout(source, None, 0, source.size)
    return None


def behind_tags(source: AudioSource) -> int:
    """Where a file begins behind its tags; 0 if nothing is there."""
    reader, position = ByteReader(source.read_at, source.size), 0
    for _ in range(8):
        length = tag_length(reader, position)
        if not length:
            break
        position += length
    return position if position < source.size else 0


def _span(source: AudioSource, pieces: Sequence[Piece]) -> Span | None:
    """What libsndfile reads in a view; None for nothing."""
    try:
        with open_view(source, pieces) as file:
            frames = file.frames if file.frames < 1 << 36 else 0
            return Span(frames, file.samplerate, file.channels, tuple(pieces))
    except (soundfile.SoundFileError, ValueError, TypeError):
        return None
    finally:
        source.raise_failure()


# --- samples in chunks -------------------------------------------------------------------------------------


def _pcm_layout(
    source: AudioSource, file: soundfile.SoundFile | None, samples: audio_pcm.Samples
) -> Layout | None:
    if samples.length == 0:
        return None
    span = _span(source, samples.view)
    if span is None or not span.frames:
        return None
    missing = 0.0
    if samples.is_cut_off and samples.declared is not None:
        lost = samples.declared - samples.length
        missing = lost * span.frames / samples.length / span.sample_rate
    warnings = [samples.field_warning] if samples.field_warning else []
    if file is not None and file.frames == span.frames:
        if not missing and not warnings:
            return None
        span = Span(span.frames, span.sample_rate, span.channels, ((0, source.size),))
    return Layout([span], missing, warnings)


# --- FLAC --------------------------------------------------------------------------------------------------


def flac_layout(
    source: AudioSource, file: soundfile.SoundFile | None, start: int, *, damaged: bool = False
) -> Layout | None:
    """With `damaged`, every frame is checked, and those that are not whole are left out."""
    parts = audio_flac.parts(source.read_at, source.size, start)
    spans: list[Span] = []
    warnings: list[str] = []
    missing = 0.0
    is_right = file is not None and len(parts) == 1
    for number, part in enumerate(parts):
        info, last = part.info, audio_flac.last_frame(source.read_at, part)
        if last is None or not info.sample_rate:
            is_right = False
            continue
        total, is_cut = last.first + last.samples, False
        if info.total > total or damaged:
            is_cut = number == len(parts) - 1 and not _is_whole_at_end(source, part, last)
        if is_cut:  # the frame at the end is a part of one
            total, part = last.first, replace(part, end=last.start)
        if damaged:
            spans.append(_whole_frames(source, part, total))
        elif total:
            view = audio_flac.view_of(part, total)
            spans.append(Span(total, info.sample_rate, info.channels, view))
        if info.total == total:
            continue
        is_right = False
        seconds, there = info.total / info.sample_rate, total / info.sample_rate
        if is_cut and info.total:
            missing = max(0.0, seconds - there)
        elif info.total:
            warnings.append(f"its header counts {seconds_text(seconds)}, {seconds_text(there)} are there")
    if not spans or (is_right and not damaged):
        return None
    if len(parts) > 1:
        warnings.insert(0, _joined(len(parts), "FLAC files", spans))
    return Layout(spans, missing, warnings)


def _joined(count: int, what: str, spans: Sequence[Span]) -> str:
    total = sum(span.frames / span.sample_rate for span in spans)
    return f"it is {count} {what} one behind another, {seconds_text(total)} together"


def _is_whole_at_end(source: AudioSource, part: audio_flac.Part, last: audio_flac.Frame) -> bool:
    content = source.read_at(last.start, min(part.end - last.start, 1 << 20))
    if len(content) > 128 and content[-128:-125] == b"TAG":
        content = content[:-128]
    return audio_flac.is_whole(content)


def _whole_frames(source: AudioSource, part: audio_flac.Part, total: int) -> Span:
    """All frames that are whole, at their places, and silent ones in the place of others."""
    info = part.info
    pieces: list[Piece] = [audio_flac.header_of(info, total)]
    silences: list[tuple[int, int]] = []
    position = 0
    is_fixed = True

    def fill(end: int) -> None:
        if end > position:
            silences.append((position, end - position))
            pieces.append(audio_flac.silent_frames(info, position, end, is_fixed=is_fixed))

    def add(frames: list[audio_flac.Frame]) -> None:
        nonlocal position, is_fixed
        contents = [source.read_at(frame.start, min(frame.end - frame.start, 1 << 20)) for frame in frames]
        for frame, content, whole in zip(frames, contents, audio_flac.whole_frames(contents), strict=True):
            if not whole or frame.first < position or len(silences) > _MOST_SPANS:
                continue
            is_fixed = not content[1] & 1
            fill(frame.first)
            last = pieces[-1]
            if isinstance(last, tuple) and last[1] == frame.start:
                pieces[-1] = (last[0], frame.end)
            else:
                pieces.append((frame.start, frame.end))
            position = frame.first + frame.samples

    waiting: list[audio_flac.Frame] = []
    for frame in audio_flac.frames(source.read_at, part):
        waiting.append(frame)
        if len(waiting) == _FRAMES_AT_ONCE:
            add(waiting)
            waiting = []
    add(waiting)
    fill(total)
    return Span(total, info.sample_rate, info.channels, tuple(pieces), tuple(silences))


# --- Ogg ---------------------------------------------------------------------------------------------------


def _ogg_layout(source: AudioSource, file: soundfile.SoundFile | None, start: int) -> Layout | None:
    links = audio_ogg.scan(source.read_at, source.size, start)
    is_whole = all(len(link.runs) <= 1 for link in links)
    if not links or (len(links) == 1 and is_whole and file is not None and start == 0):
        if links and not links[0].has_end and file is not None and file.frames < 1 << 36:
            span = Span(file.frames, file.samplerate, file.channels, ((0, source.size),))
            return Layout([span], 0.0, ["its last pages are missing"])
        return None
    spans: list[Span] = []
    warnings: list[str] = []
    lost = 0
    for link in links:
        if link.codec == "flac" and link.bodies:
            spans.append(_ogg_flac(link))
            continue
        if len(link.runs) <= 1 or len(link.runs) > _MOST_SPANS:
            whole = _span(source, audio_ogg.view_of(link))
            if whole is not None:
                spans.append(whole)
            else:
                lost += 1
            continue
        spans += _ogg_runs(source, link)
    if not spans:
        return None
    if len(links) > 1:
        warnings.append(_joined(len(links), "Ogg streams", spans))
    if lost:
        warnings.append(f"{lost} of its streams cannot be read")
    if not links[-1].has_end:
        warnings.append("its last pages are missing")
    return Layout(spans, 0.0, warnings)


def _ogg_flac(link: audio_ogg.Link) -> Span:
    """The link as a FLAC file, for libsndfile does not read all programs' FLAC in Ogg."""
    info = audio_flac.stream_info(link.head[17:51])
    total = max(0, link.runs[-1][-1].granule)
    pieces: tuple[Piece, ...] = (audio_flac.header_of(info, total), *link.bodies)
    return Span(total, info.sample_rate, info.channels, pieces)


def _ogg_runs(source: AudioSource, link: audio_ogg.Link) -> list[Span]:
    """The runs of pages of a link; the number of the last sample of each tells how much is lost before it."""
    spans: list[Span] = []
    before: int | None = None
    for run in link.runs:
        span = _span(source, audio_ogg.view_of(link, run))
        granule = run[-1].granule
        if span is None or not span.frames or granule < 0:
            continue
        end = round(granule * span.sample_rate / link.granule_rate)
        if before is not None:
            gap = end - span.frames - before
            if gap > 0:
                spans.append(Span(gap, span.sample_rate, span.channels))
        spans.append(span)
        before = end
    return spans


# --- MPEG --------------------------------------------------------------------------------------------------


def _mpeg_layout(
    source: AudioSource, file: soundfile.SoundFile | None, start: int, end: int
) -> Layout | None:
    scan = audio_mpeg.Scan(source.read_at, start, end)
    runs = [run for run in scan.runs if run.frames]
    if not runs or (file is None and sum(run.frames for run in runs) < _LEAST_FRAMES and start == 0):
        return None
    parts = _mpeg_parts(scan.runs)
    if not parts:
        return None
    spans: list[Span] = []
    warnings: list[str] = []
    missing = 0.0
    is_right = file is not None and len(parts) == 1 and len(runs) == 1 and not scan.leading_junk
    for number, part in enumerate(parts):
        kind, header = part[0].kind, part[0].header
        frames = sum(run.frames for run in part)
        counted = header.frames if header is not None else None
        is_last = number == len(parts) - 1
        holes = [_lost_frames(before, after) for before, after in pairwise(part)]
        difference = 0 if counted is None else counted - frames
        is_cut = is_last and difference > 0 and _is_cut_off(scan, part)
        if any(holes) and difference > 0 and not is_cut:
            weight = sum(holes)
            holes = [round(hole * difference / weight) for hole in holes]
            difference = 0
        seconds = kind.samples / kind.sample_rate
        if is_cut:
            missing = max(0, difference - sum(holes)) * seconds
        elif counted is not None and abs(difference) * seconds > _TOLERATED_SECONDS:
            warnings.append(
                f"its header counts {seconds_text(counted * seconds)}, {seconds_text(frames * seconds)} are there"
            )
        is_right &= difference == 0 or (counted is None and not difference)
        spans += _mpeg_spans(source, part, holes, keep_padding=difference == 0 and not any(holes))
    if not spans:
        return None
    if len(parts) > 1:
        warnings.insert(0, _joined(len(parts), "MP3 files", spans))
    if is_right and file is not None:
        header = parts[0][0].header
        plain = runs[0].frames * runs[0].kind.samples
        if header is not None and not missing:
            return None
        if header is None and file.frames >= plain and len(spans) == 1:
            span = Span(plain, file.samplerate, file.channels, ((0, source.size),))
            return Layout([span], missing, _guess(file, plain))
    if file is not None and len(parts) == 1 and parts[0][0].header is None:
        warnings += _guess(file, sum(span.frames for span in spans))
    return Layout(spans, missing, warnings)


def _guess(file: soundfile.SoundFile, frames: int) -> list[str]:
    """A warning where a decoder would be far off that guesses the length of a file without one."""
    if abs(file.frames - frames) <= max(0.02 * frames, _TOLERATED_SECONDS * file.samplerate):
        return []
    guess, there = file.frames / file.samplerate, frames / file.samplerate
    return [
        f"its header gives no length, from its first frame it would be {seconds_text(guess)}; "
        f"{seconds_text(there)} are there"
    ]


def _mpeg_parts(runs: Sequence[audio_mpeg.Run]) -> list[list[audio_mpeg.Run]]:
    """Runs that are one stream: those of one kind, up to the next frame with a length."""
    parts: list[list[audio_mpeg.Run]] = []
    for run in runs:
        if run.header is None and parts and parts[-1][0].kind == run.kind:
            parts[-1].append(run)
        else:
            parts.append([run])
    return [part for part in parts if sum(run.frames for run in part)]


def _is_cut_off(scan: audio_mpeg.Scan, part: Sequence[audio_mpeg.Run]) -> bool:
    """Whether the end of a stream is missing, and not its count too large."""
    header = part[0].header
    if header is None or header.num_bytes is None or not header.num_bytes:
        return scan.ends_within_frame
    there = part[-1].end - part[0].start + len(header.content)
    return header.num_bytes > there + max(run.end - run.start for run in part) // 100 + 4096 or (
        scan.ends_within_frame and header.num_bytes > there
    )


def _lost_frames(before: audio_mpeg.Run, after: audio_mpeg.Run) -> int:
    """Frames that were in the bytes between two runs, by the mean size of the others."""
    if not after.junk_before:
        return 0
    frames = before.frames + after.frames
    mean = (before.end - before.start + after.end - after.start) / max(1, frames)
    return round(after.junk_before / mean) if mean else 0


def _mpeg_spans(
    source: AudioSource, part: Sequence[audio_mpeg.Run], holes: Sequence[int], *, keep_padding: bool
) -> list[Span]:
    """One span for all runs between which nothing is lost, and silence where something is."""
    kind = part[0].kind
    channels = 1 if kind.mono else 2
    groups: list[list[audio_mpeg.Run]] = [[part[0]]]
    gaps = []
    for run, hole in zip(part[1:], holes, strict=True):
        if hole:
            gaps.append(hole)
            groups.append([run])
        else:
            groups[-1].append(run)
    spans: list[Span] = []
    for number, group in enumerate(groups[:_MOST_SPANS]):
        if number:
            spans.append(Span(gaps[number - 1] * kind.samples, kind.sample_rate, channels))
        pieces = audio_mpeg.view_of(group, keep_padding=keep_padding)
        span = _span(source, pieces)
        if span is not None:
            spans.append(span)
    return spans
