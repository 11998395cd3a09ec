"""Commands killed before chosen changes of the file system, disks that take no more, and two writers of one output.

Every command runs in a process of its own with a bound on its time. Random moments, a full tmpfs and the commands on
Ray are in test_crash_faults.py.
"""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

from acestep_ray import cli
from acestep_ray.cache.commit import leftovers
from acestep_ray.cache.index import CacheIndex, read_manifest
from acestep_ray.cache.prune import reached
from acestep_ray.data.schema import open_dataset
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.storage import Store, only_writer
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from tests.cache.rows import song_row, write_rows
from tests.security.crashes import (
    Commands,
    hidden,
    moments,
    standing_still,
    tree,
    write_lora,
    write_search,
    write_songs,
    write_tar,
)

HELD = "is writing to the same place"
FULL = "no room on the disk"


@pytest.fixture(scope="module")
def commands():
    server = Commands()
    yield server
    server.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny").path


@pytest.fixture
def songs(tmp_path) -> tuple[Path, Path]:
    return write_songs(tmp_path / "old", "a"), write_songs(tmp_path / "new", "a", "b")


@pytest.fixture
def search(tmp_path) -> Path:
    return write_search(tmp_path / "search")


@pytest.fixture
def pruned(tmp_path) -> Path:
    """A cache with much to delete."""
    cache = write_rows(Store.at(tmp_path / "cache"), [song_row("a"), song_row("b")])
    for number in range(4):
        cache.write_bytes(f"samples/part-{number:016x}.parquet", b"of a killed run")
        cache.write_bytes(f".incoming/parts/{number}.parquet", b"likewise")
    (cache.path / f"samples/.{'a' * 32}.tmp").write_bytes(b"half")
    return cache.path


def prepare(source: Path, output: Path) -> list[str]:
    return ["prepare", "--data_dir", str(source), "--output_dir", str(output)]


def keys_of(dataset: Path) -> list[str]:
    """The keys of a dataset that is whole: every file that it names is there."""
    rows = list(open_dataset(dataset))
    assert all((dataset / row["filename"]).stat().st_size > 19_000 for row in rows)
    return sorted(row["keys"] for row in rows)


def merge(checkpoint: Path, lora: Path, output: Path) -> list[str]:
    flags = ["--checkpoint_dir", checkpoint, "--lora_path", lora, "--output_dir", output]
    return ["export", "merge", *map(str, flags)]


# --- killed ------------------------------------------------------------------------------------------------


def test_a_killed_prepare_leaves_the_old_dataset_or_the_new_one(commands, songs, tmp_path):
    old, new = songs
    output = tmp_path / "set"
    assert commands(*prepare(old, output)).code == 0
    count = commands(*prepare(new, output)).count
    for at in moments(count, 3):
        assert commands(*prepare(old, output)).code == 0
        assert commands(*prepare(new, output), at=at).code == -signal.SIGKILL
        assert keys_of(output) in (["a"], ["a", "b"])
        assert commands(*prepare(new, output)).code == 0
        assert keys_of(output) == ["a", "b"]
        assert hidden(tmp_path) == []


def test_what_a_killed_prepare_has_unpacked_is_deleted_and_what_a_living_one_uses_is_not(
    commands, songs, tmp_path
):
    tar = write_tar(tmp_path / "songs.tar", songs[1])
    count = commands(*prepare(tar, tmp_path / "first")).count
    assert commands(*prepare(tar, tmp_path / "killed"), at=count // 2).code == -signal.SIGKILL
    assert any("unpacked" in name for name in hidden(tmp_path))
    with standing_still(commands, *prepare(tar, tmp_path / "slow"), at=count // 2) as slow:
        used = [name for name in hidden(tmp_path) if "unpacked" in name]
        assert len(used) == 1  # what was left is deleted
        assert commands(*prepare(tar, tmp_path / "other")).code == 0
        assert [name for name in hidden(tmp_path) if "unpacked" in name] == used
        os.kill(slow, signal.SIGCONT)
        assert commands.wait(slow) == 0
    assert keys_of(tmp_path / "slow") == keys_of(tmp_path / "other") == ["a", "b"]
    assert [name for name in hidden(tmp_path) if "unpacked" in name] == []


def test_a_killed_merge_leaves_nothing_at_its_place_or_all_of_it(commands, checkpoint, tmp_path):
    lora = write_lora(tmp_path / "lora.safetensors", checkpoint)
    whole = tmp_path / "whole"
    ended = commands(*merge(checkpoint, lora, whole))
    assert ended.code == 0, ended.text
    for at in moments(ended.count, 2):
        output = tmp_path / f"merged-{at}"
        assert commands(*merge(checkpoint, lora, output), at=at).code == -signal.SIGKILL
        if output.exists():  # killed while it cleared up
            assert tree(output) == tree(whole)
            continue
        assert commands(*merge(checkpoint, lora, output)).code == 0
        assert tree(output) == tree(whole)
        assert not any(f".merged-{at}." in name for name in hidden(tmp_path))
    CheckpointDir.open(whole)


def test_a_killed_report_leaves_the_old_page_or_the_new_one(commands, search):
    page = search / "report.html"
    count = commands("report", search).count
    before = page.read_bytes()
    for at in moments(count, 3):
        assert commands("report", search, at=at).code == -signal.SIGKILL
        assert page.read_bytes().endswith(b"</html>\n")
        page.write_bytes(before)
    assert commands("report", search).code == 0
    assert hidden(search) == []


def test_a_cache_whose_prune_was_killed_reads_as_before(commands, pruned):
    cache = Store.at(pruned)
    parts = [f"samples/{part}" for part in CacheIndex.open(pruned).parts]
    files = {name: cache.read_bytes(name) for name in reached(read_manifest(cache), parts)}
    for at in (2, 9):
        assert commands("cache", "prune", pruned, at=at).code == -signal.SIGKILL
        assert list(CacheIndex.open(pruned).keys) == ["a", "b"]
        assert {name: cache.read_bytes(name) for name in files} == files
    assert commands("cache", "prune", pruned).code == 0
    assert leftovers(cache, set(files)) == []
    assert hidden(pruned) == []
    assert hidden(pruned / "samples") == []


def test_a_killed_or_full_tiny_checkpoint_leaves_nothing_and_of_two_one_is_refused(commands, tmp_path):
    """As `evaluate`, `export lora`, `mix` and `extract`, which write their folders likewise."""
    place = tmp_path / "tiny"
    arguments = ["checkpoint", "tiny", str(place)]
    assert commands(*arguments, at=12).code == -signal.SIGKILL
    assert not place.exists()
    check_full(commands(*arguments, file_bytes=5_000), place)
    assert hidden(tmp_path) == []
    with standing_still(commands, *arguments, at=12):
        check_refused(commands(*arguments), place)
    assert commands(*arguments).code == 0
    CheckpointDir.open(place)
    assert hidden(tmp_path) == []


def test_a_second_quickstart_into_one_folder_is_refused(commands, tmp_path):
    with only_writer(Store.at(tmp_path), "a test"):
        check_refused(commands("quickstart", "--output_dir", tmp_path), tmp_path)


# --- a full disk -------------------------------------------------------------------------------------------


def check_full(ended, place: Path) -> None:
    assert ended.code == 1, ended.text
    assert ended.text.count(FULL) == 1
    assert str(place) in ended.text
    assert "Traceback" not in ended.text


def test_a_prepare_on_a_full_disk_says_so_and_leaves_the_old_dataset(commands, songs, tmp_path):
    old, new = songs
    output = tmp_path / "set"
    commands(*prepare(old, output))
    before = tree(output)
    check_full(commands(*prepare(new, output), file_bytes=100), output)
    assert tree(output) == before
    tar = write_tar(tmp_path / "songs.tar", new)
    check_full(commands(*prepare(tar, output), file_bytes=10_000), tmp_path)
    assert tree(output) == before
    assert hidden(tmp_path) == []
    assert commands(*prepare(tar, output)).code == 0
    assert keys_of(output) == ["a", "b"]


def test_merge_and_report_on_a_full_disk_leave_nothing_half_written(commands, checkpoint, search, tmp_path):
    lora = write_lora(tmp_path / "lora.safetensors", checkpoint)
    check_full(commands(*merge(checkpoint, lora, tmp_path / "merged"), file_bytes=9_000), tmp_path / "merged")
    page = search / "report.html"
    page.write_text("an older page")
    check_full(commands("report", search, file_bytes=1_000), Path(tempfile.gettempdir()))
    assert page.read_text() == "an older page"
    assert hidden(tmp_path) == hidden(search) == []
    assert not (tmp_path / "merged").exists()


def test_a_merge_for_which_there_is_no_room_does_not_begin(checkpoint, tmp_path, monkeypatch, capsys):
    lora = write_lora(tmp_path / "lora.safetensors", checkpoint)
    monkeypatch.setattr("acestep_ray.storage.disk.free_bytes", lambda place: 1_000)
    assert cli.main(merge(checkpoint, lora, tmp_path / "merged")) == 2
    assert "MB are to be written, 1 kB are free" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_full_disk_is_no_obstacle_to_prune(commands, pruned):
    ended = commands("cache", "prune", pruned, file_bytes=0)
    assert ended.code == 0, ended.text
    assert not (pruned / ".incoming").exists()


# --- two writers -------------------------------------------------------------------------------------------


def check_refused(ended, place: Path) -> None:
    assert ended.code == 2, ended.text
    lines = ended.text.strip().splitlines()
    assert HELD in lines[0]
    assert str(place) in lines[0]
    assert len(lines) == 2  # with what to do


def test_a_second_prepare_to_one_place_is_refused_and_a_killed_one_does_not_block(commands, songs, tmp_path):
    old, new = songs
    output = tmp_path / "set"
    with standing_still(commands, *prepare(old, output), at=8) as first:
        before = tree(tmp_path)
        check_refused(commands(*prepare(new, output)), output)
        assert tree(tmp_path) == before
        assert f"process {first} " in commands(*prepare(new, output)).text
        assert commands(*prepare(new, tmp_path / "another")).code == 0
    assert ".set.lock" in hidden(tmp_path)
    assert commands(*prepare(new, output)).code == 0
    assert keys_of(output) == ["a", "b"]
    assert hidden(tmp_path) == []


def test_of_two_that_merge_report_or_prune_at_one_place_the_second_is_refused(
    commands, checkpoint, search, pruned, tmp_path
):
    lora = write_lora(tmp_path / "lora.safetensors", checkpoint)
    for place, arguments in (
        (tmp_path / "merged", merge(checkpoint, lora, tmp_path / "merged")),
        (search, ["report", str(search)]),
        (pruned, ["cache", "prune", str(pruned)]),
    ):
        with standing_still(commands, *arguments, at=3):
            check_refused(commands(*arguments), place)
        assert commands(*arguments).code == 0


def test_what_writes_to_a_cache_or_a_batch_is_refused_while_another_process_does(
    commands, checkpoint, songs, pruned, tmp_path
):
    """Before Ray starts."""
    dataset, batch = tmp_path / "set", tmp_path / "songs.jsonl"
    commands(*prepare(songs[0], dataset))
    batch.write_text('{"prompt": "piano"}\n')
    shared = ["--checkpoint_dir", checkpoint, "--device", "cpu"]
    for place, arguments in (
        (pruned, ["precompute", "--dataset_path", dataset, "--output_dir", pruned, *shared]),
        (tmp_path / "out", ["generate", "--batch_path", batch, "--output_dir", tmp_path / "out", *shared]),
    ):
        with only_writer(Store.at(place), "a test"):
            check_refused(commands(*arguments), place)
        assert ".lock" not in hidden(place)
