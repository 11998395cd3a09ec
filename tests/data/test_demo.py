from __future__ import annotations

import numpy as np
import pytest
import soundfile

from acestep_ray.config import PrepareConfig
from acestep_ray.data.audio import AudioError, decode_window, silent_fraction
from acestep_ray.data.demo import write_demo_songs
from acestep_ray.data.prepare import prepare_dataset
from acestep_ray.data.schema import RejectReason


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    return write_demo_songs(tmp_path_factory.mktemp("songs"))


def test_songs_differ_in_format_rate_channels_and_length(songs):
    infos = [soundfile.info(path) for path in songs[:-2]]
    assert {info.format for info in infos} == {"WAV", "FLAC", "OGG", "MP3"}
    assert len({info.samplerate for info in infos}) >= 4
    assert {info.channels for info in infos} == {1, 2}
    assert min(info.duration for info in infos) == pytest.approx(3, abs=0.1)
    assert max(info.duration for info in infos) == pytest.approx(20, abs=0.1)
    assert sum(info.duration for info in infos) < 70


def test_songs_are_audible_and_not_clipped(songs):
    for path in songs[:-2]:
        samples, rate = decode_window(path, 240.0)
        assert silent_fraction(samples) < 0.05, path
        assert np.abs(samples).max() < 0.95, path
        blocks = samples[0, : len(samples[0]) // rate * rate].reshape(-1, rate)
        assert (blocks.std(axis=1) > 0.02).all(), path


def test_the_last_two_files_are_to_be_rejected(songs):
    silent, damaged = songs[-2:]
    assert silent_fraction(decode_window(silent, 240.0)[0]) == 1.0
    with pytest.raises(AudioError) as caught:
        decode_window(damaged, 240.0)
    assert caught.value.reason is RejectReason.CORRUPT


def test_the_same_seed_gives_the_same_bytes(songs, tmp_path):
    again = write_demo_songs(tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in songs]


def test_another_seed_gives_other_music(songs, tmp_path):
    other = write_demo_songs(tmp_path / "other", seed=1)
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(songs[:-2], other[:-2], strict=True))


def test_demo_songs_are_prepared_without_a_warning(songs, tmp_path):
    summary = prepare_dataset(PrepareConfig(data_dir=str(songs[0].parent), output_dir=str(tmp_path / "set")))
    assert summary.songs == len(songs)
    assert summary.warnings == []
    assert summary.without_lyrics == 2
