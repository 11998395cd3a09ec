"""Decodes windows of files that libsndfile reads, by the layout of their sound where their headers are wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import soundfile
import soxr

from acestep_ray.data.audio_layout import ByteReader, Decoded, Layout, Piece, Span, tag_length
from acestep_ray.data.audio_source import AudioSource
from acestep_ray.data.audio_survey import behind_tags, flac_layout, open_view, survey

# Samples of all channels that are decoded at once: 4 MB. Fewer cost time in MP3 files, where each read seeks.
_BLOCK_SAMPLES = 1 << 20
# No usual file holds more samples a byte than this; where one does, the buffer grows.
_SAMPLES_PER_BYTE = 32
# The width of FLAC's field; an unknown length shows as 2^63 - 1.
_MOST_FRAMES = 1 << 36
# Where a file stands after its decoder failed: at no frame.
_UNKNOWN_POSITION = -1
# Frames around a window that a resampler's filter reaches.
_RESAMPLER_REACH = 1 << 14


class SoundfileDecoder:
    def __init__(
        self, source: AudioSource, file: soundfile.SoundFile | None, layout: Layout | None, *, is_open: bool
    ):
        """`is_open`: whether the layout is still to be found, once a window reaches the end that the header claims."""
        self._source, self._file, self._layout = source, file, layout
        self._is_mended = False
        self._current: tuple[int, _Stream] | None = None
        """Span that was read last."""
        self._is_open = is_open and layout is None
        self._claimed = None if file is None or file.frames >= _MOST_FRAMES else file.frames
        if file is not None and file.format == "MP3" and not _has_mp3_length(source.read_at):
            self._claimed = None
        self.subtype = "" if file is None else file.subtype
        if file is not None and layout is None:
            self.sample_rate, self.channels = file.samplerate, file.channels
            self._stream: _Stream | None = _Stream(file, lambda: soundfile.SoundFile(source.reader()))
        else:
            assert layout is not None
            self.sample_rate = layout.spans[0].sample_rate
            self.channels = max(span.channels for span in layout.spans)
            self._stream = None
            self._use(layout)

    def _use(self, layout: Layout) -> None:
        """Read by this layout from now on."""
        self._layout, self._is_open = layout, False
        starts, position = [], 0
        for span in layout.spans:
            starts.append(position)
            position += _frames_at(span, self.sample_rate)
        self._starts, self._total = starts, position
        self._current = None
        whole = ((0, self._source.size),)
        is_plain = self._file is not None and [span.pieces for span in layout.spans] == [whole]
        if is_plain and self._stream is None:
            self._stream = _Stream(self._file, lambda: soundfile.SoundFile(self._source.reader()))
        if not is_plain:
            if self._stream is not None:
                self._stream.close()
            elif self._file is not None:
                self._file.close()
            self._stream = None
            if not self.subtype:
                first = next((span for span in layout.spans if span.pieces), None)
                if first is not None:
                    with open_view(self._source, first.pieces) as file:
                        self.subtype = file.subtype

    def _complete(self) -> None:
        """Find the layout of a file that was not looked at as a whole yet."""
        if self._is_open:
            self._is_open = False
            layout = survey(self._source, self._file, headers_only=False)
            if layout is not None:
                self.channels = max(self.channels, *(span.channels for span in layout.spans))
                self._use(layout)

    @property
    def frames(self) -> int | None:
        self._complete()
        if self._layout is not None:
            return self._total
        return None if self._file is None or self._file.frames >= _MOST_FRAMES else self._file.frames

    @property
    def claimed_frames(self) -> int | None:
        if self._layout is not None:
            return self._total
        return self._claimed

    @property
    def is_surveyed(self) -> bool:
        return self._layout is not None

    @property
    def warnings(self) -> list[str]:
        if self._layout is None:
            return []
        warnings, missing = list(self._layout.warnings), self._layout.missing_seconds
        if missing > 0:
            there = self._total / self.sample_rate
            warnings.append(f"its header promises {there + missing:.1f} s, {there:.1f} s are there")
        return warnings

    def read(self, start: int, limit: int) -> Decoded:
        if self._is_open and (self._claimed is None or start + limit > self._claimed):
            self._complete()
        if self._stream is None:
            found = self._read_spans(start, limit)
            damaged = found.lost > found.missing and found.failure
            return self._read_spans(start, limit) if damaged and self._mended() else found
        total = self._total if self._layout is not None else self._stream.file.frames
        wanted = max(0, min(limit, total - start))
        samples, failure = self._stream.read(start, wanted, self._source.size)
        self._source.raise_failure()
        short = 0 if total >= _MOST_FRAMES and not failure else wanted - samples.shape[1]
        if short and self._mended():
            return self._read_spans(start, limit)
        if self._layout is not None:
            short += self._missing_in(start, limit)
        return Decoded(samples, short, short, start + samples.shape[1], failure)

    def _missing_in(self, start: int, limit: int) -> int:
        """Frames of a window that the header promises behind the end of the file."""
        assert self._layout is not None
        promised = self._total + round(self._layout.missing_seconds * self.sample_rate)
        return max(0, min(promised, start + limit) - max(self._total, start))

    def _mended(self) -> bool:
        """Whether a closer look at a damaged file shows more of it."""
        if self._is_mended or _flac_start(self._source) is None:
            return False
        self._is_mended = True
        layout = flac_layout(self._source, None, _flac_start(self._source) or 0, damaged=True)
        if layout is not None:
            self._use(layout)
        return layout is not None

    def _read_spans(self, start: int, limit: int) -> Decoded:
        assert self._layout is not None
        spans = self._layout.spans
        end = max(start, min(start + limit, self._total))
        samples = np.zeros((self.channels, end - start), dtype=np.float32)
        lost, lost_at, failure = 0, -1, ""
        for number, (first, span) in enumerate(zip(self._starts, spans, strict=True)):
            low, high = max(start, first), min(end, first + _frames_at(span, self.sample_rate))
            if low >= high:
                continue
            part = np.empty((span.channels, 0), np.float32)
            if span.pieces:
                part, what = self._read_span(number, low - first, high - low)
                failure = failure or what
            _put(part, samples[:, low - start : low - start + part.shape[1]])
            for silent, count in span.silences:
                overlap = min(high - first, silent + count) - max(low - first, silent)
                if overlap > 0:
                    lost += overlap
                    lost_at = lost_at if lost_at >= 0 else max(low, first + silent)
            if part.shape[1] < high - low:
                lost += high - low - part.shape[1]
                lost_at = lost_at if lost_at >= 0 else low + part.shape[1]
        missing = self._missing_in(start, limit)
        return Decoded(samples, lost + missing, missing, lost_at if lost_at >= 0 else end, failure)

    def _read_span(self, number: int, start: int, wanted: int) -> tuple[np.ndarray, str]:
        """Frames of one span at the rate of the file."""
        assert self._layout is not None
        span = self._layout.spans[number]
        current = self._current
        if current is None or current[0] != number:
            if current is not None:
                current[1].close()
            self._current = None

            def reopen(pieces: Sequence[Piece] = span.pieces) -> soundfile.SoundFile:
                return open_view(self._source, pieces)

            try:
                current = self._current = (number, _Stream(reopen(), reopen))
            except (soundfile.SoundFileError, TypeError, ValueError) as error:
                return np.empty((span.channels, 0), np.float32), f" ({decoder_text_of(error)})"
        stream = current[1]
        if span.sample_rate == self.sample_rate:
            part, failure = stream.read(start, wanted, self._source.size)
        else:
            part, failure = self._resampled(stream, span, start, wanted)
        self._source.raise_failure()
        return part, failure

    def _resampled(self, stream: _Stream, span: Span, start: int, wanted: int) -> tuple[np.ndarray, str]:
        """As if the whole span were resampled: from a place that is a whole number at both rates."""
        divisor = math.gcd(span.sample_rate, self.sample_rate)
        ours, theirs = self.sample_rate // divisor, span.sample_rate // divisor
        periods = max(0, (start * theirs // ours - _RESAMPLER_REACH) // theirs)
        first, skipped = periods * theirs, start - periods * ours
        frames = -(-(skipped + wanted) * theirs // ours) + _RESAMPLER_REACH
        part, failure = stream.read(first, frames, self._source.size)
        if not part.shape[1]:
            return part, failure
        at_our_rate = soxr.resample(part.T, span.sample_rate, self.sample_rate, quality="HQ").T
        return np.ascontiguousarray(at_our_rate[:, skipped : skipped + wanted]), failure

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._current is not None:
            self._current[1].close()


def _frames_at(span: Span, sample_rate: int) -> int:
    return round(span.frames * sample_rate / span.sample_rate)


def _put(part: np.ndarray, target: np.ndarray) -> None:
    """Channels of a part into those of the file: mono goes to all, others to those of the same number."""
    if len(part) == 1:
        target[:] = part
    else:
        target[: len(part)] = part


def _flac_start(source: AudioSource) -> int | None:
    """Where a FLAC file begins, behind tags; None for another file."""
    start = behind_tags(source)
    return start if source.read_at(start, 4) == b"fLaC" else None


class _Stream:
    """A file that libsndfile reads, at any place."""

    def __init__(self, file: soundfile.SoundFile, reopen: Callable[[], soundfile.SoundFile]):
        self.file, self._reopen = file, reopen
        self.channels = file.channels
        self._position = 0

    def read(self, start: int, limit: int, source_bytes: int) -> tuple[np.ndarray, str]:
        """At most `limit` frames from `start`, float32 (channels, n), and why they end early."""
        limit = max(0, min(limit, self.file.frames - start))
        failure = self._go_to(start) if limit else ""
        block = np.empty((min(limit, _BLOCK_SAMPLES // self.channels), self.channels), dtype=np.float32)
        # An absurd header must not allocate what is not there.
        capacity = min(limit, max(len(block), _SAMPLES_PER_BYTE * source_bytes // self.channels))
        samples = np.empty((self.channels, capacity), dtype=np.float32)
        decoded = 0
        while decoded < limit and not failure:
            wanted = min(len(block), limit - decoded)
            part, failure = self._read_frames(block[:wanted])
            if decoded + len(part) > samples.shape[1]:
                grown = np.empty((self.channels, min(limit, 2 * (decoded + wanted))), dtype=np.float32)
                grown[:, :decoded] = samples[:, :decoded]
                samples = grown
            samples[:, decoded : decoded + len(part)] = part.T
            decoded += len(part)
            if len(part) < wanted:
                break
        return np.ascontiguousarray(samples[:, :decoded]), failure

    def close(self) -> None:
        self.file.close()

    def _go_to(self, frame: int) -> str:
        """Make `frame` the next one that is read; returns what failed, or ""."""
        if self._position == frame:
            return ""
        self._position = frame
        try:
            if self.file.seek(frame) == frame:
                return ""
        except soundfile.SoundFileError:
            pass
        # Damaged files may have no way to a place but through all that is before it, and none after a failed seek.
        self.file.close()
        self.file = self._reopen()
        block = np.empty((_BLOCK_SAMPLES // self.channels, self.channels), dtype=np.float32)
        self._position = 0
        while self._position < frame:
            part, failure = self._read_frames(block[: frame - self._position])
            if failure or not len(part):
                return failure
        return ""

    def _read_frames(self, buffer: np.ndarray) -> tuple[np.ndarray, str]:
        """The next frames, as many as fit into `buffer` (frames, channels), and why the reading stopped early."""
        # When a decoder fails, soundfile drops the number of frames it had read; the NaNs tell where it stopped.
        buffer.fill(np.nan)
        try:
            part = self.file.read(out=buffer)
        except soundfile.SoundFileError as error:
            unread = np.isnan(buffer[:, 0])
            self._position = _UNKNOWN_POSITION
            decoded = int(unread.argmax()) if unread.any() else len(buffer)
            return buffer[:decoded], f" ({decoder_text_of(error)})"
        self._position += len(part)
        return part, ""


def decoder_text_of(error: Exception) -> str:
    return str(error).rpartition(": ")[2].rstrip(".")


def _has_mp3_length(read_at: Callable[[int, int], bytes]) -> bool:
    """Whether the first frame of an MP3 file carries the number of frames; if not, libsndfile guesses it."""
    start = tag_length(ByteReader(read_at, 1 << 62), 0)
    frame = read_at(start, 4096)
    return any(mark in frame for mark in (b"Xing", b"Info", b"VBRI"))
