"""No damaged file ends the process that decodes it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

RATE = 24_000
SOUNDFILE_OPTIONS = {
    "wav": {},
    "flac": {},
    "mp3": {},
    "ogg": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "aiff": {},
}
FFMPEG_KINDS = ("m4a", "webm", "wma")
MUTATIONS_OF_EACH = 70


@pytest.fixture
def good_files(tmp_path) -> Path:
    """A folder with a short song in every format that can be written here."""
    folder = tmp_path / "songs"
    folder.mkdir()
    t = np.arange(round(0.7 * RATE)) / RATE
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(t))
    song = np.stack([0.3 * np.sin(2 * np.pi * 440 * t), noise], axis=1)
    for suffix, options in SOUNDFILE_OPTIONS.items():
        soundfile.write(folder / f"song.{suffix}", song, RATE, **options)
    if shutil.which("ffmpeg") and importlib.util.find_spec("torchcodec"):
        for suffix in FFMPEG_KINDS:
            command = [
                "ffmpeg",
                "-v",
                "error",
                "-i",
                str(folder / "song.wav"),
                str(folder / f"song.{suffix}"),
            ]
            subprocess.run(command, check=True)
    return folder


def test_mutated_files_are_decoded_or_refused_in_a_process_that_lives_on(good_files):
    command = [sys.executable, "-m", "tests.data.audio_fuzzing", str(good_files), str(MUTATIONS_OF_EACH), "0"]
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, errors="replace", timeout=120
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines[-1:], done.stderr[-2000:])
    assert "Traceback" not in done.stderr  # of a callback: such errors are printed, and lost
    counts = json.loads(lines[-1])["counts"]
    assert len(counts) >= len(SOUNDFILE_OPTIONS)
    for name, outcomes in counts.items():
        assert sum(outcomes.values()) == MUTATIONS_OF_EACH
        assert outcomes["samples"] > 0, name
        assert outcomes["corrupt"] > 0, name
        assert set(outcomes) <= {"samples", "corrupt", "unsupported", "empty"}, name
