from __future__ import annotations

import math

import pytest
import torch

from acestep_ray.models.mel import LogMelSpectrogram


@pytest.fixture(scope="module")
def mel() -> LogMelSpectrogram:
    return LogMelSpectrogram()


def test_every_512_samples_become_one_frame(mel):
    assert mel(torch.randn(2, 3, 8 * 512)).shape == (2, 3, 128, 8)


def test_silence_is_the_same_in_every_frame_and_finite(mel):
    # A filter of Slaney's norm has area 1 over Hz, so it passes the floor of the magnitude, 1e-3, over the bin's width.
    silence = mel(torch.zeros(1, 20 * 512))[0]
    assert torch.equal(silence, silence[:, :1].expand_as(silence))
    assert silence[-1, 0].item() == pytest.approx(math.log(1e-3 / (44_100 / 2048)), abs=0.01)


def test_a_band_without_energy_is_log_1e_5():
    mel = LogMelSpectrogram()
    mel.filters.zero_()
    assert mel(torch.zeros(1, 4096)).unique().item() == pytest.approx(math.log(1e-5))


@pytest.mark.parametrize("frequency", [200.0, 3000.0, 12_000.0])
def test_a_tone_is_loudest_in_the_band_that_holds_it(mel, frequency):
    def slaney(hertz: float) -> float:
        return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)

    time = torch.arange(44_100) / 44_100
    loudest = mel(torch.sin(2 * math.pi * frequency * time)[None])[0, :, 40].argmax().item()
    step = (slaney(16_000) - slaney(40)) / 129
    assert loudest == pytest.approx((slaney(frequency) - slaney(40)) / step - 1, abs=1)


def test_a_wave_does_not_depend_on_its_batch(mel):
    waves = torch.randn(3, 2, 4096)
    torch.testing.assert_close(mel(waves)[1, 0], mel(waves[1, :1])[0])
