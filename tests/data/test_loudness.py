"""Loudness, against the test signals of ITU-R BS.1770 and EBU Tech 3341."""

from __future__ import annotations

import numpy as np
import pytest

from acestep_ray.data.audio import SAMPLE_RATE, to_training_audio
from acestep_ray.data.loudness import integrated_loudness


def tone(decibels, seconds, frequency=1000.0, rate=SAMPLE_RATE):
    phase = 2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate
    return (10 ** (decibels / 20) * np.sin(phase)).astype(np.float32)[None]


def stereo(*parts):
    return np.concatenate([np.repeat(part, 2, axis=0) for part in parts], axis=1)


def test_a_full_scale_sine_in_one_channel_is_3_lufs_below_zero():
    # The recommendation's own figure for 997 Hz; a second channel of the same doubles the power.
    assert integrated_loudness(tone(0, 20, 997.0)) == pytest.approx(-3.01, abs=0.01)
    assert integrated_loudness(stereo(tone(0, 20, 997.0))) == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(-23, 20)], -23.0),  # EBU Tech 3341, case 1
        ([(-33, 20)], -33.0),  # case 2
        ([(-36, 10), (-23, 60), (-36, 10)], -23.0),  # case 3: the relative gate
        ([(-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)], -23.0),  # case 4: and the absolute one
        ([(-26, 20), (-20, 20.1), (-26, 20)], -23.0),  # case 5: all is above the gates
    ],
)
def test_the_signals_of_the_ebu_measure_what_it_says(parts, expected):
    wave = stereo(*(tone(*part) for part in parts))
    assert integrated_loudness(wave) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("frequency", "gain"), [(60.0, -2.94), (10_000.0, 4.0)])
def test_low_tones_count_less_and_high_ones_more(frequency, gain):
    # A second-order high-pass at 38 Hz with Q 0.5, and a shelf of 4 dB that has +0.69 dB at 997 Hz.
    loudness = integrated_loudness(tone(-20, 10, frequency))
    assert loudness - integrated_loudness(tone(-20, 10, 997.0)) == pytest.approx(gain - 0.69, abs=0.1)


@pytest.mark.parametrize(
    "wave", [np.zeros((2, 200_000), np.float32), stereo(tone(-80, 5)), stereo(tone(0, 0.3))]
)
def test_silence_and_less_than_a_block_have_no_loudness(wave):
    assert integrated_loudness(wave) is None


@pytest.mark.parametrize("rate", [44_100, SAMPLE_RATE])
@pytest.mark.parametrize("channels", [1, 2])
def test_training_audio_is_brought_to_the_loudness_asked_for(rate, channels):
    rng = np.random.default_rng(0)
    samples = (0.02 * rng.standard_normal((channels, 10 * rate))).astype(np.float32)
    wave = to_training_audio(samples, rate, loudness_lufs=-16.0)
    assert integrated_loudness(wave) == pytest.approx(-16.0, abs=0.01)
    plain = to_training_audio(samples, rate)
    gain = np.linalg.norm(wave) / np.linalg.norm(plain)
    np.testing.assert_allclose(wave, plain * gain, atol=1e-5)


def test_padding_does_not_count_for_the_loudness():
    wave = to_training_audio(tone(-30, 1.0), SAMPLE_RATE, loudness_lufs=-20.0)
    assert integrated_loudness(wave[:, :SAMPLE_RATE]) == pytest.approx(-20.0, abs=0.01)
    assert not wave[:, SAMPLE_RATE:].any()


def test_what_gets_louder_than_full_scale_is_clipped_after_the_gain():
    wave = to_training_audio(tone(-20, 5), SAMPLE_RATE, loudness_lufs=6.0)
    assert np.abs(wave).max() == 1.0
    loud = to_training_audio(4 * tone(0, 5), SAMPLE_RATE, loudness_lufs=-20.0)
    assert np.abs(loud).max() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("samples", [np.zeros((2, 200_000), np.float32), tone(-10, 0.2)])
def test_audio_that_cannot_be_measured_is_left_as_it_is(samples):
    expected = to_training_audio(samples, SAMPLE_RATE)
    np.testing.assert_array_equal(to_training_audio(samples, SAMPLE_RATE, loudness_lufs=-14.0), expected)
