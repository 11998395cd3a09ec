from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pytest
import ray

from acestep_ray.cache import graph
from acestep_ray.cache.attempts import Attempts
from acestep_ray.cache.decoding import decode_song, file_versions
from acestep_ray.cache.graph import estimate_seconds, group_by_length
from acestep_ray.cache.songs import DecodedSong, Song
from acestep_ray.cache.transport import as_one_row, from_one_row, read_decoded
from acestep_ray.storage import Store
from tests.cache.conftest import RECIPE, SETTINGS, noise, song

BUDGET = 10.0


def test_groups_are_of_nearly_equal_length_and_within_the_budget():
    random = np.random.default_rng(0)
    songs = [(float(seconds), song(f"s{i}")) for i, seconds in enumerate(random.uniform(3, 240, 500))]
    seconds_of = {one.key: seconds for seconds, one in songs}
    groups = group_by_length(songs, 480.0)
    assert sorted(one.key for group in groups for one in group) == sorted(seconds_of)
    for group in groups:
        lengths = [seconds_of[one.key] for one in group]
        assert len(group) * max(lengths) <= 480.0
        assert min(lengths) >= max(lengths) / 2
    padded = sum(len(group) * max(seconds_of[one.key] for one in group) for group in groups)
    assert padded < 1.1 * sum(seconds_of.values())
    assert len(groups) < 250


def test_short_songs_share_a_group_and_one_over_the_budget_is_alone():
    songs = [(3.0, song(f"s{i}")) for i in range(7)] + [(math.inf, song("long")), (11.0, song("over"))]
    groups = [[one.key for one in group] for group in group_by_length(songs, BUDGET)]
    assert groups == [["long"], ["over"], ["s0", "s1", "s2"], ["s3", "s4", "s5"], ["s6"]]


def test_the_order_of_the_songs_does_not_change_the_groups():
    songs = [(float(1 + i % 5), song(f"s{i}")) for i in range(40)]
    assert group_by_length(songs, BUDGET) == group_by_length(reversed(songs), BUDGET)


def test_a_song_is_estimated_by_its_header_and_its_window(song_folder):
    song_folder.add("a", noise(9.0))
    song_folder.add("b", b"once upon a time")
    root = Store.at(song_folder.path)
    assert estimate_seconds(root, song("a"), SETTINGS) == 9.0
    assert estimate_seconds(root, song("a"), replace(SETTINGS, window_seconds=4.0)) == 4.0
    assert estimate_seconds(root, song("a"), replace(SETTINGS, window="all", window_seconds=4.0)) == 9.0
    for unknown in ("b", "gone"):
        assert estimate_seconds(root, song(unknown), SETTINGS) == 240.0
    assert estimate_seconds(root, song("a", filename="../a.wav"), SETTINGS) == 240.0


def test_a_song_in_object_storage_is_estimated_without_reading_it(monkeypatch):
    root = Store.at("memory://songs")
    root.write_bytes("a.flac", bytes(9_000_000))
    monkeypatch.setattr(Store, "read_bytes", None)
    monkeypatch.setattr(Store, "open", None)
    assert estimate_seconds(root, song("a", filename="a.flac"), SETTINGS) == pytest.approx(80.0)


def test_a_process_that_decodes_loads_no_models_and_no_torch():
    code = "import sys, acestep_ray.cache.graph, acestep_ray.training.scan; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "torchaudio", "transformers", "diffusers", "peft", "datasets", "mlflow"} & set(
        loaded
    )


@pytest.fixture(scope="module")
def attempts(two_cpus):
    return ray.remote(num_cpus=0)(Attempts).remote()


def groups_of(*groups: list[Song]) -> pa.Table:
    return pa.table({"groups": [json.dumps([[asdict(one) for one in group] for group in groups])]})


def decode_tables(root: Store, attempts, *songs: Song, recipe=RECIPE) -> list[pa.Table]:
    batches = graph._decode(groups_of(list(songs)), root, recipe, BUDGET, attempts)
    return [from_one_row(batch) for batch in batches]


@pytest.mark.ray
def test_decoded_songs_pass_through_a_table_unchanged(song_folder, attempts):
    np.save(song_folder.path.parent / "voice.npy", np.arange(5, dtype=np.float32))
    song_folder.add("a", noise(3.5))
    song_folder.add("b", noise(4.0, seed=1))
    root = Store.at(song_folder.path)
    songs = [song("a"), song("b", speaker_path=str(song_folder.path.parent / "voice.npy")), song("gone")]
    (table,) = decode_tables(root, attempts, *songs)
    for row, one in enumerate(songs[:2]):
        (expected,) = decode_song(root, one, RECIPE, file_versions(root, one))
        found = read_decoded(table, row)
        assert found.header() == expected.header()
        np.testing.assert_array_equal(found.wave, expected.wave)
        np.testing.assert_equal(found.speaker, expected.speaker)
    assert json.loads(table["reject"][2].as_py())["reason"] == "missing"


def test_a_batch_is_one_row_and_comes_back_whole():
    table = pa.table({"a": ["x", None, "z"], "b": pa.array([b"1", b"", None], pa.large_binary())})
    rows = [as_one_row(table), as_one_row(table.slice(1, 1)), as_one_row(table.slice(0, 0))]
    assert [len(row) for row in rows] == [1, 1, 1]
    joined = pa.concat_tables(rows)
    assert [from_one_row(joined, i) for i in range(3)] == [table, table.slice(1, 1), table.slice(0, 0)]


@pytest.mark.ray
def test_the_windows_of_a_long_song_come_in_batches_within_the_budget(song_folder, attempts):
    song_folder.add("a", noise(22.0))
    recipe = replace(RECIPE, settings=replace(SETTINGS, window="all", window_seconds=4.0))
    tables = decode_tables(Store.at(song_folder.path), attempts, song("a"), recipe=recipe)
    assert [len(table) for table in tables] == [2, 2, 1]
    starts = [read_decoded(table, row).start_seconds for table in tables for row in range(len(table))]
    assert starts == [0.0, 4.0, 8.0, 12.0, 16.0]


@pytest.mark.parametrize(
    ("count", "cpus", "expected"),
    [(1, 2, 1), (256, 16, 1), (1_000, 16, 3), (1_000_000, 1024, 8), (30, 0.5, 3)],
)
def test_tasks_take_several_batches_where_every_core_gets_many_tasks_all_the_same(count, cpus, expected):
    assert graph.batches_per_task(count, cpus) == expected


def test_a_plan_puts_as_many_groups_into_a_task_as_it_is_told(tmp_path):
    cache = Store.at(tmp_path)
    cache.write_bytes("list.json", json.dumps([asdict(song(key)) for key in "abcde"]).encode())
    tables = graph._plan(pa.table({"list": ["list.json"]}), cache, cache, RECIPE, BUDGET, per_task=2)
    tasks = [json.loads(groups) for table in tables for groups in table["groups"].to_pylist()]
    assert [[[one["key"] for one in group] for group in task] for task in tasks] == [
        [["a"], ["b"]],
        [["c"], ["d"]],
        [["e"]],
    ]


@pytest.mark.ray
def test_groups_of_one_task_are_batches_of_their_own(song_folder, attempts):
    for key in "abc":
        song_folder.add(key, noise(3.0, seed=ord(key)))
    groups = groups_of([song("a")], [song("b"), song("c")])
    batches = graph._decode(groups, Store.at(song_folder.path), RECIPE, BUDGET, attempts)
    tables = [from_one_row(batch) for batch in batches]
    keys = [[read_decoded(table, row).key for row in range(len(table))] for table in tables]
    assert keys == [["a"], ["b", "c"]]


@pytest.mark.ray
def test_batches_of_one_task_are_encoded_one_by_one_and_stored_together(song_folder, attempts, monkeypatch):
    for key in "abc":
        song_folder.add(key, noise(3.0, seed=ord(key)))
    root, sizes = Store.at(song_folder.path), []

    class Models:
        def encode(self, songs: list[DecodedSong]) -> list[dict]:
            sizes.append(len(songs))
            return [{"latent_frames": ord(one.key)} for one in songs]

    stage = graph._Encode("", RECIPE, graph.EncoderPool(("latents",), "cuda", 1, 1, 1), attempts)
    monkeypatch.setattr(stage, "_models", Models)
    batches = [*graph._decode(groups_of([song("c"), song("a")], [song("b")]), root, RECIPE, BUDGET, attempts)]
    encoded = stage(pa.concat_tables(batches), keep_wave=False)
    assert sizes == [2, 1]
    assert encoded.num_rows == 1
    assert from_one_row(encoded)["latent_frames"].to_pylist() == [ord("c"), ord("a"), ord("b")]


@pytest.mark.ray
def test_decoded_songs_wait_for_encoders_in_a_part_of_the_object_store(two_cpus, tmp_path, monkeypatch):
    stages = graph.Graph(Store.at(tmp_path), Store.at(tmp_path), "", RECIPE, [], 2584, None)
    pool = graph.EncoderPool(("latents",), "cuda", 4, 0.5, 0.25)
    room = {"CPU": 16.0, "object_store_memory": 17e9}
    monkeypatch.setattr("ray.cluster_resources", lambda: room)
    assert stages._encoded_together(pool, 1_000_000) == 5
    assert stages._encoded_together(pool, 100) == 1
    room["object_store_memory"] = 1e9
    assert stages._encoded_together(pool, 1_000_000) == 1


@pytest.mark.ray
def test_a_song_that_keeps_killing_its_reader_is_rejected(song_folder, attempts):
    song_folder.add("a", noise(3.0))
    root = Store.at(song_folder.path)
    for _ in range(3):
        ray.get(attempts.begin.remote("decode", ["a"]))  # by processes that died
    (table,) = decode_tables(root, attempts, song("a"))
    reject = json.loads(table["reject"][0].as_py())
    assert (reject["key"], reject["reason"]) == ("a", "corrupt")
    assert "3 times" in reject["message"]
    # That was the end of it: another run begins anew.
    (table,) = decode_tables(root, attempts, song("a"))
    assert table["reject"][0].as_py() is None


@pytest.mark.ray
def test_after_a_death_the_songs_of_a_batch_are_encoded_one_by_one(song_folder, attempts, monkeypatch):
    for key in "abc":
        song_folder.add(key, noise(3.0, seed=ord(key)))
    (table,) = decode_tables(Store.at(song_folder.path), attempts, *(song(key) for key in "abc"))
    sizes = []

    class Models:
        def encode(self, songs: list[DecodedSong]) -> list[dict]:
            sizes.append(len(songs))
            return [{"latent_frames": 1} for _ in songs]

    stage = graph._Encode("", RECIPE, graph.EncoderPool(("latents",), "cuda", 1, 1, 1), attempts)
    monkeypatch.setattr(stage, "_models", Models)
    stage(as_one_row(table), keep_wave=False)
    ray.get(attempts.begin.remote("encode latents", ["b"]))
    encoded = stage(as_one_row(table), keep_wave=False)
    assert sizes == [3, 1, 1, 1]
    assert encoded.num_rows == 1
    assert "wave" not in encoded.column_names
    assert from_one_row(encoded)["latent_frames"].to_pylist() == [1, 1, 1]
    for _ in range(3):
        ray.get(attempts.begin.remote("encode latents", ["b"]))
    with pytest.raises(RuntimeError, match="3 times"):
        stage(as_one_row(table), keep_wave=False)


@pytest.mark.ray
def test_decoding_stays_a_stage_of_its_own_beside_encoders_that_reserve_as_much(two_cpus, tmp_path, capsys):
    cpus = graph.decode_cpus([{"CPU": 2}])
    stages = graph.Graph(
        root=Store.at(tmp_path),
        cache=Store.at(tmp_path / "cache"),
        checkpoint_dir="",
        recipe=RECIPE,
        pools=[graph.EncoderPool(("latents",), "cpu", 1, cpus, 0)],
        batch_frames=100,
        decode_workers=None,
    )
    with graph.DataContext.current(stages.context()):
        stages._stored(stages.decoded([song()], 1), 1).explain()
    assert "MapBatches(_decode)->MapBatches(_Encode)" not in capsys.readouterr().out.replace(" ", "")
