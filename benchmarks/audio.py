"""Speed and quality of resamplers, and speed of the decoding stage: one process, one core.

    python benchmarks/audio.py --json audio.json
    python benchmarks/audio.py --section resamplers
    python benchmarks/audio.py --section decode --songs ~/Music

`resamplers`: tones across the spectrum against what they are at the new rate, frequencies in parts of the lower Nyquist
frequency. Noise is the worst residue of a tone below 0.9, after a fit of its amplitude; ripple the worst error of that
amplitude; bandwidth the frequency up to which a tone loses less than 1 dB; alias the loudest remainder of a tone of
1.05 or more.

`decode`: `AudioFile`, silence check and `to_training_audio` against a bare loop over the same files that reads with
soundfile and resamples with soxr. Songs are synthesised, or those of `--songs`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# One core, also for the libraries that ask for threads when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import soundfile
import soxr
import torch
from torchaudio.transforms import Resample

from acestep_ray.data.audio import (
    AUDIO_SUFFIXES,
    RESAMPLER,
    SAMPLE_RATE,
    AudioFile,
    silent_fraction,
    to_training_audio,
)

RATES = ((44_100, 48_000), (48_000, 44_100), (22_050, 48_000), (96_000, 48_000), (8_000, 48_000))
KAISER_BEST = {
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "resampling_method": "sinc_interp_kaiser",
    "beta": 14.769656459379492,
}
WINDOW_SECONDS = 240.0
EDGE_SECONDS = 0.2
FORMATS = {
    "wav": {},
    "flac": {},
    "mp3": {},
    "ogg": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
}

Resampler = Callable[[np.ndarray], np.ndarray]
"""(channels, n) at one rate → (channels, m) at the other."""


def resamplers(rate: int, new_rate: int) -> dict[str, Resampler]:
    """The candidates, each ready to use."""

    def with_torchaudio(**options: float | str) -> Resampler:
        resample = Resample(rate, new_rate, **options)
        return lambda samples: resample(torch.from_numpy(samples)).numpy()

    def with_soxr(quality: str) -> Resampler:
        return lambda samples: soxr.resample(samples.T, rate, new_rate, quality=quality).T

    return {
        "torchaudio": with_torchaudio(),
        "torchaudio kaiser best": with_torchaudio(**KAISER_BEST),
        "soxr HQ": with_soxr("HQ"),
        "soxr VHQ": with_soxr("VHQ"),
    }


def tone(frequency: float, rate: int, seconds: float) -> np.ndarray:
    """Sine and cosine of one frequency: float64 (2, n)."""
    phase = 2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate
    return np.stack([np.sin(phase), np.cos(phase)])


def decibels(ratio: float) -> float:
    return 20 * float(np.log10(max(ratio, 1e-12)))


def response(resample: Resampler, frequency: float, rate: int, new_rate: int) -> tuple[float, float, float]:
    """Gain of a tone, the residue beside it and the whole output, as ratios of the tone's amplitude and power."""
    output = resample(tone(frequency, rate, 1.0).astype(np.float32)).astype(np.float64)
    edge = round(EDGE_SECONDS * new_rate)
    output = output[:, edge : new_rate - edge]
    expected = tone(frequency, new_rate, 1.0)[:, edge : new_rate - edge]
    gain = float((output * expected).sum() / (expected**2).sum())
    power = (expected**2).mean()
    residue = ((output - gain * expected) ** 2).mean()
    return gain, float(np.sqrt(residue / power)), float(np.sqrt((output**2).mean() / power))


def quality(resample: Resampler, rate: int, new_rate: int) -> dict[str, float | None]:
    """Noise, ripple, bandwidth and alias of one resampler; see the top of this file."""
    nyquist = min(rate, new_rate) / 2
    passed = [response(resample, f, rate, new_rate) for f in np.linspace(0.02, 0.9, 45) * nyquist]
    edge = np.linspace(0.8, 1.0, 81)
    kept = [response(resample, f, rate, new_rate)[0] for f in edge * nyquist]
    stopped = np.linspace(1.05 * nyquist, 0.995 * rate / 2, 40) if rate > new_rate else []
    aliases = [response(resample, f, rate, new_rate)[2] for f in stopped]
    return {
        "noise_db": round(max(decibels(residue) for _, residue, _ in passed), 1),
        "ripple_db": round(max(abs(decibels(gain)) for gain, _, _ in passed), 4),
        "bandwidth": round(max((f for f, gain in zip(edge, kept, strict=True) if gain > 10**-0.05)), 3),
        "alias_db": round(max(map(decibels, aliases)), 1) if aliases else None,
    }


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """The shortest of some runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def measure_resamplers(seconds: int, repeats: int) -> list[dict]:
    """A row for each pair of rates and resampler: times real time of stereo, and quality."""
    rows = []
    for rate, new_rate in RATES:
        song = synthesise(seconds, rate).T.copy()
        for name, resample in resamplers(rate, new_rate).items():
            took = seconds_of(lambda: resample(song), repeats)  # noqa: B023
            row = {
                "rates": f"{rate} → {new_rate}",
                "resampler": name,
                "times_realtime": round(seconds / took),
            }
            rows.append(row | quality(resample, rate, new_rate))
    return rows


def synthesise(seconds: int, rate: int) -> np.ndarray:
    """Chords, a beat and some noise: float32 (n, 2) of full dynamics, so that lossy encoders have work."""
    rng = np.random.default_rng(0)
    n = seconds * rate
    t = np.arange(n) / rate
    song = 0.02 * rng.standard_normal((n, 2))
    for beat, root in enumerate(np.resize([220.0, 174.6, 261.6, 196.0], seconds)):
        part = slice(beat * rate, (beat + 1) * rate)
        decay = np.exp(-3 * (t[part] - beat))[:, None]
        for harmonic in range(1, 9):
            phase = 2 * np.pi * root * harmonic * t[part]
            song[part] += 0.2 / harmonic * decay * np.stack([np.sin(phase), np.sin(phase + harmonic)], axis=1)
    return np.clip(song, -1, 1).astype(np.float32)


def write_songs(folder: Path, seconds: int) -> list[Path]:
    """One synthesised song in every format, at 44.1 kHz where the format allows it."""
    paths = []
    for suffix, options in FORMATS.items():
        rate = 48_000 if suffix == "opus" else 44_100
        song = synthesise(seconds, rate)
        path = folder / f"song.{suffix}"
        with soundfile.SoundFile(path, "w", rate, 2, **options) as file:
            for second in range(seconds):  # libsndfile's Vorbis encoder overflows its stack with a whole song
                file.write(song[second * rate : (second + 1) * rate])
        paths.append(path)
    return paths


def bare_loop(path: Path) -> None:
    """What any script would do, at its shortest."""
    with soundfile.SoundFile(path) as file:
        samples = file.read(round(WINDOW_SECONDS * file.samplerate), dtype="float32", always_2d=True)
        if file.samplerate != SAMPLE_RATE:
            soxr.resample(samples, file.samplerate, SAMPLE_RATE, quality="HQ")


def decode_stage(path: Path) -> dict[str, float]:
    """The project's way, as the precomputing job does it; seconds of each part."""
    started = time.perf_counter()
    with AudioFile(path) as file:
        samples = file.read(0.0, WINDOW_SECONDS)
        rate = file.sample_rate
        decoded = time.perf_counter()
        silent_fraction(samples[:2])
        checked = time.perf_counter()
        to_training_audio(samples, rate, WINDOW_SECONDS)
        resampled = time.perf_counter()
        file.sha256()
    return {
        "decode": decoded - started,
        "silence": checked - decoded,
        "resample": resampled - checked,
        "hash": time.perf_counter() - resampled,
    }


def measure_decoding(paths: list[Path], repeats: int) -> list[dict]:
    """A row for each suffix, and one for all files: the bare loop and ours."""
    rows, everything = [], {"bare": 0.0, "decode": 0.0, "silence": 0.0, "resample": 0.0, "hash": 0.0}
    audio_seconds = 0.0
    for suffix in sorted({path.suffix for path in paths}):
        files = [path for path in paths if path.suffix == suffix]
        length = sum(min(soundfile.info(path).duration, WINDOW_SECONDS) for path in files)
        total = dict.fromkeys(everything, 0.0)
        for path in files:
            best = None
            for _ in range(repeats):  # in turns, so that both meet the same neighbours on a shared machine
                bare = seconds_of(lambda: bare_loop(path), 1)  # noqa: B023
                ours = {"bare": bare} | decode_stage(path)
                best = ours if best is None else {part: min(best[part], ours[part]) for part in ours}
            total = {part: total[part] + best[part] for part in total}
        rows.append(_decoding_row(suffix, len(files), length, total))
        everything = {part: everything[part] + total[part] for part in total}
        audio_seconds += length
    rows.append(_decoding_row("all", len(paths), audio_seconds, everything))
    return rows


def _decoding_row(suffix: str, files: int, length: float, seconds: dict[str, float]) -> dict:
    ours = seconds["decode"] + seconds["silence"] + seconds["resample"]
    return {
        "format": suffix,
        "files": files,
        "audio_s": round(length),
        "bare_x": round(length / seconds["bare"]),
        "ours_x": round(length / ours),
        "ratio": round(seconds["bare"] / ours, 3),
        "decode_%": round(100 * seconds["decode"] / ours),
        "silence_%": round(100 * seconds["silence"] / ours),
        "resample_%": round(100 * seconds["resample"] / ours),
        "hash_% more": round(100 * seconds["hash"] / ours),
    }


def print_table(title: str, rows: list[dict]) -> None:
    """Rows of equal columns, aligned."""
    print(f"\n{title}")
    cells = [
        list(rows[0]),
        *[["" if value is None else str(value) for value in row.values()] for row in rows],
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print(" | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--section", choices=["resamplers", "decode", "all"], default="all")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="this stage runs on CPUs only"
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--songs", type=Path, help="a folder of audio files to decode, instead of made ones")
    parser.add_argument("--seconds", type=int, default=240, help="length of the made songs")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the shortest counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.device == "cuda":
        print("decoding and resampling run on CPUs: --device cuda changes nothing")

    processor = platform.processor() or platform.machine()
    report = {
        "processor": processor,
        "torch": torch.__version__,
        "soxr": soxr.__version__,
        "libsndfile": soundfile.__libsndfile_version__,
        "resampler": RESAMPLER,
    }
    print(", ".join(f"{name} {value}" for name, value in report.items()))
    if arguments.section != "decode":
        report["resamplers"] = measure_resamplers(min(arguments.seconds, 60), arguments.repeats)
        print_table("Resamplers, stereo, one thread", report["resamplers"])
    if arguments.section != "resamplers":
        with tempfile.TemporaryDirectory() as folder:
            if arguments.songs is None:
                paths = write_songs(Path(folder), arguments.seconds)
            else:
                paths = sorted(p for p in arguments.songs.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
                if not paths:
                    parser.error(f"no audio files below {arguments.songs}")
            report["decode"] = measure_decoding(paths, arguments.repeats)
        print_table("Decoding, one process", report["decode"])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
