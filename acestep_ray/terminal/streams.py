"""Standard output and error that never end a run: what they cannot show is replaced, and a reader may leave."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from typing import Any

from acestep_ray.terminal.escapes import visible_output

_ERRORS = "acestep-ray"
# What a terminal without Unicode shows for characters of this program and of usual texts.
_PLAIN = {
    "→": "->",
    "←": "<-",
    "–": "-",
    "—": "-",
    "−": "-",
    "…": "...",
    "×": "x",
    "·": "-",
    "•": "*",
    "≥": ">=",
    "≤": "<=",
    "±": "+-",
    "█": "#",
    "━": "-",
    "─": "-",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "\xa0": " ",
}
# The stream's reader is gone, and no later line can be read either.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESTALE, errno.ECONNRESET)


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Of `codecs.register_error`: plain characters where there are some, bytes of file names as `\\xe9`, else `?`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = ""
    for character in error.object[error.start : error.end]:
        number = ord(character)
        plain = _PLAIN.get(character, "?")
        if 0xDC80 <= number <= 0xDCFF:  # a byte of a name that is not in the file system's encoding
            plain = f"\\x{number - 0xDC00:02x}"
        try:
            plain.encode(error.encoding)
        except UnicodeError:
            plain = "?"
        shown += plain
    return shown, error.end


codecs.register_error(_ERRORS, _replace)


def replace_unencodable(*streams: Any) -> None:
    """Let streams (standard output and error by default) replace what their encoding has not, in place of raising."""
    for stream in streams or (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and getattr(stream, "errors", None) != _ERRORS:
            with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
                reconfigure(errors=_ERRORS)


def guard_streams() -> None:
    """Make standard output and error of this process fit to be written to until its end; called once, at its start.

    A descriptor that is closed would be taken by the next file that is opened; it becomes the null device. A pipe
    without a reader, a terminal that is gone, and a full disk below a log drop what is written.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, Guarded):
            setattr(sys, name, Guarded.instead_of(stream))
    replace_unencodable()


def escape_redirected() -> None:
    """Escape what is printed above a progress bar: rich has put streams in place that obey colours and links."""
    from rich.file_proxy import FileProxy

    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, FileProxy):
            setattr(sys, name, _Escaping(stream))


class _Escaping:
    """A stream that escapes what is written to it."""

    def __init__(self, stream: Any):
        self.trusted = stream

    def write(self, text: str) -> int:
        self.trusted.write(visible_output(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trusted, name)


class _Trusted:
    """A guarded stream, written to by what has escaped its texts."""

    def __init__(self, stream: Guarded):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write_trusted(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Guarded(io.TextIOWrapper):
    """Text to a descriptor, escaped; an error of the system while writing ends nothing."""

    @property
    def trusted(self) -> _Trusted:
        """The same stream, which escapes nothing."""
        return _Trusted(self)

    @classmethod
    def instead_of(cls, stream: io.TextIOWrapper) -> Guarded:
        encoding, errors = stream.encoding, stream.errors
        lines, through = stream.line_buffering, stream.write_through
        with contextlib.suppress(OSError):
            stream.flush()
        return cls(
            stream.detach(),
            encoding=encoding,
            errors=errors,
            line_buffering=lines,
            write_through=through,
        )

    def write(self, text: str) -> int:
        self.write_trusted(visible_output(text))
        return len(text)

    def write_trusted(self, text: str) -> int:
        """Write a text unchanged."""
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Let what is buffered, and after a lost reader all that follows, go to the null device."""
        if error.errno in _GONE:
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
