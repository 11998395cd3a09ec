"""Float samples of another scale than 1.0."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from acestep_ray.data.audio import AudioError, AudioFile, decode_window
from acestep_ray.data.schema import RejectReason

RATE = 24_000


def tone(seconds: float = 6.0, level: float = 1.0) -> np.ndarray:
    t = np.arange(round(seconds * RATE)) / RATE
    return level * np.stack([np.sin(300 * t), 0.5 * np.cos(500 * t)], axis=1)


@pytest.fixture
def level_of(tmp_path):
    """A function: samples → what is read of them as a float file, its warnings."""

    def read(samples, suffix="wav", subtype="FLOAT", whole_numbers=False):
        path = tmp_path / f"song.{suffix}"
        soundfile.write(path, np.rint(samples) if whole_numbers else samples, RATE, subtype=subtype)
        with AudioFile(path) as file:
            return file.read(0, 240), file.warnings

    return read


@pytest.mark.parametrize("suffix", ["wav", "aiff"])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize("bits", [15, 23, 31])
@pytest.mark.parametrize("whole_numbers", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0, 1.02])
def test_float_at_an_integer_scale_is_the_sound_of_the_integers(
    level_of, suffix, subtype, bits, whole_numbers, share
):
    samples, warnings = level_of(tone(level=share * 2.0**bits), suffix, subtype, whole_numbers)
    expected = tone(level=min(share, 1.0))
    np.testing.assert_allclose(samples.T, expected, atol=2.0**-14)
    assert f"{bits + 1}-bit" in warnings[0]


@pytest.mark.parametrize("peak", [1.001, 1.5, 4.0, 32.0, 200.0])
def test_a_hot_stem_is_scaled_down_and_not_clipped(level_of, peak):
    samples, warnings = level_of(tone(level=peak))
    np.testing.assert_allclose(samples.T, tone() / np.abs(tone()).max(), atol=1e-6)
    assert "scaled down" in warnings[0]


def test_quiet_whole_numbers_are_quiet_integers_and_a_hot_stem_is_hot(level_of):
    samples, _ = level_of(tone(level=200), whole_numbers=True)
    assert np.abs(samples).max() == pytest.approx(200 / 32768, rel=0.01)
    samples, _ = level_of(tone(level=200))
    assert np.abs(samples).max() == 1.0
    samples, _ = level_of(tone(level=300))
    assert np.abs(samples).max() == pytest.approx(300 / 32768, rel=0.01)


@pytest.mark.parametrize("peak", [1e-6, 0.5, 1.0])
def test_float_within_full_scale_is_unchanged(level_of, peak):
    samples, warnings = level_of(tone(level=peak))
    np.testing.assert_array_equal(samples.T, tone(level=peak).astype(np.float32))
    assert warnings == []


def test_all_windows_of_a_song_get_one_gain(tmp_path):
    path = tmp_path / "song.wav"
    samples = tone()
    samples[: 3 * RATE] *= 0.1
    soundfile.write(path, 4 * samples, RATE, subtype="FLOAT")
    whole, _ = decode_window(path, 240)
    for start in (0, 2, 4):
        window, _ = decode_window(path, 1, start_seconds=start)
        np.testing.assert_array_equal(window, whole[:, start * RATE : (start + 1) * RATE])


def test_samples_that_are_no_sound_are_refused(tmp_path):
    path = tmp_path / "song.wav"
    soundfile.write(path, tone(level=1e20), RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="no sound") as caught:
        decode_window(path, 240)
    assert caught.value.reason is RejectReason.CORRUPT
