"""Songs as vectors of windows: which frames a window has, and what happens to songs that have none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from acestep_ray.errors import InputError
from acestep_ray.evaluation.embeddings import embed, embed_files, find_audio, window_starts
from acestep_ray.evaluation.notes import Notes
from tests.evaluation.conftest import RATE, noise, tone


class Clock:
    """Stands for an encoder: 75 frames a second, whose features are the time and what `then` makes of the wave."""

    def __init__(self, then=lambda wave: 0.0):
        self.then = then

    def encode(self, wave: torch.Tensor) -> torch.Tensor:
        count = wave.shape[1] * 75 // RATE
        return torch.stack(
            [(torch.arange(count) + 0.5) / 75, torch.full((count,), float(self.then(wave)))], dim=1
        )


@pytest.mark.parametrize(
    ("seconds", "starts"),
    [(0.01, [0]), (4.9, [0]), (5.0, [0, 2.5]), (7.4, [0, 2.5]), (7.5, [0, 2.5, 5.0]), (11, [0, 2.5, 5, 7.5])],
)
def test_windows_begin_every_half_of_one_as_long_as_half_of_one_is_left(seconds, starts):
    assert list(window_starts(seconds)) == starts


def test_a_window_is_the_mean_of_its_five_seconds():
    vectors, starts = embed(np.zeros((2, 12 * RATE), np.float32), Clock())
    assert starts == [0.0, 2.5, 5.0, 7.5]
    assert vectors[:, 0] == pytest.approx([2.5, 5.0, 7.5, 9.75], abs=0.02)  # the last has 4.5 s


def test_real_encoders_give_a_vector_a_window_whatever_the_volume(checkpoint):
    encoders = checkpoint.load_ssl_encoders()
    wave = noise(8.0, seed=3)
    for name, width in (("mert", 32), ("m-hubert", 24)):
        loud, _ = embed(wave, encoders[name])
        quiet, _ = embed(0.1 * wave, encoders[name])
        assert loud.shape == (3, width)
        assert np.abs(loud).max() > 0.01
        np.testing.assert_allclose(loud, quiet, atol=1e-3)
        features = encoders[name].encode(torch.from_numpy(wave))
        frames = round(len(features) * 5 / 8)
        np.testing.assert_allclose(loud[0], features[:frames].mean(dim=0), atol=1e-4)


def test_windows_that_do_not_overlap_are_every_other_one(write_songs):
    folder = write_songs("songs", one=tone(440, 16.0))
    (song,) = embed_files([folder / "one.wav"], folder, {"clock": Clock()}, Notes())["clock"]
    assert song.starts == [0.0, 2.5, 5.0, 7.5, 10.0, 12.5]
    assert song.apart[:, 0] == pytest.approx([2.5, 7.5, 12.5], abs=0.02)


def test_a_song_of_nan_is_named_and_left_out_of_all_encoders(write_songs, capsys):
    folder = write_songs("songs", good=tone(440, 4.0), loud=tone(440, 4.0, amplitude=0.9))
    broken = Clock(lambda wave: np.nan if wave.max() > 0.8 else 1.0)
    notes = Notes()
    songs = embed_files(find_audio(folder, "--x"), folder, {"whole": Clock(), "broken": broken}, notes)
    assert {name: [song.name for song in found] for name, found in songs.items()} == {
        "whole": ["good.wav"],
        "broken": ["good.wav"],
    }
    assert notes.lines == ["warning: loud.wav is left out: its broken embedding is not finite"]
    assert "loud.wav" in capsys.readouterr().out


def test_a_file_that_is_no_audio_is_told_and_left_out(write_songs):
    folder = write_songs("songs", good=tone(440, 4.0))
    (folder / "bad.mp3").write_bytes(b"no audio" * 100)
    notes = Notes()
    songs = embed_files(find_audio(folder, "--x"), folder, {"clock": Clock()}, notes)
    assert [song.name for song in songs["clock"]] == ["good.wav"]
    assert "bad.mp3 is left out" in notes.lines[0]


def test_audio_is_found_in_subfolders_by_name_and_nothing_else(write_songs):
    folder = write_songs("songs", b=tone(440, 1.0), a=tone(440, 1.0))
    write_songs("songs/more", c=tone(440, 1.0))
    (folder / "a_lyrics.txt").write_text("la")
    assert [path.relative_to(folder).as_posix() for path in find_audio(folder, "--x")] == [
        "a.wav",
        "b.wav",
        "more/c.wav",
    ]


def test_a_folder_without_audio_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("la")
    with pytest.raises(InputError, match="no audio in this folder: --reference_dir"):
        find_audio(tmp_path, "--reference_dir")
    with pytest.raises(InputError, match="no such folder"):
        find_audio(tmp_path / "gone", "--reference_dir")
