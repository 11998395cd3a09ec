"""What a stranger's files try: to run a program, which would leave a file."""

from __future__ import annotations

from pathlib import Path

import pytest


class RunsCode:
    """Unpickled, it makes the file `place`."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place), "w")


@pytest.fixture
def canary(tmp_path):
    """An object that leaves a file when it is unpickled; the test fails if the file is there at its end."""
    place = tmp_path / "canary"
    yield RunsCode(place)
    assert not place.exists(), "what a file said was run"
