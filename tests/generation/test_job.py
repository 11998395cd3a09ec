from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from acestep_ray import cli
from acestep_ray.errors import InputError
from acestep_ray.generation.job import generate


def read(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int16")[0].astype(int)


def test_a_song_and_its_picture_are_written(config, tmp_path):
    summary = generate(replace(config, output_path=str(tmp_path / "new/a.b.flac")))
    (made,) = summary.songs
    assert made.audio.path == tmp_path / "new/a.b.flac"
    assert made.picture.read_bytes().startswith(b"\x89PNG")
    assert made.picture.name == "a.b.png"
    assert soundfile.info(made.audio.path).duration == made.seconds == pytest.approx(2.0, abs=0.1)
    assert str(made.audio) in summary.render()
    assert sorted(path.name for path in made.audio.path.parent.iterdir()) == ["a.b.flac", "a.b.png"]


def test_a_song_is_written_to_object_storage(config, s3):
    (made,) = generate(replace(config, output_path=s3.url("songs/one.mp3"))).songs
    assert made.audio.url == s3.url("songs/one.mp3")
    assert soundfile.info(io.BytesIO(made.audio.read_bytes())).format == "MP3"
    assert made.picture.read_bytes().startswith(b"\x89PNG")


def test_a_seed_gives_the_same_song_alone_in_a_list_and_in_a_batch(config, tmp_path):
    listed = generate(replace(config, seed="1,2,3", batch_size=2)).songs
    assert [made.audio.name for made in listed] == ["song-seed1.wav", "song-seed2.wav", "song-seed3.wav"]
    alone = generate(replace(config, seed=2)).songs[0].audio.path
    assert alone.name == "song.wav"
    first = read(alone)
    assert np.abs(first - read(listed[1].audio.path)).max() <= 1
    assert np.abs(first - read(listed[0].audio.path)).max() > 100
    generate(replace(config, seed=[2]))
    assert np.array_equal(first, read(alone))


MISTAKES = [
    ({"output_path": None}, "--output_path"),
    ({"output_path": "song.xyz"}, r"cannot write `\.xyz`"),
    ({"output_path": "song"}, "no suffix"),
    ({"output_path": "/proc/nowhere/song.wav"}, "cannot write here"),
    ({"output_path": f"{'n' * 252}.wav"}, "the name is too long"),
    ({"output_path": f"{'n' * 250}.wav", "seed": "10,11"}, "the file's name is too long"),
    ({"batch_size": 0}, "--batch_size 0"),
    ({"output_dir": "folder"}, "goes with --batch_path only: --output_dir folder"),
    ({"format": "mp3"}, "goes with --batch_path only: --format mp3"),
    ({"workers": 2}, "goes with --batch_path only: --workers 2"),
    ({"batch_path": "songs.jsonl"}, "give --output_dir"),
    ({"batch_path": "songs.jsonl", "output_path": None}, "no folder for the songs"),
    ({"batch_path": "songs.jsonl", "output_path": None, "output_dir": "o", "format": "aac"}, "--format aac"),
    ({"batch_path": "songs.jsonl", "output_path": None, "output_dir": "o", "workers": 0}, "--workers 0"),
]


@pytest.mark.parametrize(("flags", "told"), MISTAKES)
def test_flags_that_do_not_go_together_are_refused(config, flags, told):
    with pytest.raises(InputError, match=told):
        generate(replace(config, **flags))


def test_seeds_and_weights_come_from_flags_and_from_settings_files(monkeypatch, tmp_path):
    class Summary:
        def render(self):
            return "done"

    seen = []
    monkeypatch.setattr(cli, "load", lambda target: lambda config: seen.append(config) or Summary())
    (tmp_path / "music.yaml").write_text("seed: [4, 5]\nlora_weight: 0.5\noverlapped_decode: true\n")
    generate = ["generate", "--checkpoint_dir", "c", "--output_path", "o.wav"]
    assert cli.main([*generate, "--seed", "1,2,3", "--lora_weight", "1,0.5"]) == 0
    assert cli.main([*generate, "--seed", "7", "--overlapped_decode"]) == 0
    assert cli.main([*generate, "--config", str(tmp_path / "music.yaml")]) == 0
    assert [config.seed for config in seen] == ["1,2,3", 7, [4, 5]]
    assert [config.lora_weight for config in seen] == ["1,0.5", None, 0.5]
    assert [config.overlapped_decode for config in seen] == [None, True, True]
