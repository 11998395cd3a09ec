"""What an evaluation has to tell beside its figures: said at once, and kept for the report."""

from __future__ import annotations

from acestep_ray.terminal import show_line


class Notes:
    """Lines for the user."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def tell(self, text: str) -> None:
        """Say something that the report repeats."""
        self.lines.append(text)
        show_line(text)

    def warn(self, text: str) -> None:
        """Say that something is not as it should be."""
        self.tell(f"warning: {text}")
