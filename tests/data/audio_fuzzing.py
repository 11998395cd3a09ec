"""Decodes mutated audio files in this process and prints what became of each as JSON; run by `test_audio_fuzz`.

    python -m tests.data.audio_fuzzing FOLDER MUTATIONS SEED

FOLDER holds good files; each is mutated MUTATIONS times. The name of a mutation is printed before it is decoded, so
that the last line names the one of which the process died.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np

from acestep_ray.data.audio import AudioError, AudioFile, probe_seconds, silent_fraction, to_training_audio
from acestep_ray.storage import StoredFile

# Windows that are read of each file: the start, the middle, and past the end.
WINDOWS = ((0.0, 4.0), (0.4, 0.2), (100.0, 1.0))
# Address space that all decoding together may take besides what the process has at its start.
MEMORY_BYTES = 1 << 30
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF)


def flip_bytes(content: bytearray, rng: random.Random, other: bytes) -> None:
    """Some bytes anywhere."""
    for _ in range(rng.choice((1, 3, 10, 100))):
        content[rng.randrange(len(content))] = rng.randrange(256)


def flip_header(content: bytearray, rng: random.Random, other: bytes) -> None:
    """Some bytes of the header."""
    for _ in range(rng.choice((1, 2, 5))):
        content[rng.randrange(min(len(content), 256))] = rng.randrange(256)


def truncate(content: bytearray, rng: random.Random, other: bytes) -> None:
    """The end is missing; often nearly all."""
    del content[max(1, int(len(content) * rng.random() ** 3)) :]


def edit_number(content: bytearray, rng: random.Random, other: bytes) -> None:
    """A length, count or offset in the header becomes another: sizes of chunks, rates, channels, frames."""
    place = rng.randrange(4, min(len(content), 200) - 4)
    number = rng.choice((*EXTREMES, rng.getrandbits(32)))
    content[place : place + 4] = struct.pack(rng.choice("<>") + "I", number)


def splice(content: bytearray, rng: random.Random, other: bytes) -> None:
    """A piece of another file in the middle."""
    start = rng.randrange(len(other))
    piece = other[start : start + rng.choice((4, 100, 5000))]
    place = rng.randrange(len(content))
    content[place : place + rng.choice((0, len(piece)))] = piece


def repeat(content: bytearray, rng: random.Random, other: bytes) -> None:
    """A piece of the file twice."""
    start = rng.randrange(len(content))
    content[start:start] = content[start : start + rng.choice((16, 500, 20000))]


def blank(content: bytearray, rng: random.Random, other: bytes) -> None:
    """A hole, as of a download that never ended."""
    start = rng.randrange(len(content))
    length = min(rng.choice((8, 500, 20000)), len(content) - start)
    content[start : start + length] = bytes(length)


MUTATIONS: tuple[Callable[[bytearray, random.Random, bytes], None], ...] = (
    flip_bytes,
    flip_header,
    truncate,
    edit_number,
    splice,
    repeat,
    blank,
)


def decode(file: Path | StoredFile) -> str:
    """What decoding some windows of a file comes to: "samples" or the reason of the AudioError."""
    seconds = probe_seconds(file)
    assert seconds is None or seconds >= 0
    outcomes = []
    for start, length in WINDOWS:
        try:
            with AudioFile(file) as audio:
                samples = audio.read(start, length)
            assert samples.dtype == np.float32
            assert 1 <= samples.shape[0] <= 8
            assert samples.shape[1] <= length * audio.sample_rate + 1
            assert np.isfinite(samples).all()
            assert 0.0 <= silent_fraction(samples) <= 1.0
            assert np.abs(to_training_audio(samples, audio.sample_rate, 4.0)).max() <= 1.0
            outcomes.append("samples")
        except AudioError as error:
            outcomes.append(error.reason.value)
    return outcomes[0]


def main() -> None:
    """Mutate and decode; the last line of the output is a JSON object with the counts."""
    folder, mutations, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    sources = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    names = list(sources)
    for name in names:  # loads all that decoding needs, before memory is counted
        assert decode(folder / name) == "samples", name
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = address_space + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    memory = fsspec.filesystem("memory")
    counts: dict[str, dict[str, int]] = {}
    mutated = folder / "mutated"
    mutated.mkdir(exist_ok=True)
    for name in names:
        outcomes: dict[str, int] = {}
        for number in range(mutations):
            rng = random.Random(f"{seed}/{name}/{number}")
            content = bytearray(sources[name])
            mutate = MUTATIONS[number % len(MUTATIONS)]
            mutate(content, rng, sources[rng.choice(names)])
            print(f"{name} {number} {mutate.__name__}", flush=True)
            path = mutated / name
            path.write_bytes(content)
            outcome = decode(path)
            if number % 3 == 0:  # the same bytes through memory, as of an object in storage
                memory.pipe_file("/fuzz/song", bytes(content))
                decode(StoredFile.at("memory://fuzz/song"))
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        counts[name] = outcomes
    print(json.dumps({"counts": counts}))


if __name__ == "__main__":
    main()
