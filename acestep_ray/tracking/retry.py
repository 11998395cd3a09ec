"""The waits between attempts at what fails."""

from __future__ import annotations

import time
from dataclasses import dataclass

FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 60.0


@dataclass
class Retry:
    """When to try again what fails: after waits that grow."""

    failures: int = 0
    at: float = 0.0
    """By the monotonic clock."""

    @property
    def is_due(self) -> bool:
        """Whether to try now."""
        return time.monotonic() >= self.at

    def failed(self) -> None:
        """Wait longer than the last time, up to a bound."""
        wait = min(FIRST_RETRY_SECONDS * 2.0 ** min(self.failures, 20), LONGEST_RETRY_SECONDS)
        self.failures += 1
        self.at = time.monotonic() + wait

    def succeeded(self) -> None:
        """Begin with the shortest wait again."""
        self.failures, self.at = 0, 0.0
