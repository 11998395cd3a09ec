"""A few small songs, synthesised: something to try every step on without any music at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

_BEATS_PER_BAR = 4
_SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_C3 = 48  # MIDI number of the C below middle C


@dataclass(frozen=True)
class _Tune:
    name: str
    suffix: str
    sample_rate: int
    channels: int
    tempo: float  # beats a minute
    chords: str  # one a bar: a letter, then # and m as needed
    prompt: str
    lyrics: str
    drums: bool = True


_TUNES = (
    _Tune(
        name="morning_tram",
        suffix=".wav",
        sample_rate=44_100,
        channels=2,
        tempo=120,
        chords="C G Am F",
        prompt="pop, upbeat, bright synthesizer, 120 bpm, happy",
        lyrics="[verse]\nThe morning tram is painted blue\nIt sings along at half past two\n"
        "[chorus]\nRing the bell and ride with me\n21 stops from here to the sea",
    ),
    _Tune(
        name="nachtzug",
        suffix=".flac",
        sample_rate=48_000,
        channels=2,
        tempo=96,
        chords="Am F C G",
        prompt="synthwave, night, driving, minor key",
        lyrics="[verse]\nDer Nachtzug fährt durch Regen und Licht\nIch zähle die Lampen und schlafe noch nicht\n"
        "[chorus]\nWeiter, nur weiter, der Morgen ist nah",
    ),
    _Tune(
        name="luna_de_papel",
        suffix=".ogg",
        sample_rate=22_050,
        channels=1,
        tempo=80,
        chords="Dm A",
        prompt="ballad, slow, soft, acoustic",
        lyrics="[verse]\nLuna de papel sobre el tejado\nGuarda mi sombrero mojado",
        drums=False,
    ),
    _Tune(
        name="纸飞机",
        suffix=".mp3",
        sample_rate=44_100,
        channels=2,
        tempo=100,
        chords="F G Em Am",
        prompt="mandopop, gentle, piano, dreamy",
        lyrics="[verse]\n纸飞机飞过小窗\n带走一点点阳光\n[chorus]\n飞吧飞吧 不要怕远方",
    ),
    _Tune(
        name="petite_pluie",
        suffix=".wav",
        sample_rate=48_000,
        channels=1,
        tempo=80,
        chords="G",
        prompt="jingle, short, playful",
        lyrics="[chorus]\nPetite pluie, danse avec moi",
    ),
    _Tune(
        name="long_valley",
        suffix=".flac",
        sample_rate=96_000,
        channels=1,
        tempo=96,
        chords="Em C G D Em C Am D",
        prompt="instrumental, ambient, calm, evolving pads",
        lyrics="",
        drums=False,
    ),
)


def write_demo_songs(directory: str | os.PathLike[str], seed: int = 0) -> list[Path]:
    """Writes six short songs (3 to 20 seconds) with prompts and lyrics, one silent file and one damaged file.

    WAV, FLAC, Ogg and MP3; 22.05 to 96 kHz; mono and stereo; lyrics in five languages, and one instrumental.
    The same seed gives the same files, byte for byte. Returns the paths of the audio files.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, tune in enumerate(_TUNES):
        samples = _render(tune, np.random.default_rng([seed, number]))
        path = directory / f"{tune.name}{tune.suffix}"
        soundfile.write(path, samples, tune.sample_rate)
        if tune.suffix == ".ogg":
            path.write_bytes(_with_fixed_serial(path.read_bytes()))
        _write_texts(path, tune.prompt, tune.lyrics)
        paths.append(path)

    silent = directory / "silent.wav"
    soundfile.write(silent, np.zeros((4 * 44_100, 2)), 44_100)
    _write_texts(silent, "silence, a file to be rejected", "")
    damaged = directory / "damaged.flac"
    whole = (directory / "nachtzug.flac").read_bytes()
    damaged.write_bytes(whole[: len(whole) // 4])
    _write_texts(damaged, "damaged, a file to be rejected", "[verse]\nThis one was cut off")
    return [*paths, silent, damaged]


def _write_texts(audio: Path, prompt: str, lyrics: str) -> None:
    audio.with_name(f"{audio.stem}_prompt.txt").write_text(prompt + "\n", encoding="utf-8")
    if lyrics:
        audio.with_name(f"{audio.stem}_lyrics.txt").write_text(lyrics + "\n", encoding="utf-8")


def _render(tune: _Tune, rng: np.random.Generator) -> np.ndarray:
    """The tune as samples (samples, channels) with a peak of 0.8."""
    rate, beat = tune.sample_rate, 60 / tune.tempo
    chords = [_chord(name) for name in tune.chords.split()]
    bar = _BEATS_PER_BAR * beat
    track = np.zeros((round(len(chords) * bar * rate), tune.channels))

    def play(sound: np.ndarray, start: float, pan: float = 0.5) -> None:
        first = round(start * rate)
        piece = track[first : first + len(sound)]
        gains = [1.0] if tune.channels == 1 else [np.cos(pan * np.pi / 2), np.sin(pan * np.pi / 2)]
        piece += sound[: len(piece), None] * gains

    for number, chord in enumerate(chords):
        start = number * bar
        for voice, note in enumerate(chord):
            play(
                0.16 * _tone(note, bar * 1.1, rate, brightness=0.35, attack=0.3), start, pan=0.2 + 0.3 * voice
            )
        for step in range(2 * _BEATS_PER_BAR):
            at = start + step * beat / 2
            play(0.3 * _tone(chord[0] - 12, beat / 2, rate, brightness=0.5, attack=0.01), at)
            if rng.random() < 0.7:
                note = int(rng.choice(chord)) + 12
                play(
                    0.22 * _tone(note, beat, rate, brightness=0.6, attack=0.02), at, pan=rng.uniform(0.3, 0.7)
                )
            if tune.drums:
                play(0.06 * _noise(0.05, rate, rng), at, pan=0.65)
        if tune.drums:
            for step in range(_BEATS_PER_BAR):
                drum = 0.5 * _kick(rate) if step % 2 == 0 else 0.2 * _noise(0.18, rate, rng)
                play(drum, start + step * beat)
    return 0.8 * track / np.abs(track).max()


def _chord(name: str) -> list[int]:
    """MIDI numbers of a triad such as "C", "F#" or "Am"."""
    root = _C3 + _SEMITONES[name[0]] + name.count("#")
    third = 3 if name.endswith("m") else 4
    return [root, root + third, root + 7]


def _tone(note: int, seconds: float, rate: int, *, brightness: float, attack: float) -> np.ndarray:
    """A plucked tone: harmonics that fade by `brightness` from one to the next, a linear attack, a soft decay."""
    time = np.arange(round(seconds * rate)) / rate
    frequency = 440.0 * 2 ** ((note - 69) / 12)
    wave = sum(
        brightness ** (harmonic - 1) * np.sin(2 * np.pi * harmonic * frequency * time)
        for harmonic in range(1, 7)
    )
    envelope = (
        np.minimum(time / attack, 1) * np.exp(-2 * time / seconds) * np.minimum((seconds - time) / 0.02, 1)
    )
    return wave * envelope


def _kick(rate: int) -> np.ndarray:
    time = np.arange(round(0.25 * rate)) / rate
    # A sine that falls from 150 to 45 Hz.
    phase = 2 * np.pi * (45 * time + (105 / 30) * (1 - np.exp(-30 * time)))
    return np.sin(phase) * np.exp(-14 * time)


def _noise(seconds: float, rate: int, rng: np.random.Generator) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    hiss = np.diff(rng.standard_normal(len(time) + 1))  # the difference takes the low frequencies out
    return hiss * np.exp(-5 * time / seconds)


def _with_fixed_serial(ogg: bytes) -> bytes:
    """The same Ogg stream with the serial number 1; the encoder draws one from the clock."""
    fixed, start = bytearray(ogg), 0
    while start < len(fixed):
        segments = fixed[start + 26]
        end = start + 27 + segments + sum(fixed[start + 27 : start + 27 + segments])
        fixed[start + 14 : start + 18] = (1).to_bytes(4, "little")
        fixed[start + 22 : start + 26] = bytes(4)
        fixed[start + 22 : start + 26] = _ogg_checksum(fixed[start:end]).to_bytes(4, "little")
        start = end
    return bytes(fixed)


def _ogg_checksum(page: bytes | bytearray) -> int:
    """CRC-32 of an Ogg page (RFC 3533): polynomial 0x04c11db7, from 0, bits not reflected."""
    remainder = 0
    for byte in page:
        remainder ^= byte << 24
        for _ in range(8):
            remainder = (remainder << 1) ^ (0x104C11DB7 if remainder & 0x80000000 else 0)
    return remainder
