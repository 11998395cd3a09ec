"""Training on songs as they are gives what training on their cache gives."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from acestep_ray.cache.decoding import decode_song, file_versions
from acestep_ray.cache.encoding import Encoder
from acestep_ray.cache.parts import store_rows
from acestep_ray.cache.precompute import check_settings, make_recipe
from acestep_ray.cache.reader import CacheReader
from acestep_ray.cache.songs import DecodedSong, Recipe, Reject, Settings, Song, build_row
from acestep_ray.cache.stored import claim_output_dir
from acestep_ray.config import PrecomputeConfig, TrainConfig
from acestep_ray.data.lyrics import LyricTokenizer, LyricTokens
from acestep_ray.data.schema import RejectReason
from acestep_ray.data.songs import SongTable
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.storage import Store
from acestep_ray.training import scan as scan_module
from acestep_ray.training import streaming
from acestep_ray.training.job import train
from acestep_ray.training.lora_config import DEFAULT_LORA, read_lora_config
from acestep_ray.training.sampler import MicroBatch
from acestep_ray.training.scan import SCAN_SCHEMA, read_songs, scan, scan_songs
from acestep_ray.training.songs import open_songs, scan_for_stream
from acestep_ray.training.state import WEIGHTS_FILE, Checkpoints
from acestep_ray.training.streaming import CacheSource, SongLostError, StreamSource
from acestep_ray.training.worker import build_plan
from tests.cache.rows import finish
from tests.training.conftest import (
    Killed,
    assert_close_weights,
    assert_same_weights,
    kill_at,
    latest_weights,
    places_in,
    settings_in,
    short_run,
    train_alone,
)

SECONDS = {"delta": 3.2, "alpha": 4.0, "gamma": 3.0, "beta": 5.5}
BROKEN = {"broken": "unsupported", "wordless": "bad_lyrics"}


def write_songs(directory: Path, seconds: dict[str, float] = SECONDS) -> Path:
    """A dataset of short songs, and two that cannot be used."""
    directory.mkdir(parents=True)
    rows = []
    for number, (key, length) in enumerate({**seconds, "broken": 0, "wordless": 3.0}.items()):
        if key == "broken":
            (directory / f"{key}.wav").write_text("no audio at all")
        else:
            noise = np.random.default_rng(number).uniform(-0.5, 0.5, (int(length * 44_100), 2))
            soundfile.write(directory / f"{key}.wav", noise, 44_100)
        rows.append(
            {
                "keys": key,
                "filename": f"{key}.wav",
                "tags": ["calm", "slow", key],
                "norm_lyrics": "" if key == "gamma" else f"[verse]\nhello {key}\nla la",
                "speaker_emb_path": "",
                "recaption": {"simplified": f"the song {key}"},
                "language": "klingon" if key == "wordless" else "",
            }
        )
    np.save(directory / "voice.npy", np.linspace(-1, 1, 512, dtype=np.float32))
    rows[0]["speaker_emb_path"] = "voice.npy"
    datasets.Dataset.from_list(rows).save_to_disk(directory)
    return directory


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    return write_songs(tmp_path_factory.mktemp("songs") / "dataset")


@pytest.fixture(scope="module")
def config(songs, checkpoint, tmp_path_factory) -> TrainConfig:
    directory = tmp_path_factory.mktemp("runs")
    return short_run(
        checkpoint,
        songs,
        **places_in(directory),
        tracking_uri="none",
        max_steps=6,
        batch_size=2,
        every_n_train_steps=3,
    )


@pytest.fixture(scope="module")
def cache(config, checkpoint, tmp_path_factory) -> str:
    """The cache of the songs, with the settings that `precompute` has by itself, made without Ray."""
    directory = Store.at(tmp_path_factory.mktemp("cache") / "cache")
    defaults = PrecomputeConfig(config.dataset_path, config.checkpoint_dir, directory.url)
    recipe = make_recipe(defaults, checkpoint, check_settings(defaults), device="cpu")
    encoder = Encoder.load(checkpoint, recipe, "cpu")
    table = SongTable.open(config.dataset_path)
    claim_output_dir(directory)
    for row in table:
        song = Song.from_row(row)
        (decoded,) = decode_song(table.root, song, recipe, file_versions(table.root, song))
        if isinstance(decoded, DecodedSong):
            (columns,) = encoder.encode([decoded])
            if not isinstance(columns, Reject):
                store_rows(directory, [build_row(decoded, columns, recipe)])
    finish(directory, settings=asdict(recipe.settings))
    return directory.url


@pytest.fixture(scope="module")
def stream(two_cpus, config, checkpoint, tmp_path_factory) -> streaming.Stream:
    folder = Store.at(tmp_path_factory.mktemp("scan"))
    return scan_for_stream(SongTable.open(config.dataset_path), checkpoint, config, folder, use_gpu=False)


# --- the scan ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scan_recipe(checkpoint):
    tokenizer = LyricTokenizer.from_file(checkpoint.lyric_vocab_path())
    dim = checkpoint.transformer_config.speaker_embedding_dim
    return Recipe(Settings(tag_shuffles=4, ssl_frame_stride=4, seed=0, speaker_dim=dim), {}), tokenizer


def scan_again(place: Path, before: pa.Table | None, recipe, tokenizer) -> tuple[pa.Table, int]:
    table = SongTable.open(place)
    some = [Song.from_row(row) for row in table]
    if before is None:
        before = SCAN_SCHEMA.empty_table().take(pa.array([None] * len(some), pa.int64()))
    return scan_songs(table.root, some, before, recipe, tokenizer)


def test_a_scan_finds_lengths_and_reasons_and_looks_only_at_what_has_changed(scan_recipe, tmp_path):
    place = write_songs(tmp_path / "dataset", {"alpha": 4.0, "beta": 3.0})
    first, scanned = scan_again(place, None, *scan_recipe)
    found = {row["key"]: row for row in first.to_pylist()}
    assert scanned == len(found) == 4
    assert {key: row["samples"] for key, row in found.items() if row["samples"]} == {
        "alpha": 4 * 48_000,
        "beta": 3 * 48_000,
    }
    assert {key: row["reason"] for key, row in found.items() if row["reason"]} == BROKEN

    again, scanned = scan_again(place, first, *scan_recipe)
    assert scanned == 0
    assert again == first

    soundfile.write(place / "broken.wav", np.full((5 * 48_000, 2), 0.3), 48_000)
    third, scanned = scan_again(place, first, *scan_recipe)
    assert scanned == 1
    assert third.to_pylist()[2]["samples"] == 5 * 48_000

    other = replace(scan_recipe[0], settings=replace(scan_recipe[0].settings, window_seconds=3.0))
    fourth, scanned = scan_again(place, third, other, scan_recipe[1])
    assert scanned == 4
    assert fourth.to_pylist()[0]["samples"] == 3 * 48_000


def test_a_song_whose_storage_failed_is_scanned_in_every_run(scan_recipe, songs):
    first, _ = scan_again(songs, None, *scan_recipe)
    rows = first.to_pylist()
    rows[0].update(samples=None, stage="decode", reason=RejectReason.UNREADABLE.value, message="no answer")
    again, scanned = scan_again(songs, pa.Table.from_pylist(rows, schema=SCAN_SCHEMA), *scan_recipe)
    assert scanned == 1
    assert again == first


def test_a_scan_measures_a_song_by_its_content_and_tells_of_its_header(scan_recipe, tmp_path):
    place = write_songs(tmp_path / "dataset", {"alpha": 4.0, "beta": 3.0})
    content = bytearray((place / "alpha.wav").read_bytes())
    data = content.index(b"data") + 4
    content[data : data + 4] = bytes(4)  # as of a recorder that lost power
    (place / "alpha.wav").write_bytes(content)
    beta = (place / "beta.wav").read_bytes()
    (place / "beta.wav").write_bytes(beta[: int(0.9 * len(beta))])
    recipe, tokenizer = scan_recipe
    strict, _ = scan_again(place, None, recipe, tokenizer)
    found = {row["key"]: row for row in strict.to_pylist()}
    assert found["alpha"]["samples"] == 4 * 48_000
    assert found["alpha"]["warning"] == "its header counts 0 bytes of samples, 705,600 are there"
    assert found["beta"]["reason"] == "corrupt"
    loose, scanned = scan_again(place, strict, replace(recipe, min_decoded=0.8), tokenizer)
    assert scanned == 4
    found = {row["key"]: row for row in loose.to_pylist()}
    assert "promises 3.0 s" in found["beta"]["warning"]


# --- what is given to train --------------------------------------------------------------------------------


def test_a_cache_is_read_and_anything_with_songs_is_streamed(config, checkpoint, tiny_cache, songs, tmp_path):
    cached = open_songs(replace(config, dataset_path=str(tiny_cache)), checkpoint)
    assert list(cached.keys) == ["alpha", "beta", "gamma"]
    assert set(open_songs(config, checkpoint).keys) == {*SECONDS, *BROKEN}
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "one.wav").symlink_to(songs / "alpha.wav")
    (folder / "two.csv").write_text("filename\none.wav\n", encoding="utf-8")
    assert open_songs(replace(config, dataset_path=str(folder)), checkpoint).keys == ["one"]
    assert len(open_songs(replace(config, dataset_path=str(folder / "two.csv")), checkpoint)) == 1
    (folder / ".incoming").mkdir()
    (folder / ".incoming" / "part").touch()
    with pytest.raises(InputError, match="not complete"):
        open_songs(replace(config, dataset_path=str(folder)), checkpoint)


def test_songs_need_the_ssl_encoders_that_their_losses_need(config, checkpoint):
    without = replace(checkpoint, ssl_names=("m-hubert",))
    with pytest.raises(InputError, match=r"(?s)features of mert,.*--ssl_coeff 0"):
        open_songs(config, without)
    open_songs(replace(config, ssl_coeff=0.0), without)


@pytest.mark.ray
def test_songs_of_which_none_can_be_used_are_refused_with_their_reasons(two_cpus, config, tmp_path):
    place = write_songs(tmp_path / "dataset", {})
    with pytest.raises(InputError, match=r"(?s)none of the 2 songs.*broken\.wav.*klingon"):
        train(replace(config, dataset_path=str(place), exp_dir=str(tmp_path / "exps")))


# --- the numbers -------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_song_of_the_stream_is_the_song_of_the_cache(cache, stream):
    source, reader = StreamSource(stream, torch.device("cpu")), CacheReader(cache)
    assert source.songs["key"].to_pylist() == list(reader.index.keys) == sorted(SECONDS)
    assert np.array_equal(source.latent_frames, reader.index.latent_frames)
    assert source.latent_frames.dtype == reader.index.latent_frames.dtype
    assert source.ssl_stride == reader.index.ssl_frame_stride
    for i in range(len(SECONDS)):
        assert_same(vars(source.read(i)), vars(reader.read(i)))


def assert_same(found, expected) -> None:
    """Exact equality of nested dicts, lists, tensors and plain values."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected


@pytest.mark.ray
def test_every_worker_gets_its_micro_batches_in_the_plans_order_from_any_step(
    two_cpus, cache, stream, config, monkeypatch
):
    """Also over several pipelines, and where a pipeline's share of the object store holds no whole song."""
    monkeypatch.setattr(streaming, "_SONGS_PER_PIPELINE", 5)
    monkeypatch.setattr(streaming, "_WAVES_PER_PIPELINE", 0)
    monkeypatch.setattr(streaming, "_STORE_SHARE", 1e-9)
    source = StreamSource(stream, torch.device("cpu"), workers=2)
    expected = CacheSource(CacheReader(cache).index)
    plan = build_plan(source.latent_frames, replace(config, devices=2))
    for rank, first_step in ((0, 0), (1, 2)):
        items = [item for step in range(first_step, 5) for item in plan.step(step)[rank::2]]
        seen = [
            list(one.read_ahead(iter(items), lambda item, songs: (item, songs), threads=1))
            for one in (source, expected)
        ]
        assert [item for item, _ in seen[0]] == items
        for (_, found), (_, wanted) in zip(*seen, strict=True):
            assert_same([vars(song) for song in found], [vars(song) for song in wanted])


@pytest.mark.ray
def test_several_songs_are_decoded_at_a_time_and_a_slow_one_keeps_its_place(
    two_cpus, stream, monkeypatch, tmp_path
):
    def slow(songs, root, recipe):
        key = songs["key"][0].as_py()
        (tmp_path / key).touch()
        deadline = time.monotonic() + 60
        # The first song waits until another one has begun, which takes a second process.
        while key == "alpha" and not (tmp_path / "beta").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return pa.table({"key": [key], "waited": [time.monotonic() < deadline]})

    monkeypatch.setattr(streaming, "decode_songs", slow)
    rows = [0, 1, 2, 3, 0, 1, 2, 3]
    decoded = pa.concat_tables(StreamSource(stream, torch.device("cpu"))._start_pipeline(rows)).to_pylist()
    assert [song["key"] for song in decoded] == [sorted(SECONDS)[row] for row in rows]
    assert all(song["waited"] for song in decoded)


@pytest.mark.ray
def test_a_streamed_run_is_the_cached_run_also_when_it_is_killed_and_goes_on(cache, stream, config, tmp_path):
    # With dropout, whose random numbers are a state that has to come back too.
    lora = {**DEFAULT_LORA, "r": 4, "lora_alpha": 8, "lora_dropout": 0.2}
    cached = settings_in(tmp_path / "cached", replace(config, dataset_path=cache), lora=lora)
    expected = train_alone(cached)
    streamed = settings_in(tmp_path / "streamed", config, lora=lora, stream=stream)
    with pytest.raises(Killed):
        train_alone(streamed, kill_at(3))
    assert Checkpoints(streamed.checkpoints).steps() == [3]
    assert train_alone(streamed) == expected
    assert_same_weights(streamed, cached)


@pytest.mark.ray
@pytest.mark.faults
def test_two_workers_on_two_cpus_stream_what_one_trains_on(cache, config, tmp_path, capfd):
    streamed = train(replace(config, exp_name="streamed", devices=2))
    said = capfd.readouterr().out
    assert "acestep-ray precompute" in said
    assert "6 = 4 songs + 2 rejects" in said
    assert "klingon" in said

    one = replace(config, dataset_path=cache, accumulate_grad_batches=2)
    settings = settings_in(tmp_path, one, lora=read_lora_config(config.lora_config_path))
    alone = train_alone(settings)
    assert streamed.steps == 6
    assert streamed.first_loss == pytest.approx(alone["first"], rel=1e-5)
    assert streamed.last_loss == pytest.approx(alone["last"], rel=1e-5)
    assert_close_weights(load_file(streamed.result.parent / WEIGHTS_FILE), latest_weights(settings))


@pytest.mark.ray
def test_a_song_that_is_lost_while_a_run_is_under_way_ends_it_by_name(two_cpus, config, checkpoint, tmp_path):
    place = write_songs(tmp_path / "dataset", {"alpha": 3.0, "beta": 4.0})
    folder = Store.at(tmp_path / "scan")
    stream = scan_for_stream(SongTable.open(place), checkpoint, config, folder, use_gpu=False)
    source = StreamSource(stream, torch.device("cpu"))
    soundfile.write(place / "alpha.wav", np.random.default_rng(0).uniform(-1, 1, (48_000 * 4, 2)), 48_000)
    (place / "beta.wav").unlink()
    for row, message in ((0, r"'alpha' has 43 latent frames, it had 32"), (1, r"'beta'.*\(missing\)")):
        with pytest.raises(SongLostError, match=message):
            list(source.read_ahead([MicroBatch(0, (row,))], lambda item, songs: songs, threads=1))


@pytest.mark.ray
def test_a_scan_goes_on_where_it_stopped_and_a_song_that_ends_its_process_costs_itself(
    two_cpus, songs, scan_recipe, tmp_path, monkeypatch
):
    class Fragile:
        """A tokenizer that ends its process, or fails, at one song each."""

        def __init__(self, deadly: str = "-", faulty: str = "-"):
            self.deadly, self.faulty = f"hello {deadly}", f"hello {faulty}"

        def encode(self, text: str, language: str | None) -> LyricTokens:
            if self.deadly in text:
                os._exit(1)
            if self.faulty in text:
                raise MemoryError
            return LyricTokens([1], [])

        def may_lack_tokens(self, text: str, language: str | None) -> bool:
            return self.deadly in text

    recipe, _ = scan_recipe
    folder, table = Store.at(tmp_path), SongTable.open(songs)
    # All songs in one task, then one at a time.
    monkeypatch.setattr(scan_module, "_TASKS_PER_CPU", 0.5)
    monkeypatch.setattr(scan_module, "_RETRIES", 0)
    first = scan(table, recipe, Fragile(deadly="beta"), folder)
    assert {reject.key: reject.reason for reject in first.rejects} == {
        "beta": "corrupt",
        "broken": "unsupported",
    }
    assert "ended its process" in first.rejects[0].message
    assert read_songs(folder)["key"].to_pylist() == ["alpha", "delta", "gamma", "wordless"]

    for key in ("alpha", "delta"):
        (songs / f"{key}.wav").touch()
    monkeypatch.setattr(scan_module, "_SONGS_PER_TASK", 1)
    with pytest.raises(AceStepError, match=r"(?s)scan .* stopped: .*MemoryError.*'alpha'"):
        scan(table, recipe, Fragile(faulty="alpha"), folder)  # delta came before it
    second = scan(table, recipe, Fragile(), folder)
    assert second.scanned == 1
    assert second.songs == 4
    assert second.inputs == 6
