from __future__ import annotations

import csv
import io
import json
import os
import random
import tracemalloc
import unicodedata

import pytest
from datasets import Audio, Dataset, DatasetDict

from acestep_ray.config import PrepareConfig
from acestep_ray.data import sources
from acestep_ray.data.file_names import locate_file
from acestep_ray.data.prepare import prepare_dataset
from acestep_ray.data.schema import open_dataset, row_recaption
from acestep_ray.data.songs import SongTable
from acestep_ray.errors import InputError
from acestep_ray.storage import StorageError, Store, clients


@pytest.fixture(params=["local", "memory", "s3"])
def place(request, tmp_path):
    """An empty place for songs of each kind."""
    if request.param == "local":
        (tmp_path / "songs").mkdir()
        return Store.at(tmp_path / "songs")
    if request.param == "memory":
        return Store.at(f"memory://{tmp_path.name}/songs")
    return Store.at(request.getfixturevalue("s3").fresh())


@pytest.fixture
def memory(tmp_path):
    return Store.at(f"memory://{tmp_path.name}/songs")


def refusal(place, split="train") -> str:
    with pytest.raises(InputError) as caught:
        SongTable.open(place, split)
    return str(caught.value)


def write_csv(store: Store, name: str, rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    store.write_bytes(name, text.getvalue().encode())
    return store.url_of(name)


def write_jsonl(store: Store, name: str, rows: list) -> str:
    store.write_bytes(name, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return store.url_of(name)


def upload(directory, store: Store) -> None:
    for name in (local := Store.at(directory)).names():
        store.write_bytes(name, local.read_bytes(name))


def row(key: str, **columns) -> dict:
    return {
        "keys": key,
        "filename": f"audio/{key}.wav",
        "tags": ["pop"],
        "recaption": {"simplified": "x"},
    } | columns


# --- folders


def test_a_folder_of_songs_is_read_where_it_lies(place):
    for name, content in {
        "b.mp3": b"audio",
        "a.wav": b"audio",
        "a_prompt.txt": "pop, slow , ,流行".encode(),
        "a_lyrics.txt": b"\xef\xbb\xbf[verse]\r\nla  \r\n",
        "a_recaption.json": b'{"simplified": "A song.", "other": " "}',
        "deep/er/🎵 x.FLAC": b"audio",
        ".trash/c.wav": b"audio",
        "deep/._d.wav": b"audio",
        "cover.jpg": b"x",
        "lost_lyrics.txt": b"x",
    }.items():
        place.write_bytes(name, content)
    table = SongTable.open(place.url)
    assert table.root == place
    assert table.keys == ["a", "b", "deep_er_🎵_x"]
    assert len(table) == 3
    assert table.row(0) == {
        "keys": "a",
        "filename": "a.wav",
        "tags": ["pop", "slow", "流行"],
        "norm_lyrics": "[verse]\nla",
        "speaker_emb_path": "",
        "recaption": {"simplified": "A song."},
        "language": "",
        "problem": "",
    }
    assert [song["filename"] for song in table] == ["a.wav", "b.mp3", "deep/er/🎵 x.FLAC"]
    assert [table.row(i) for i in range(3)] == list(table)
    assert locate_file(table.root, table.row(2)["filename"]).read_bytes() == b"audio"
    assert [warning.partition(":")[0] for warning in table.warnings] == [
        "b.mp3",
        "deep/er/🎵 x.FLAC",
        "lost_lyrics.txt",
    ]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            table.row(index)


def test_a_text_that_cannot_be_read_is_the_problem_of_its_song(place):
    for name, content in {
        "a.wav": b"",
        "a_lyrics.txt": "café".encode("latin-1"),
        "a_prompt.txt": "pop".encode("utf-16-le"),
        "b.wav": b"",
        "b_recaption.json": b"{",
        "c.wav": b"",
        "c_lyrics.txt": b"la\0la",
        "d.wav": b"",
        "d_prompt.txt": b"pop",
    }.items():
        place.write_bytes(name, content)
    problems = {song["keys"]: song["problem"] for song in SongTable.open(place.url)}
    assert "a_lyrics.txt: not UTF-8 text (byte 3)" in problems["a"]
    assert "a_prompt.txt: not UTF-8" in problems["a"]
    assert "b.wav: its recaption is not JSON" in problems["b"]
    assert "c_lyrics.txt: not UTF-8 text (it holds NUL bytes)" in problems["c"]
    assert problems["d"] == ""


def test_a_name_that_is_not_utf8_is_a_row_that_can_be_stored(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.wav")).write_bytes(b"x")
    except OSError:
        pytest.skip("the file system takes no such names")
    (tmp_path / "a.wav").write_bytes(b"x")
    good, bad = SongTable.open(tmp_path)
    assert good["problem"] == ""
    assert "not valid UTF-8" in bad["problem"]
    assert json.dumps(bad, ensure_ascii=False).encode()
    assert "caf" in bad["filename"]
    assert bad["keys"]


def test_names_with_newlines_are_names(tmp_path):
    (tmp_path / "two\nlines.wav").write_bytes(b"x")
    (song,) = SongTable.open(tmp_path)
    assert (song["filename"], song["keys"], song["problem"]) == ("two\nlines.wav", "two_lines", "")


def test_linked_folders_of_songs_are_followed_once(tmp_path):
    (tmp_path / "songs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.wav").write_bytes(b"x")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "songs" / "album").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "songs" / "gone.wav").symlink_to(tmp_path / "none")
    table = SongTable.open(tmp_path / "songs")
    assert table.keys == ["album_b", "gone"]
    assert locate_file(table.root, "album/b.wav").read_bytes() == b"x"


def test_songs_that_share_a_key_are_a_mistake(place):
    for name in ("a.wav", "a.mp3", "b.wav"):
        place.write_bytes(name, b"")
    assert "1 keys occur more than once" in refusal(place.url)


def test_a_place_without_songs_is_a_mistake(place):
    place.write_bytes("notes.txt", b"x")
    message = refusal(place.url)
    assert "there are no songs" in message
    assert place.url in message
    place.write_bytes("manifest.json", b"{}")
    assert "feature cache" in refusal(place.url)


def test_a_place_that_is_not_there_is_a_mistake(s3, tmp_path):
    assert "does not exist" in refusal(tmp_path / "none")
    assert "does not exist" in refusal(tmp_path / "none.csv")
    (tmp_path / "song.wav").write_bytes(b"")
    assert "neither a directory nor a table" in refusal(tmp_path / "song.wav")
    os.mkfifo(tmp_path / "pipe.csv")
    assert "neither a directory nor a table" in refusal(tmp_path / "pipe.csv")
    assert "there are no songs" in refusal(s3.fresh())
    assert "there are no songs" in refusal(f"{s3.fresh()}/none.csv")
    assert "bucket does not exist" in refusal("s3://no-such-bucket/songs")


def test_only_a_dataset_has_splits(memory):
    memory.write_bytes("a.wav", b"")
    table = write_jsonl(memory, "list.jsonl", [{"filename": "a.wav"}])
    for source in (memory.url, table):
        assert "no split 'test'" in refusal(source, "test")


def test_many_songs_are_read_in_order(memory, monkeypatch):
    monkeypatch.setattr(sources, "_SONGS_AT_ONCE", 7)
    for i in range(50):
        memory.write_bytes(f"{i:03}.wav", b"")
        memory.write_bytes(f"{i:03}_lyrics.txt", b"%d" % i)
    table = SongTable.open(memory.url)
    assert [song["norm_lyrics"] for song in table] == [str(i) for i in range(50)]
    assert [table.row(i)["keys"] for i in range(50)] == table.keys == [f"{i:03}" for i in range(50)]


@pytest.mark.parametrize("code", ["404", "403"])
def test_a_text_that_is_gone_or_denied_is_the_problem_of_its_song(memory, monkeypatch, code):
    assert "cannot be read" in row_with_failing_text(memory, monkeypatch, HttpError(code))["problem"]


def test_a_failure_of_storage_stops_the_job(memory, monkeypatch):
    """It is none of the song, which would be rejected for it."""
    monkeypatch.setattr(clients, "RETRY_AFTER_SECONDS", (0.01, 0.04))
    with pytest.raises(StorageError, match=r"connection lost.*a_lyrics.txt"):
        row_with_failing_text(memory, monkeypatch, RuntimeError("connection lost"))


class HttpError(Exception):
    def __init__(self, code: str):
        self.code = code


def row_with_failing_text(memory, monkeypatch, error) -> dict:
    memory.write_bytes("a.wav", b"")
    memory.write_bytes("a_lyrics.txt", b"la")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(memory.filesystem, "cat_file", fail)
    (song,) = SongTable.open(memory.url)
    return song


# --- tables


def test_a_csv_is_read_where_it_lies(place):
    rows = [
        {"key": "first", "audio": "sub/one.wav", "tags": "pop, slow", "lyrics": "la\r\nla", "speaker_emb_path": "v.pt",
         "recaption_simplified": "A song.", "Language": "DE", "bpm": "90"},
        {"key": "", "audio": "sub/two.mp3", "tags": "", "lyrics": "", "speaker_emb_path": "",
         "recaption_simplified": "", "Language": "", "bpm": ""},
    ]  # fmt: skip
    table = SongTable.open(write_csv(place, "list.csv", rows))
    assert table.root == place
    assert table.row(0) == {
        "keys": "first",
        "filename": "sub/one.wav",
        "tags": ["pop", "slow"],
        "norm_lyrics": "la\nla",
        "speaker_emb_path": "v.pt",
        "recaption": {"simplified": "A song."},
        "language": "de",
        "bpm": 90,
        "problem": "",
    }
    assert table.keys == ["first", "sub_two"]
    assert ["no tags" in warning for warning in table.warnings] == [True]
    assert table.layouts == ["2 songs in a table (list.csv)"]


def test_file_names_in_a_table_may_lead_elsewhere(place, tmp_path):
    elsewhere = Store.at(f"memory://{tmp_path.name}/elsewhere")
    elsewhere.write_bytes("x/far.wav", b"far")
    place.write_bytes("sub/near.wav", b"near")
    names = ["sub/near.wav", place.url_of("sub/near.wav"), elsewhere.url_of("x/far.wav")]
    url = write_jsonl(
        place, "list.jsonl", [{"key": str(i), "filename": name} for i, name in enumerate(names)]
    )
    table = SongTable.open(url)
    contents = [locate_file(table.root, song["filename"]).read_bytes() for song in table]
    assert contents == [b"near", b"near", b"far"]
    keyless = write_jsonl(place, "keyless.jsonl", [{"filename": name} for name in names[1:]])
    assert SongTable.open(keyless).keys == ["sub_near", "far"]


def test_a_song_that_is_missing_stays_in_the_table(memory):
    url = write_jsonl(
        memory, "list.jsonl", [{"filename": name} for name in ("none.wav", "../out.wav", "x" * 5000)]
    )
    table = SongTable.open(url)
    assert [song["problem"] for song in table] == ["", "", ""]
    assert locate_file(table.root, "none.wav").status() is None
    with pytest.raises(InputError, match="leaves"):
        locate_file(table.root, table.row(1)["filename"])


def test_what_is_wrong_with_one_row_is_its_problem(memory):
    rows = [
        {"key": "tags", "filename": "a.wav", "tags": ["x", True]},
        {"key": "recaption", "filename": "a.wav", "recaption": ["x"]},
        {"key": "json", "filename": "a.wav", "recaption": "[" * 100_000},
        {"key": "half", "filename": "a.wav", "lyrics": "\ud800"},
        {"key": "two", "filename": "a.wav", "lyrics": 1.5, "language": {}},
        {"key": "good", "filename": "a.wav", "tags": "x"},
    ]
    problems = {
        song["keys"]: song["problem"] for song in SongTable.open(write_jsonl(memory, "list.jsonl", rows))
    }
    assert "line 1: tags holds bool" in problems["tags"]
    assert "line 2: its recaption is not an object" in problems["recaption"]
    assert "line 3: its recaption is not JSON" in problems["json"]
    assert "line 4: norm_lyrics holds half of a surrogate pair" in problems["half"]
    assert "language holds dict" in problems["two"]
    assert problems["good"] == ""


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("list.jsonl", b'{"filename": "a.wav"}\n{\n[]\n', ["line 2: not JSON", "line 3: not a JSON object"]),
        ("list.ndjson", b'{"keys": "a"}\n{"filename": ""}\n', ["line 1: names no audio", "line 2: names no audio"]),
        ("list.jsonl", b'{"filename": "a.wav"}\n{"filename": "\xe9.wav"}\n', ["line 2: not UTF-8 text"]),
        ("list.jsonl", b"[" * 200_000, ["line 1: not JSON"]),
        ("list.csv", b"song,tags\na.wav,x\nb.wav,x\n", ["1 problem ", "has no column filename", "it has song, tags"]),
        ("list.csv", b"filename,tags\na.wav,x\nb.wav,\xe9\n", ["not UTF-8 text"]),
        ("list.csv", "filename,tags\na.wav,x\n".encode("utf-16-le"), ["list.csv"]),
        ("list.csv", b"filename,tags\na.wav,x\nb.wav,x\0\n", ["row 2: not UTF-8 text (it holds NUL bytes)"]),
        ("list.csv", b"filename,tags\na.wav,x,y\n", ["row 1: more cells than the header"]),
        ("list.csv", b"filename,tags\na.wav,x\na.wav,x\n", ["1 keys occur more than once", "key a"]),
        ("list.csv", b"", ["there are no songs"]),
        ("list.tsv", b"\n\nfilename\ttags\n", ["there are no songs"]),
        ("list.jsonl", b"\n \n", ["there are no songs"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_table_is_a_mistake(memory, name, content, expected):
    memory.write_bytes(name, content)
    message = refusal(memory.url_of(name))
    assert memory.url_of(name) in message
    for text in expected:
        assert text in message


def test_the_problems_of_a_large_table_are_told_in_part(memory):
    memory.write_bytes("list.jsonl", b"{\n" * 1000)
    message = refusal(memory.url_of("list.jsonl"))
    assert "1000 problems" in message
    assert "and 980 more" in message
    assert len(message.splitlines()) < 30


def test_long_texts_of_a_csv_are_read(memory):
    lyrics = "la " * 400_000 + "end"
    before = csv.field_size_limit()
    table = SongTable.open(write_csv(memory, "list.csv", [{"filename": "a.wav", "lyrics": lyrics}]))
    assert table.row(0)["norm_lyrics"] == lyrics
    assert csv.field_size_limit() == before


def test_a_table_with_ten_thousand_tags_is_read(memory):
    tags = [f"tag {i}" for i in range(10_000)]
    assert (
        SongTable.open(write_jsonl(memory, "a.jsonl", [{"filename": "a.wav", "tags": tags}])).row(0)["tags"]
        == tags
    )


@pytest.mark.parametrize("name", ["list.CSV", "list.jsonl"])
def test_a_folder_named_like_a_table_is_a_folder(memory, name):
    memory.write_bytes(f"{name}/a.wav", b"")
    assert SongTable.open(memory.url_of(name)).keys == ["a"]


# --- the same songs however they come


def test_a_source_read_directly_has_the_rows_of_the_prepared_dataset(tmp_path):
    folder = Store.at(tmp_path / "songs")
    letters = random.Random(0)
    for name in ("a", "sub/b", unicodedata.normalize("NFD", "Süß")):
        folder.write_bytes(f"{name}.wav", name.encode())
        folder.write_bytes(f"{name}_prompt.txt", b"pop,, slow\n")
        folder.write_bytes(f"{name}_lyrics.txt", "".join(letters.choices("la\r\n \t你", k=50)).encode())
    folder.write_bytes("a_recaption.json", b'{"x": "y"}')
    prepare_dataset(PrepareConfig(data_dir=folder.url, output_dir=str(tmp_path / "set")))
    direct, prepared = SongTable.open(folder.url), SongTable.open(tmp_path / "set")
    assert direct.keys == prepared.keys
    for ours, theirs in zip(direct, prepared, strict=True):
        for column in ("keys", "tags", "norm_lyrics", "speaker_emb_path"):
            assert ours[column] == theirs[column]
        assert row_recaption(ours) == row_recaption(theirs)
        assert f"audio/{ours['filename']}" == theirs["filename"]


# --- datasets


def test_a_dataset_is_read_where_it_lies(place, tmp_path):
    Dataset.from_list([row("a"), row("b", tags=[])]).save_to_disk(tmp_path / "set")
    upload(tmp_path / "set", place)
    place.write_bytes("audio/a.wav", b"audio")
    table = SongTable.open(place.url)
    assert (table.root, table.keys, len(table), table.warnings) == (place, ["a", "b"], 2, [])
    assert table.row(1) == row("b", tags=[])
    assert list(table) == [row("a"), row("b", tags=[])]
    assert locate_file(table.root, table.row(0)["filename"]).read_bytes() == b"audio"
    assert "no split 'test'" in refusal(place.url, "test")


def test_a_dataset_in_several_files_with_splits_is_read_where_it_lies(place, tmp_path):
    train = Dataset.from_list([row(f"{i:02}") for i in range(20)])
    splits = DatasetDict(train=train, test=Dataset.from_list([row("t")]))
    splits.save_to_disk(tmp_path / "set", num_shards={"train": 3, "test": 1})
    upload(tmp_path / "set", place)
    assert SongTable.open(place.url).keys == [f"{i:02}" for i in range(20)]
    assert SongTable.open(place.url, "test").row(0) == row("t")
    assert "it has: train, test" in refusal(place.url, "valid")


def test_the_rows_of_a_remote_dataset_are_fetched_and_its_audio_is_not(s3, tmp_path, monkeypatch):
    copies = tmp_path / "temporary"
    copies.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(copies))
    place = Store.at(s3.fresh())
    Dataset.from_list([row("a")]).save_to_disk(tmp_path / "set")
    upload(tmp_path / "set", place)
    place.write_bytes("audio/a.wav", b"x" * 1000)
    table = SongTable.open(place.url)
    assert "GET" not in s3.requests(place.url_of("audio"))
    assert list(copies.iterdir()) == []
    assert table.row(0)["keys"] == "a"  # from a file that is gone, and mapped


def test_the_rows_of_a_source_leave_no_file_behind(memory, tmp_path, monkeypatch):
    copies = tmp_path / "temporary"
    copies.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(copies))
    memory.write_bytes("a.wav", b"")
    table = SongTable.open(memory.url)
    assert list(copies.iterdir()) == []
    assert table.row(0)["keys"] == "a"


@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
@pytest.mark.parametrize("content", [None, b"garbage", b"[]"])
def test_a_damaged_dataset_is_a_mistake_and_no_folder_of_songs(place, tmp_path, file, content):
    Dataset.from_list([row("a")]).save_to_disk(tmp_path / "set")
    upload(tmp_path / "set", place)
    place.write_bytes("audio/a.wav", b"audio")
    place.delete([file])
    if content is not None:
        place.write_bytes(file, content)
    message = refusal(place.url)
    assert place.url in message
    assert "dataset" in message
    assert "no songs" not in message


def test_a_dataset_cannot_write_outside_its_copy(memory, tmp_path, monkeypatch):
    copies = tmp_path / "deep" / "temporary"
    copies.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(copies))
    Dataset.from_list([row("a")]).save_to_disk(tmp_path / "set")
    upload(tmp_path / "set", memory)
    memory.write_bytes("state.json", b'{"_data_files": [{"filename": "../../evil.arrow"}]}')
    memory.write_bytes("../../evil.arrow", b"x")
    assert "dataset" in refusal(memory.url)
    assert not list(tmp_path.rglob("evil*"))


def test_mistakes_in_a_dataset_are_those_of_open_dataset(memory, tmp_path):
    for number, (rows, message) in enumerate(
        [
            ([{"keys": "a", "file": "a.wav"}], "lacks the column filename"),
            ([row("a", filename=None), row("b")], "have nothing in the column filename"),
            ([row("a"), row("a", filename="b.wav")], "more than once"),
            ([row("a", tags=[1])], "column tags holds"),
        ]
    ):
        Dataset.from_list(rows).save_to_disk(tmp_path / f"{number}")
        upload(tmp_path / f"{number}", place := memory.child(f"{number}"))
        assert message in refusal(place.url)
        with pytest.raises(InputError) as caught:
            open_dataset(place.url)
        assert str(caught.value) == refusal(place.url)


def test_columns_that_are_not_the_datasets_are_left_alone(tmp_path):
    content = {
        "keys": ["a"],
        "filename": ["a.wav"],
        "audio": [{"path": None, "bytes": b"no audio"}],
        "problem": ["x"],
    }
    # Cast, not encoded: the feature would ask for an audio library to take bytes that are there already.
    Dataset.from_dict(content).cast_column("audio", Audio()).save_to_disk(tmp_path / "set")
    assert list(SongTable.open(tmp_path / "set")) == [{"keys": "a", "filename": "a.wav"}]


def test_the_texts_of_songs_are_not_kept_in_memory(memory):
    line = b'{"filename": "%d", "tags": "x", "lyrics": "' + b"x" * 2000 + b'"}\n'
    memory.write_bytes("list.jsonl", b"".join(line % i for i in range(5000)))
    tracemalloc.start()
    table = SongTable.open(memory.url_of("list.jsonl"))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert table.row(4999)["norm_lyrics"] == "x" * 2000
    assert kept < 5000 * 300
