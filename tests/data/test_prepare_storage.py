"""Songs and datasets in object storage: what comes out is what comes out on a disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from acestep_ray.config import PrepareConfig
from acestep_ray.data import dataset_folder
from acestep_ray.data.dataset_folder import MARKER
from acestep_ray.data.file_names import file_at
from acestep_ray.data.prepare import prepare_dataset
from acestep_ray.data.schema import open_dataset
from acestep_ray.data.songs import SongTable
from acestep_ray.errors import InputError
from acestep_ray.storage import StorageError, Store, upload_folder
from tests.data.test_prepare import add, write_csv

PLACES = [("s3", "local"), ("local", "s3"), ("s3", "s3"), ("memory", "s3")]


@pytest.fixture
def songs(tmp_path) -> Path:
    """A folder with three songs, and a table of them with speaker embeddings."""
    folder = tmp_path / "songs"
    for name in ("a.wav", "deep/b.mp3", "c.flac"):
        add(folder, name)
    (folder / "voice.npy").write_bytes(b"voice")
    rows = [
        {"key": "one", "filename": "a.wav", "tags": "x", "speaker": "voice.npy"},
        {"key": "two", "filename": "deep/b.mp3", "tags": "y", "speaker": "voice.npy"},
        {"key": "three", "filename": "deep/../c.flac", "tags": "y", "speaker": ""},
    ]
    table = [{**row, "speaker_emb_path": row.pop("speaker")} for row in rows]
    write_csv(folder / "list.csv", table)
    return folder


@pytest.fixture
def place(tmp_path, s3):
    """An empty place of a kind."""

    def new(kind: str, name: str) -> Store:
        kinds = {"local": str(tmp_path / name), "memory": f"memory://{tmp_path.name}/{name}"}
        return Store.at(kinds.get(kind) or f"{s3.fresh()}/{name}")

    return new


def prepare(source: str, output: Store, **settings) -> dict[str, dict]:
    """The dataset's rows by key."""
    prepare_dataset(PrepareConfig(data_dir=source, output_dir=output.url, **settings))
    splits = ("train", "test") if settings.get("test_fraction") else ("train",)
    return {row["keys"]: row for split in splits for row in open_dataset(output.url, split)}


def contents(store: Store) -> dict[str, bytes]:
    """The songs' files in a dataset."""
    return {
        name: store.read_bytes(name) for name in store.names() if name.startswith(("audio/", "speakers/"))
    }


@pytest.mark.parametrize("source", ["", "list.csv"])
@pytest.mark.parametrize(("kind", "output_kind"), PLACES)
def test_a_dataset_is_the_same_wherever_songs_and_dataset_lie(songs, place, kind, output_kind, source):
    expected = place("local", "expected")
    rows = prepare(str(songs / source), expected, test_fraction=0.4)
    there = Store.at(songs)
    if kind != "local":
        there = place(kind, "songs")
        upload_folder(songs, there)
    output = place(output_kind, "set")
    assert prepare(there.url_of(source), output, test_fraction=0.4) == rows
    assert sorted(output.names()) == sorted(expected.names())
    assert contents(output) == contents(expected)
    assert json.loads(output.read_bytes(MARKER))["rows"] == json.loads(expected.read_bytes(MARKER))["rows"]


def test_a_dataset_there_is_replaced_whole(songs, place):
    output = place("s3", "set")
    prepare(str(songs), output, test_fraction=0.4)
    (songs / "c.flac").unlink()
    rows = prepare(str(songs), output)
    assert set(rows) == {"a", "deep_b"}
    # The table in the folder names a voice.
    assert set(contents(output)) == {"audio/a.wav", "audio/deep/b.mp3", "speakers/voice.npy"}
    assert not [name for name in output.names() if name.startswith(("train/", "test/"))]


def test_until_it_is_finished_it_does_not_read_as_a_dataset(songs, place, monkeypatch):
    output = place("s3", "set")
    prepare(str(songs), output)
    upload = Store.upload

    def fail_at_the_rows(self: Store, source, name: str) -> None:
        if name.endswith(".arrow"):
            raise StorageError("the bucket is on fire")
        upload(self, source, name)

    monkeypatch.setattr(Store, "upload", fail_at_the_rows)
    with pytest.raises(StorageError, match="on fire"):
        prepare(str(songs), output)
    assert MARKER in output.names()
    with pytest.raises(InputError):
        SongTable.open(output.url)
    monkeypatch.undo()
    assert len(prepare(str(songs), output)) == 3


def test_other_peoples_files_there_are_not_replaced(songs, place):
    output = place("s3", "set")
    output.write_bytes("mine/notes.txt", b"x")
    with pytest.raises(InputError, match=rf"did not write: {output.url} \(mine\)"):
        prepare(str(songs), output)
    assert list(output.names()) == ["mine/notes.txt"]


def test_a_table_may_name_files_anywhere(songs, place):
    there = place("s3", "voices")
    there.write_bytes("a.wav", b"from there")
    there.write_bytes("voice.npy", b"voice")
    rows = [
        {
            "key": "1",
            "filename": there.url_of("a.wav"),
            "tags": "x",
            "speaker_emb_path": there.url_of("voice.npy"),
        }
    ]
    table = write_csv(songs / "urls.csv", [*rows, {**rows[0], "key": "2", "filename": str(songs / "a.wav")}])
    output = place("local", "set")
    found = prepare(str(table), output)
    assert found["1"]["filename"] == "audio/a.wav"
    assert found["2"]["filename"] == "audio/a-2.wav"
    assert contents(output) == {
        "audio/a.wav": b"from there", "audio/a-2.wav": (songs / "a.wav").read_bytes(), "speakers/voice.npy": b"voice",
    }  # fmt: skip


def test_files_that_are_not_there_are_all_told_and_nothing_is_written(songs, place):
    there = place("s3", "songs")
    rows = [
        {"key": "1", "filename": "none.wav", "tags": "x"},
        {"key": "2", "filename": "s3://no-such-bucket/a.wav", "tags": "x"},
        {"key": "3", "filename": "s3://", "tags": "x"},
    ]
    there.upload(write_csv(songs / "missing.csv", rows), "list.csv")
    output = place("s3", "set")
    with pytest.raises(InputError, match="3 problems in the songs") as refused:
        prepare(there.url_of("list.csv"), output)
    message = str(refused.value)
    assert "row 1 (none.wav): the file does not exist" in message
    assert "row 2 (s3://no-such-bucket/a.wav): the bucket does not exist" in message
    assert "row 3 (s3://): " in message
    assert output.names() == {}


@pytest.mark.parametrize("output", ["s3://bucket/a/songs/set", "s3://bucket/a/songs", "s3://bucket/a"])
def test_a_dataset_inside_its_songs_or_the_reverse_is_refused(s3, output):
    Store.at("s3://bucket/a/songs").write_bytes("a.wav", b"x")
    with pytest.raises(InputError, match="inside each other"):
        prepare("s3://bucket/a/songs/", Store.at(output))


def test_sources_and_outputs_that_cannot_be_used_are_refused(songs, place):
    with pytest.raises(InputError, match="--data_dir does not exist: s3://"):
        prepare(place("s3", "none").url, place("local", "set"))
    with pytest.raises(InputError, match="hf:// is read from, not written to"):
        prepare(str(songs), Store.at("hf://datasets/user/songs"))


def test_file_names_are_relative_to_the_tables_folder(tmp_path):
    there = Store.at("memory://bucket/songs")
    assert file_at("deep/a.wav", there).url == "memory://bucket/songs/deep/a.wav"
    assert file_at("../b/a.wav", there).url == "memory://bucket/b/a.wav"
    assert file_at("/disk/a.wav", there).url == "/disk/a.wav"
    assert file_at("memory://other/a.wav", Store.at(tmp_path)).url == "memory://other/a.wav"
    assert file_at("../a.wav", Store.at(tmp_path)).url == str(tmp_path.parent / "a.wav")


def test_a_copy_that_fails_ends_the_others(songs, place, monkeypatch):
    def fail(source, target) -> None:
        raise StorageError("the bucket is on fire")

    monkeypatch.setattr(dataset_folder, "_copy", fail)
    output = place("s3", "set")
    with pytest.raises(StorageError, match="on fire"):
        prepare(str(songs), output)
    assert list(output.names()) == [MARKER]
