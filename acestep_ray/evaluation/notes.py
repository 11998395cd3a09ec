"""What an evaluation has to tell beside its figures: said at once, and kept for the report."""

from __future__ import annotations


class Notes:
    """Lines for the user."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def tell(self, text: str) -> None:
        """Say something that the report repeats."""
        self.lines.append(text)
        print(text, flush=True)

    def warn(self, text: str) -> None:
        """Say that something is not as it should be."""
        self.tell(f"warning: {text}")
