from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import soundfile
import torch
from safetensors.torch import load_file, save_file

from acestep_ray.cache.encoding import Encoder
from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.precompute import PrecomputeSummary, make_recipe, precompute
from acestep_ray.cache.reader import CacheReader
from acestep_ray.cache.schema import FEATURE_GROUPS
from acestep_ray.cache.songs import Recipe, Reject
from acestep_ray.config import PrecomputeConfig
from acestep_ray.errors import InputError
from acestep_ray.storage import Store
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from tests.cache.conftest import SongFolder, decoded, noise, song
from tests.cache.runs import encode_directly, rows_of
from tests.processes import wait_until

SPEAKER_DIM = 512
GOOD = [f"song{i}" for i in range(6)]
BAD = {
    "corrupt": ("corrupt", b"RIFF\x24\x00\x00\x00WAVEfmt "),
    "empty": ("empty", b""),
    "gone": ("missing", None),
    "silent": ("silent", np.zeros((150_000, 2))),
    "text": ("unsupported", b"once upon a time"),
}


@pytest.fixture
def config(song_folder, checkpoint, tmp_path) -> PrecomputeConfig:
    return PrecomputeConfig(
        dataset_path=str(song_folder.path),
        checkpoint_dir=str(checkpoint.path),
        output_dir=str(tmp_path / "cache"),
        device="cpu",
    )


def fill(folder: SongFolder) -> None:
    folder.path.mkdir(parents=True)
    np.save(folder.path / "voice.npy", np.ones(SPEAKER_DIM, np.float32))
    for i, key in enumerate(GOOD):
        folder.add(key, noise(3.2 + i / 4, seed=i), speaker_emb_path="voice.npy" if i == 0 else "")
    for key, (_, audio) in BAD.items():
        folder.add(key, audio)
    # A WAV file by its content, whatever its name says.
    folder.add("misnamed", noise(3.0), filename="audio/misnamed.mp3")
    folder.add("outside", filename="../outside.wav")
    folder.write()


def test_a_summary_says_how_many_warnings_it_does_not_show():
    counts = {"inputs": 12, "samples": 12, "unchanged": 0, "computed": 12, "num_bytes": 0}
    warnings = [f"song{number}.wav: no prompt" for number in range(12)]
    summary = PrecomputeSummary(
        **counts, rejects=[], ssl_names=[], seconds_of_audio=0.0, wall_seconds=0.0, output_dir="cache",
        warnings=warnings,
    )  # fmt: skip
    assert "song9.wav: no prompt" in summary.render()
    assert "… and 2 more" in summary.render()
    assert "more" not in replace(summary, warnings=warnings[:10]).render()


@pytest.mark.ray
def test_every_song_is_kept_or_rejected_once_over_reruns_and_changes(
    two_cpus, config, song_folder, checkpoint, monkeypatch
):
    monkeypatch.setattr("acestep_ray.cache.commit.PART_ROWS", 3)  # several parts
    torch.set_num_threads(1)  # as many as the encoders have: another number rounds otherwise
    fill(song_folder)
    cache = Path(config.output_dir)

    first = precompute(config)
    samples, rejects = rows_of(cache), rows_of(cache, "rejects")
    assert sorted(samples) == sorted([*GOOD, "misnamed"])
    assert {key: row["reason"] for key, row in rejects.items()} == {
        "outside": "bad_path",
        **{key: reason for key, (reason, _) in BAD.items()},
    }
    assert (first.inputs, first.samples, len(first.rejects)) == (13, 7, 6)
    assert (first.computed, first.unchanged) == (7, 0)
    assert not (cache / ".incoming").exists()
    for key in ("song0", "song5"):
        assert samples[key] == encode_directly(config, checkpoint, song_folder.rows[key])

    reader = CacheReader(cache)
    assert list(reader.index.keys) == sorted(samples)
    assert reader.index.ssl_dims == {"mert": 32, "m-hubert": 24}
    assert reader.read(reader.index.position("song0")).speaker.tolist() == [1.0] * SPEAKER_DIM

    files = {file.relative_to(cache): file.read_bytes() for file in cache.rglob("*.*")}
    second = precompute(config)
    assert (second.unchanged, second.computed, second.rejects) == (7, 0, first.rejects)
    assert {file.relative_to(cache): file.read_bytes() for file in cache.rglob("*.*")} == files

    for part in cache.glob("samples/*.parquet"):
        lost = set(pq.read_table(part)["key"].to_pylist())
        if "misnamed" in lost:
            part.unlink()
            break
    changed, replaced, removed = [key for key in GOOD if key not in lost][:3]
    song_folder.rows[changed]["norm_lyrics"] = "[verse]\nsomething else"
    song_folder.add(replaced, noise(3.1, seed=99))
    del song_folder.rows[removed]
    song_folder.add("gone", noise(3.0))
    song_folder.write()
    third = precompute(config)
    after = rows_of(cache)
    assert set(after) == {*samples, "gone"} - {removed}
    assert third.computed == len(lost | {changed, replaced, "gone"})
    assert third.unchanged == len(after) - third.computed
    assert third.inputs == third.computed + third.unchanged + len(third.rejects)
    # The version of a song's file is no part of its features.
    differing = {
        key
        for key in after
        if {**after[key], "audio_version": ""} != {**samples.get(key, {}), "audio_version": ""}
    }
    assert differing == {changed, replaced, "gone"}
    assert "gone" not in rows_of(cache, "rejects")


@pytest.mark.ray
@pytest.mark.faults
def test_windows_and_separate_encoders_and_rejects_that_are_tried_again(
    two_cpus, config, song_folder, checkpoint
):
    torch.set_num_threads(1)
    song_folder.add("long", noise(11.0))
    song_folder.add("pause", np.concatenate([noise(4.0), np.zeros((192_000, 2)), noise(4.0)]))
    song_folder.add("short", noise(1.0))
    song_folder.add("empty", b"")
    song_folder.write()
    config = replace(config, window="all", window_seconds=4.0, separate_encoders=True, features="ssl,latents")
    first = precompute(config)
    samples = rows_of(config.output_dir)
    assert sorted(samples) == ["long#0", "long#1", "long#2", "pause#0", "pause#2", "short#0"]
    assert {row["duration_seconds"] for row in samples.values()} == {4.0, 3.0, 1.0}
    rejects = rows_of(config.output_dir, "rejects")
    assert {key: row["reason"] for key, row in rejects.items()} == {"empty#0": "empty", "pause#1": "silent"}
    assert (first.inputs, first.samples, first.unchanged) == (8, 6, 0)
    assert all(row["prompts"] is None and row["text_embeddings"] is None for row in samples.values())
    assert [entry["name"] for entry in samples["long#1"]["ssl"]] == ["mert", "m-hubert"]
    with pytest.raises(InputError, match="text"):
        CacheReader(config.output_dir)

    tried = precompute(replace(config, retry_rejects=True, separate_encoders=False))
    # A song with a window that was rejected is done again as a whole, and gives the same from one pool of encoders.
    assert (tried.computed, tried.unchanged, len(tried.rejects)) == (2, 4, 2)
    assert rows_of(config.output_dir) == samples


@pytest.mark.ray
@pytest.mark.faults
def test_songs_with_unknown_lyrics_come_and_go_with_the_flag(two_cpus, config, song_folder):
    torch.set_num_threads(1)
    song_folder.add("plain", noise(3.0), norm_lyrics="[00:01.00]hello\n[00:02.00]world")
    song_folder.add("thai", noise(3.0, seed=1), norm_lyrics="[verse]\nคืนนี้ฝนตกหนัก")
    song_folder.write()
    keeping = replace(config, keep_unknown_lyrics=True)
    kept = precompute(keeping)
    rows = rows_of(config.output_dir)
    assert sorted(rows) == ["plain", "thai"]
    assert kept.warnings == [
        "lyrics of 1 song (plain): times of 2 lines removed",
        "lyrics of 1 song have tokens that are unknown to the model (Thai): thai 100 %",
    ]
    without = precompute(config)
    assert (without.unchanged, without.computed, [reject.reason for reject in without.rejects]) == (
        1, 0, ["bad_lyrics"],
    )  # fmt: skip
    assert "100 %" in without.rejects[0].message
    assert precompute(config).rejects == without.rejects
    again = precompute(keeping)
    assert (again.unchanged, again.computed, again.rejects) == (1, 1, [])
    assert rows_of(config.output_dir) == rows


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_folder_of_songs_in_object_storage_becomes_a_cache_there(
    two_cpus, s3, gcs, config, checkpoint, kind
):
    torch.set_num_threads(1)
    url = s3.url if kind == "s3" else gcs
    songs, cache = Store.at(url("songs")), Store.at(url("cache"))
    for key in ("a", "b"):
        content = io.BytesIO()
        soundfile.write(content, noise(3.5, seed=ord(key)), 44_100, format="FLAC")
        songs.write_bytes(f"{key}.flac", content.getvalue())
        songs.write_bytes(f"{key}_prompt.txt", b"calm, piano")
    songs.write_bytes("b_lyrics.txt", b"\xff\xfe\x00")
    config = replace(config, dataset_path=songs.url, output_dir=cache.url)
    first = precompute(config)
    assert (first.computed, [(r.key, r.reason) for r in first.rejects]) == (1, [("b", "bad_text")])
    reader = CacheReader(cache.url)
    assert list(reader.index.keys) == ["a"]
    assert reader.read(0).prompts[0] in ("calm, piano", "piano, calm")
    assert not [name for name in cache.names() if name.startswith(".incoming")]
    again = precompute(config)
    assert (again.computed, again.unchanged, len(again.rejects)) == (0, 1, 1)


@pytest.mark.ray
def test_a_run_that_fails_leaves_no_encoders_to_the_next(two_cpus, config, song_folder, tmp_path):
    """In the same driver, which may keep the error, as a notebook does: it would wait for the GPU that they hold."""
    for i in range(3):
        song_folder.add(f"song{i}", noise(3.0, seed=i))
    song_folder.write()
    broken = write_tiny_checkpoint(tmp_path / "broken")
    (weights,) = broken.path.glob("music_dcae*/*.safetensors")
    tensors = load_file(weights)
    tensors.pop("encoder.conv_in.weight")
    save_file(tensors, weights)
    everything = ray.cluster_resources()["CPU"]
    with pytest.raises(InputError, match="conv_in") as kept:
        precompute(replace(config, checkpoint_dir=str(broken.path), features="latents"))
    wait_until(lambda: ray.available_resources().get("CPU") == everything, lambda: False, 20)
    del kept


@pytest.mark.ray
def test_without_a_usable_song_the_job_fails_and_says_why(two_cpus, config, song_folder):
    song_folder.add("empty", b"")
    song_folder.add("gone")
    song_folder.write()
    with pytest.raises(
        InputError, match=r"none of the 2 songs can be used(?s:.*)audio/empty\.wav: .* is empty"
    ):
        precompute(config)
    assert set(rows_of(config.output_dir, "rejects")) == {"empty", "gone"}
    with pytest.raises(InputError, match="holds no songs"):
        CacheIndex.open(config.output_dir)


@pytest.mark.ray
def test_a_cluster_without_gpus_refuses_cuda(two_cpus, config, song_folder):
    song_folder.add("a", noise(3.0))
    song_folder.write()
    with pytest.raises(InputError, match="no GPU"):
        precompute(replace(config, device="cuda"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tag_shuffles", 0),
        ("ssl_frame_stride", 0),
        ("window", "last"),
        ("window_seconds", 2.9),
        ("window_seconds", 240.5),
        ("window_seconds", float("nan")),
        ("loudness_lufs", 3.0),
        ("loudness_lufs", float("nan")),
        ("batch_frames", 0),
        ("encoder_workers", 0),
        ("decode_workers", 0),
        ("text_workers", 0),
        ("codec_gpus", 1.5),
        ("precision", "8"),
        ("device", "tpu"),
    ],
)
def test_a_setting_out_of_bounds_is_refused_by_its_flag(config, name, value):
    with pytest.raises(InputError, match=f"--{name} is {value}"):
        precompute(replace(config, **{name: value}))


def test_unknown_features_are_refused_by_name(config):
    with pytest.raises(InputError, match=r"--features has 'midi'(?s:.*)latents, text, ssl"):
        precompute(replace(config, features="latents,midi"))


def test_a_mistake_in_the_input_is_found_before_anything_is_written(
    config, song_folder, checkpoint, tmp_path
):
    with pytest.raises(InputError, match="dataset does not exist"):
        precompute(config)
    song_folder.add("a", noise(3.0))
    song_folder.write()
    with pytest.raises(InputError, match="no such checkpoint directory"):
        precompute(replace(config, checkpoint_dir=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="no feature cache"):
        precompute(replace(config, output_dir=str(song_folder.path)))
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("part", ["codec", "text_encoder", "mert", "m-hubert", "lyric_tokenizer"])
def test_every_model_that_takes_part_is_in_the_recipe(config, checkpoint, part):
    models = make_recipe(config, checkpoint, FEATURE_GROUPS, "cpu").models
    assert len(set(models.values())) == 5
    assert re.fullmatch("[0-9a-f]{64}", models[part])


@pytest.mark.parametrize(
    ("features", "models"),
    [
        (("latents",), {"codec"}),
        (("text",), {"text_encoder", "lyric_tokenizer"}),
        (("ssl",), {"mert", "m-hubert"}),
    ],
)
def test_models_that_take_no_part_are_not_in_the_recipe(config, checkpoint, features, models):
    assert set(make_recipe(config, checkpoint, features, "cpu").models) == models


@pytest.mark.parametrize(
    "change",
    [
        {"window": "all"},
        {"window_seconds": 7.0},
        {"loudness_lufs": -14.0},
        {"tag_shuffles": 7},
        {"ssl_frame_stride": 7},
        {"seed": 7},
        {"precision": "16"},
    ],
)
def test_every_setting_that_matters_is_in_the_recipe(config, checkpoint, change):
    before = make_recipe(config, checkpoint, FEATURE_GROUPS, "cpu")
    after = make_recipe(replace(config, **change), checkpoint, FEATURE_GROUPS, "cpu")
    assert isinstance(before, Recipe)
    assert before != after


def test_a_gpu_encodes_in_half_precision_unless_told_otherwise(config, checkpoint):
    def precision(device: str, **changes: str) -> str:
        return make_recipe(replace(config, **changes), checkpoint, FEATURE_GROUPS, device).settings.precision

    assert (precision("cuda"), precision("cpu")) == ("16", "32")
    assert precision("cuda", precision="32") == "32"


def test_the_encoders_have_the_precision_of_the_recipe(config, checkpoint):
    def encoded(precision: str) -> dict[str, np.ndarray]:
        recipe = make_recipe(replace(config, precision=precision), checkpoint, FEATURE_GROUPS, "cpu")
        (columns,) = Encoder.load(checkpoint, recipe, "cpu").encode([decoded(song())])
        return {
            "latents": np.frombuffer(columns["latents"], np.float16).astype(np.float64),
            "text": np.frombuffer(columns["text_embeddings"][0], np.float16).astype(np.float64),
            **{one["name"]: np.frombuffer(one["directions"], np.int8) * 1.0 for one in columns["ssl"]},
        }

    exact, half = encoded("32"), encoded("16")
    for name, values in exact.items():
        assert 0 < np.abs(half[name] - values).max() <= 0.1 * np.abs(values).max(), name


def test_the_summary_counts_rejects_by_reason_and_tells_when_there_are_no_ssl_features():
    rejects = [Reject(f"k{i}", f"{i}.wav", "decode", "empty", "0 bytes") for i in range(12)]
    summary = PrecomputeSummary(20, 8, 5, 3, rejects, [], 3660.0, 1_500_000, 2.0, "cache")
    text = summary.render()
    assert "20 = 3 samples + 12 rejects + 5 unchanged" in text
    assert "8, 1 h 01 min of audio, 1.5 MB" in text
    assert re.search(r"empty +12", text)
    assert text.count("0 bytes") == 10
    assert "--ssl_coeff 0" in text
    assert "--ssl_coeff 0" not in replace(summary, ssl_names=["mert"]).render()
