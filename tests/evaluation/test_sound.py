"""Loudness, clipping, silence and brightness of signals of which they are known."""

from __future__ import annotations

import numpy as np
import pytest

from acestep_ray.evaluation.sound import clipped_share, score_sound, silent_share, spectral_centroid
from tests.evaluation.conftest import RATE, noise, tone


@pytest.mark.parametrize("gain", [1.2, 2.0, 5.0])
def test_the_clipped_share_of_a_sine_that_is_cut_off(gain):
    wave = (gain * tone(97.3, 2.0, amplitude=1.0)).clip(-1, 1)
    expected = 1 - 2 / np.pi * np.arcsin(1 / gain)
    assert clipped_share(wave) == pytest.approx(expected, abs=2e-3)
    assert "clipped" in score_sound(wave).flags


def test_clipping_as_16_bit_audio_has_it_counts_on_both_sides():
    wave = (np.round(2.0 * tone(97.3, 1.0, amplitude=1.0) * 32767).clip(-32768, 32767) / 32768).astype(
        np.float32
    )
    assert wave.max() < 1
    assert clipped_share(wave) == pytest.approx(2 / 3, abs=2e-3)


def test_peaks_at_full_scale_are_no_clipping():
    assert clipped_share(tone(441.0, 1.0, amplitude=1.0)) == 0
    click = np.zeros((2, RATE), np.float32)
    click[:, 1000:1002] = 1.0
    assert clipped_share(click) == 0
    click[0, 2000:2003] = -1.0
    assert clipped_share(click) == 3 / (2 * RATE)


def test_one_clipped_channel_is_half_of_the_samples():
    wave = np.stack([np.ones(RATE), np.zeros(RATE)]).astype(np.float32)
    assert clipped_share(wave) == 0.5


@pytest.mark.parametrize("frequency", [440.0, 1000.0, 5000.0])
def test_the_centroid_of_a_sine_is_its_frequency(frequency):
    assert spectral_centroid(tone(frequency, 1.0)) == pytest.approx(frequency, rel=0.02)


def test_the_centroid_of_white_noise_is_in_the_middle_and_flagged():
    wave = 0.1 * np.random.default_rng(0).standard_normal((2, 2 * RATE)).astype(np.float32)
    assert spectral_centroid(wave) == pytest.approx(12_000, rel=0.02)
    assert "shrill" in score_sound(wave).flags


def test_silence_does_not_move_the_centroid():
    wave = tone(1000.0, 1.0)
    with_silence = np.concatenate([wave, np.zeros((2, 3 * RATE), np.float32)], axis=1)
    assert spectral_centroid(with_silence) == pytest.approx(spectral_centroid(wave), rel=0.02)


@pytest.mark.parametrize("silent", [0.25, 0.5])
def test_the_silent_share(silent):
    wave = tone(1000.0, 4.0)
    wave[:, : round(silent * wave.shape[1])] *= 1e-5
    assert silent_share(wave) == pytest.approx(silent, abs=0.02)
    assert ("silent" in score_sound(wave).flags) == (silent > 0.3)


def test_what_is_quiet_is_not_silent():
    assert silent_share(tone(1000.0, 1.0, amplitude=10 ** (-50 / 20))) == 0


def test_nothing_but_zeros_has_no_loudness_and_no_centroid():
    score = score_sound(np.zeros((2, RATE), np.float32))
    assert (score.loudness_lufs, score.centroid_hz, score.silence, score.clipped) == (None, None, 1.0, 0.0)
    assert score.flags == ["silent"]


def test_the_loudness_of_a_known_signal():
    # BS.1770: 997 Hz at 0 dBFS on one channel reads -3.01 LUFS, so on two at -23 dBFS: -23 LUFS.
    score = score_sound(tone(997.0, 5.0, amplitude=10 ** (-23 / 20)))
    assert score.loudness_lufs == pytest.approx(-23.0, abs=0.1)
    assert score.flags == []


@pytest.mark.parametrize(("decibels", "flags"), [(-40, ["quiet"]), (-4, ["loud"]), (-15, [])])
def test_loudness_out_of_bounds_is_flagged(decibels, flags):
    assert score_sound(tone(997.0, 2.0, amplitude=10 ** (decibels / 20))).flags == flags


def test_a_clip_of_one_sample_has_a_score():
    score = score_sound(np.full((2, 1), 0.5, np.float32))
    assert (score.seconds, score.loudness_lufs, score.peak) == (1 / RATE, None, 0.5)


def test_music_of_ordinary_noise_is_not_flagged():
    assert score_sound(0.4 * noise(3.0, seed=1)).flags == []
