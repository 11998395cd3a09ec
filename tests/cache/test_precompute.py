from __future__ import annotations

import io
import logging
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.exceptions import RayTaskError, WorkerCrashedError

from acestep_ray.cache import parts as parts_module
from acestep_ray.cache import precompute as precompute_module
from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.precompute import PrecomputeSummary, precompute
from acestep_ray.cache.progress import Progress
from acestep_ray.cache.reader import CacheReader
from acestep_ray.cache.stages import Encoder, Recipe, Reject, Settings, Song, decode_song
from acestep_ray.config import PrecomputeConfig
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from tests.cache.conftest import SongFolder, noise

SPEAKER_DIM = 512
GOOD = [f"song{i}" for i in range(6)]
BAD = {
    "corrupt": ("corrupt", b"RIFF\x24\x00\x00\x00WAVEfmt "),
    "empty": ("empty", b""),
    "gone": ("missing", None),
    "silent": ("silent", np.zeros((150_000, 2))),
    "text": ("unsupported", b"once upon a time"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> CheckpointDir:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


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


def rows_of(cache: str | Path, folder: str = "samples") -> dict[str, dict]:
    rows = pq.read_table(Path(cache) / folder).to_pylist()
    by_key = {row["key"]: row for row in rows}
    assert len(by_key) == len(rows)
    return by_key


def encode_directly(config: PrecomputeConfig, checkpoint: CheckpointDir, row: dict) -> dict:
    """The row that the stages make of a song in this process."""
    settings = Settings(
        config.max_duration, config.tag_shuffles, config.ssl_frame_stride, config.seed, SPEAKER_DIM
    )
    recipe = precompute_module._recipe(config, checkpoint)
    assert recipe.settings == settings
    encoder = Encoder.load(checkpoint, recipe, "cpu")
    return encoder.encode_song(decode_song(config.dataset_path, Song.from_row(row), settings)).to_pylist()[0]


def run_until_stored(config: PrecomputeConfig, address: str) -> None:
    """Run the job in a process of its own, and kill that when the first song is stored."""
    settings = {
        name: getattr(config, name) for name in ("dataset_path", "checkpoint_dir", "output_dir", "device")
    }
    code = (
        "from acestep_ray.cache.precompute import precompute\n"
        "from acestep_ray.config import PrecomputeConfig\n"
        f"precompute(PrecomputeConfig(**{settings!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "RAY_ADDRESS": address})
    try:
        while not list(Path(config.output_dir).glob(".incoming/*/*.parquet")):
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.ray
def test_every_song_is_kept_or_rejected_once_over_kills_reruns_and_changes(
    two_cpus, config, song_folder, checkpoint, monkeypatch
):
    monkeypatch.setattr(parts_module, "_SONGS_BETWEEN_CUTS", 2)  # several parts
    torch.set_num_threads(1)  # as many as the encoders have: another number rounds otherwise
    fill(song_folder)
    cache = Path(config.output_dir)

    run_until_stored(config, two_cpus)
    with pytest.raises(InputError, match="not complete"):
        CacheIndex.open(cache)

    first = precompute(config)
    samples, rejects = rows_of(cache), rows_of(cache, "rejects")
    assert sorted(samples) == sorted([*GOOD, "misnamed"])
    assert {key: row["reason"] for key, row in rejects.items()} == {
        "outside": "bad_path",
        **{key: reason for key, (reason, _) in BAD.items()},
    }
    assert (first.inputs, first.samples, len(first.rejects)) == (13, 7, 6)
    assert first.unchanged >= 1  # what the killed run had stored
    assert first.computed == 7 - first.unchanged >= 1
    assert not (cache / ".incoming").exists()
    for key in ("song0", "song5"):
        assert samples[key] == encode_directly(config, checkpoint, song_folder.rows[key])

    reader = CacheReader(cache)
    assert reader.index.keys == sorted(samples)
    assert reader.index.ssl_dims == {"mert": 32, "m-hubert": 24}
    assert reader.read(reader.index.keys.index("song0")).speaker.tolist() == [1.0] * SPEAKER_DIM

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
    differing = {key for key in after if after[key] != samples.get(key)}
    assert differing == {changed, replaced, "gone"}
    assert "gone" not in rows_of(cache, "rejects")


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
        ("max_duration", 0.0),
        ("max_duration", 240.5),
        ("max_duration", float("nan")),
        ("encoder_workers", 0),
        ("device", "tpu"),
    ],
)
def test_a_setting_out_of_bounds_is_refused_by_its_flag(config, name, value):
    with pytest.raises(InputError, match=f"--{name} is {value}"):
        precompute(replace(config, **{name: value}))


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
    models = precompute_module._recipe(config, checkpoint).models
    assert len(set(models.values())) == 5
    assert re.fullmatch("[0-9a-f]{64}", models[part])


@pytest.mark.parametrize("change", ["max_duration", "tag_shuffles", "ssl_frame_stride", "seed"])
def test_every_setting_that_matters_is_in_the_recipe(config, checkpoint, change):
    before = precompute_module._recipe(config, checkpoint)
    after = precompute_module._recipe(replace(config, **{change: 7}), checkpoint)
    assert isinstance(before, Recipe)
    assert before != after


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([{"CPU": 2}], None, ("cpu", 1, 1, 0)),
        ([{"CPU": 1}], None, ("cpu", 1, 0.5, 0)),
        ([{"CPU": 64}], None, ("cpu", 1, 63, 0)),
        ([{"CPU": 64}], 4, ("cpu", 4, 15, 0)),
        ([{"CPU": 2}], 4, ("cpu", 4, 0.25, 0)),
        ([{"CPU": 8}, {"CPU": 16}, {"memory": 1}], None, ("cpu", 2, 7, 0)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2}], None, ("cuda", 4, 1, 1)),
        ([{"CPU": 8, "GPU": 2}], 5, ("cuda", 5, 1, 1 / 3)),
    ],
)
def test_encoders_leave_room_for_decoding_and_take_one_gpu_each(
    monkeypatch, config, nodes, workers, expected
):
    alive = [{"Alive": True, "Resources": resources} for resources in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"GPU": 9, "CPU": 1}}])
    pool = precompute_module._EncoderPool.choose(replace(config, device="auto", encoder_workers=workers))
    assert (pool.device, pool.actors, pool.num_cpus, pool.num_gpus) == expected


def test_a_song_that_keeps_killing_its_reader_is_rejected(song_folder, tmp_path):
    song_folder.add("a", noise(3.0))
    cache = tmp_path / "cache"
    parts_module.claim_output_dir(cache)
    table = precompute_module._song_table([Song.from_row(song_folder.rows["a"])])
    settings = Settings(240.0, 1, 1, 0, SPEAKER_DIM)
    dead = [parts_module.counted_attempt(cache, "decode", "a") for _ in range(3)]
    assert [one.__enter__() for one in dead] == [1, 2, 3]
    outcome = precompute_module._decode(table, str(song_folder.path), str(cache), settings)
    reject = precompute_module._read_receipt(outcome["receipt"][0].as_py())
    assert (reject.key, reject.reason) == ("a", "corrupt")
    assert "3 times" in reject.message
    outcome = precompute_module._decode(table, str(song_folder.path), str(cache), settings)
    assert outcome["receipt"][0].as_py() is None


def test_lost_and_doubled_songs_do_not_pass():
    reject = Reject("b", "b.wav", "decode", "empty", "")
    check = precompute_module._check_complete
    check(["a", "b"], {"a": None}, [reject])
    for keys, rows, rejects in (
        (["a", "b"], {"a": None}, []),
        (["a", "b"], {"a": None, "b": None}, [reject]),
        (["a"], {"a": None}, [reject]),
    ):
        with pytest.raises(AceStepError, match="'b'"):
            check(keys, rows, rejects)


def test_the_summary_counts_rejects_by_reason_and_tells_when_there_are_no_ssl_features():
    rejects = [Reject(f"k{i}", f"{i}.wav", "decode", "empty", "0 bytes") for i in range(12)]
    summary = PrecomputeSummary(20, 8, 5, 3, rejects, [], 3660.0, 2.0, "cache")
    text = summary.render()
    assert "8 (3 computed, 5 unchanged), 1 h 01 min of audio" in text
    assert re.search(r"empty +12", text)
    assert text.count("0 bytes") == 10
    assert "--ssl_coeff 0" in text
    assert "--ssl_coeff 0" not in replace(summary, ssl_names=["mert"]).render()


def test_progress_is_a_line_now_and_then_without_a_terminal(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    progress = Progress(9, 3, stream, seconds_between_lines=30)
    now = 1000.0  # the models load
    for done in range(1, 10):
        progress.show(done, rejected=done // 5)
        now += 10.0
    progress.close()
    assert stream.getvalue().splitlines() == [
        "3 songs are in the cache already",
        "encoding 9 songs",
        "1/9 songs, 0 rejected",
        "4/9 songs, 0 rejected, 0.10 songs/s, 0:00:50 left",
        "7/9 songs, 1 rejected, 0.10 songs/s, 0:00:20 left",
        "9/9 songs, 1 rejected, 0.10 songs/s, 0:00:00 left",
    ]


def test_progress_rewrites_one_line_on_a_terminal(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = Progress(1, 0, stream)
    progress.show(1, rejected=1)
    progress.close()
    assert stream.getvalue() == "encoding 1 songs\n\r\x1b[K1/1 songs, 1 rejected\n"


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (RayTaskError("_Encode", "", InputError("a broken part")), InputError, "^a broken part$"),
        (
            RayTaskError(
                "_Encode", "", RuntimeError("CUDA error at song 'a'\nFailed to apply UDF after 1 attempt")
            ),
            AceStepError,
            r"^precompute stopped: CUDA error at song 'a'\n.*the same command goes on",
        ),
        (WorkerCrashedError(), AceStepError, "^precompute stopped: The worker died"),
    ],
)
def test_a_fault_in_a_worker_surfaces_as_one_message_with_its_cause(error, raised, message):
    with pytest.raises(raised, match=message), precompute_module._faults_explained():
        raise error


def test_the_console_keeps_ray_datas_warnings_and_nothing_else(capsys):
    logger = logging.getLogger("ray.data")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        with precompute_module._faults_explained():
            logger.info("executing")
            logger.warning("Progress bars disabled. To enable, …")
            logger.warning("no room in the cluster")
            logger.error("an exception was raised")
        logger.error("later")
    finally:
        logger.removeHandler(handler)
    assert stream.getvalue().splitlines() == ["no room in the cluster", "later"]
