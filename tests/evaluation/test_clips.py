"""The clips that are scored: made by a model, or there already."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch

from acestep_ray.cache.reader import CacheReader
from acestep_ray.evaluation import clips
from acestep_ray.evaluation.clips import Clip, find_clips, generate_clips
from acestep_ray.evaluation.notes import Notes
from acestep_ray.evaluation.scores import NOT_FINITE, ModelScore, Yardsticks, clip_rows, score_clips
from tests.evaluation.conftest import tone


@pytest.fixture
def make(settings, checkpoint, tiny_cache, tmp_path, monkeypatch):
    """Makes clips of two songs with a sampler that gives back its noise, decoded as `decoded` says."""

    def run(decoded, **changes) -> list[Clip]:
        monkeypatch.setattr(clips, "sample", lambda transformer, noise, condition, **_: noise)
        monkeypatch.setattr(clips, "decode", lambda codec, latents, overlapped: decoded(latents))
        reader = CacheReader(tiny_cache)
        songs = [reader.read_key(key) for key in ("alpha", "beta")]
        codec = checkpoint.load_codec()
        return generate_clips(
            None, codec, songs, tmp_path / "clips", settings(**changes), torch.device("cpu")
        )

    return run


def loudest(latents: torch.Tensor) -> np.ndarray:
    """A second of sound that tells noises apart."""
    return np.full((2, 48_000), float(latents.max()) / 10, np.float32)


def test_noise_is_that_of_the_song_and_the_seed(make):
    def sounds(made: list[Clip]) -> list[float]:
        return [soundfile.read(clip.path)[0][0, 0] for clip in made]

    first, again, other = sounds(make(loudest)), sounds(make(loudest)), sounds(make(loudest, seed=1))
    assert first == again
    assert first[0] != first[1]
    assert first[0] != other[0]


def test_clips_are_as_long_as_was_asked_for(make):
    lengths = []
    make(lambda latents: lengths.append(latents.shape[-1]) or loudest(latents), duration=10.0)
    assert lengths == [107, 107]  # 10.77 latent frames a second


def test_sound_that_is_not_finite_is_flagged_and_not_written(make, tmp_path):
    calls = []

    def nan_at_second(latents: torch.Tensor) -> np.ndarray:
        calls.append(latents)
        return loudest(latents) * (np.nan if len(calls) == 2 else 1)

    made = make(nan_at_second)
    assert [clip.path is None for clip in made] == [False, True]
    assert len(list((tmp_path / "clips").iterdir())) == 1
    notes = Notes()
    scores, _ = score_clips(
        "a model", made, Yardsticks({}, {}, {}, {}, {}), notes, lambda clip, wave: clip.path
    )
    assert NOT_FINITE not in scores[0].flags
    assert scores[1].flags == [NOT_FINITE]
    assert notes.lines == ["warning: a model made no sound of beta: it is not finite"]
    model = ModelScore("a model", "base", "base", 1.0, scores)
    assert model.metrics()["sound/flagged"] >= 0.5
    assert clip_rows([model], tmp_path)[1]["loudness_lufs"] is None


def test_a_folder_is_one_model_and_subfolders_are_several(write_songs):
    folder = write_songs("one", b=tone(440, 0.1), a=tone(440, 0.1))
    assert {name: [clip.key for clip in found] for name, found in find_clips(folder).items()} == {
        "one": ["a.wav", "b.wav"]
    }
    write_songs("several/first", a=tone(440, 0.1))
    write_songs("several/second/deep", a=tone(440, 0.1))
    found = find_clips(folder.parent / "several")
    assert {name: [clip.key for clip in clips_] for name, clips_ in found.items()} == {
        "first": ["a.wav"],
        "second": ["deep/a.wav"],
    }
