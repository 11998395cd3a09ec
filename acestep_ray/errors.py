"""Errors that a user sees, and the exit codes that go with them."""

from __future__ import annotations

import re
from typing import Any

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_INPUT = 2
EXIT_INTERRUPTED = 130


class AceStepError(Exception):
    """A failure with one clear message. `exit_code` is what the command line returns for it."""

    exit_code = EXIT_FAULT


class InputError(AceStepError):
    """A mistake in the user's input: found before work starts, told in one message.

    `what` is the mistake, `where` the file, flag or row it is in, `fix` what the user can do.
    """

    exit_code = EXIT_INPUT

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what = what
        self.where = where
        self.fix = fix
        lines = [what if where is None else f"{what}: {where}"]
        if fix is not None:
            lines.append(f"  → {fix}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions cross process borders in Ray; the default would call __init__ with the joined message.
        return _rebuild_input_error, (self.what, self.where, self.fix)


class GpuMemoryError(AceStepError):
    """A run needs more GPU memory than there is."""


def _rebuild_input_error(what: str, where: str | None, fix: str | None) -> InputError:
    return InputError(what, where=where, fix=fix)


def without_password(text: str) -> str:
    """Without the names and passwords of URLs."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)
