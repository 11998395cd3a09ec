from __future__ import annotations

import csv
import json
import os
import shutil
import unicodedata
from collections import defaultdict

import pytest
from datasets import load_from_disk

from acestep_ray.config import PrepareConfig
from acestep_ray.data.file_names import locate_file
from acestep_ray.data.prepare import prepare_dataset
from acestep_ray.data.schema import open_dataset, row_recaption
from acestep_ray.errors import InputError
from acestep_ray.storage import DiskFullError, Store, swap


@pytest.fixture
def songs(tmp_path):
    """An empty folder for songs."""
    (tmp_path / "songs").mkdir()
    return tmp_path / "songs"


def add(folder, name, *, prompt="pop, slow", lyrics="[verse]\nla", audio=b"audio"):
    """A song NAME.ext with its texts; `None` leaves a text out. Its audio is never decoded here."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(audio + name.encode())
    for text, kind in ((prompt, "prompt"), (lyrics, "lyrics")):
        if text is not None:
            content = text if isinstance(text, bytes) else text.encode()
            path.with_name(f"{path.stem}_{kind}.txt").write_bytes(content)
    return path


def write_csv(path, rows, **options):
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(source, **settings):
    """The summary and the rows of the train split by key."""
    output = source.parent / "set"
    summary = prepare_dataset(PrepareConfig(data_dir=str(source), output_dir=str(output), **settings))
    return summary, {row["keys"]: row for row in open_dataset(output)}


def stored_file(summary, filename):
    return locate_file(Store.at(summary.output_dir), filename).path


def refusal(source, output=None, **settings) -> str:
    output = source.parent / "set" if output is None else output
    before = tree(source.parent)
    with pytest.raises(InputError) as caught:
        prepare_dataset(PrepareConfig(data_dir=str(source), output_dir=str(output), **settings))
    assert tree(source.parent) == before  # nothing is written, nothing is left behind
    return str(caught.value)


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# --- folders


def test_a_folder_becomes_a_dataset_that_holds_its_audio(songs):
    add(songs, "a.wav", prompt="pop, slow , ,piano", lyrics="[verse]\nla la")
    add(songs, "deep/er/b.mp3", lyrics=None)
    summary, rows = prepare(songs)
    assert (summary.songs, summary.rows, summary.splits, summary.without_lyrics) == (2, 2, {"train": 2}, 1)
    assert summary.warnings == []
    assert rows["a"] == {
        "keys": "a",
        "filename": "audio/a.wav",
        "tags": ["pop", "slow", "piano"],
        "norm_lyrics": "[verse]\nla la",
        "speaker_emb_path": "",
        "recaption": {"simplified": None},
    }
    assert rows["deep_er_b"]["filename"] == "audio/deep/er/b.mp3"
    assert rows["deep_er_b"]["norm_lyrics"] == ""
    shutil.rmtree(songs)
    for row in rows.values():
        audio = stored_file(summary, row["filename"])
        assert audio.read_bytes() == b"audio" + row["filename"].removeprefix("audio/").encode()


def test_the_other_names_of_texts_work_too(songs):
    add(songs, "a.flac", prompt=None, lyrics=None)
    (songs / "a.txt").write_text("rock, loud")
    (songs / "a.lyrics").write_text("hey")
    (songs / "a_recaption.json").write_text('{"simplified": "Loud rock.", "other": " "}')
    summary, rows = prepare(songs)
    assert (rows["a"]["tags"], rows["a"]["norm_lyrics"]) == (["rock", "loud"], "hey")
    assert row_recaption(rows["a"]) == {"simplified": "Loud rock."}
    assert summary.warnings == []


def test_suffixes_match_in_any_case(songs):
    (songs / "A.Mp3").write_bytes(b"x")
    (songs / "A_PROMPT.TXT").write_text("pop")
    (songs / "A_Lyrics.txt").write_text("la")
    summary, rows = prepare(songs)
    assert (rows["A"]["tags"], rows["A"]["norm_lyrics"], summary.warnings) == (["pop"], "la", [])


def test_texts_are_cleaned(songs):
    add(
        songs,
        "a.wav",
        prompt=b"\xef\xbb\xbfpop,slow\r\n",
        lyrics=b"\xef\xbb\xbf\r\n[verse]  \r\nla\t\r\n\r\nli\rlo \n\n",
    )
    _, rows = prepare(songs)
    assert rows["a"]["tags"] == ["pop", "slow"]
    assert rows["a"]["norm_lyrics"] == "[verse]\nla\n\nli\nlo"


def test_unicode_names_and_texts_are_kept(songs):
    add(songs, "Ünïcode 你好/हिन्दी.wav", prompt="流行，慢歌, поп", lyrics="你好\nпривет")
    _, rows = prepare(songs)
    assert list(rows) == ["Ünïcode_你好_हिन्दी"]
    row = rows["Ünïcode_你好_हिन्दी"]
    assert (row["tags"], row["norm_lyrics"]) == (["流行", "慢歌", "поп"], "你好\nпривет")
    assert row["filename"] == "audio/Ünïcode 你好/हिन्दी.wav"


def test_keys_do_not_depend_on_how_a_file_system_composes_letters(songs):
    add(songs, unicodedata.normalize("NFD", "Süß.wav"))
    assert list(prepare(songs)[1]) == [unicodedata.normalize("NFC", "Süß")]


def test_hidden_and_other_files_are_ignored_silently(songs):
    add(songs, "a.wav")
    add(songs, "._a.wav", prompt=None, lyrics=None)
    add(songs, ".trash/b.wav")
    for name in ("cover.jpg", "notes.pdf", "list.json"):
        (songs / name).write_bytes(b"x")
    summary, rows = prepare(songs)
    assert (list(rows), summary.warnings) == (["a"], [])


def test_linked_songs_and_folders_are_followed_once(songs, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    original = add(elsewhere, "b.wav")
    add(songs, "a.wav")
    (songs / "album").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(elsewhere)
    (songs / "c.wav").symlink_to(original)
    summary, rows = prepare(songs)
    assert sorted(rows) == ["a", "album_b", "c"]
    stored = stored_file(summary, rows["c"]["filename"])
    assert not stored.is_symlink()
    assert stored.read_bytes() == original.read_bytes()


@pytest.mark.parametrize("prompt", [None, b"", b" \n"])
def test_a_song_without_prompt_is_prepared_with_a_warning(songs, prompt):
    add(songs, "a.wav", prompt=prompt)
    summary, rows = prepare(songs)
    assert rows["a"]["tags"] == []
    assert len(summary.warnings) == 1
    assert "a.wav" in summary.warnings[0]
    assert "a_prompt.txt" in summary.render()


def test_texts_without_a_song_are_warned_of(songs):
    add(songs, "a.wav")
    (songs / "a.txt").write_text("not used, a_prompt.txt is there")
    (songs / "sub").mkdir()
    (songs / "sub" / "a_lyrics.txt").write_text("the song is elsewhere")
    (songs / "b.lyrics").write_text("no song")
    summary, _ = prepare(songs)
    assert [warning.partition(":")[0] for warning in summary.warnings] == [
        "a.txt",
        "b.lyrics",
        "sub/a_lyrics.txt",
    ]


def test_audio_of_a_kind_that_is_not_read_stays_with_a_warning(songs):
    add(songs, "a.m4a")
    summary, rows = prepare(songs)
    assert list(rows) == ["a"]
    assert "a.m4a" in summary.warnings[0]
    assert "convert" in summary.warnings[0]


def test_audio_that_is_not_read_at_all_stays_with_a_warning(songs):
    add(songs, "a.dsf")
    summary, rows = prepare(songs)
    assert list(rows) == ["a"]
    assert "a.dsf: .dsf is not read" in summary.warnings[0]


def test_damaged_audio_is_not_looked_into(songs):
    add(songs, "a.wav")
    (songs / "empty.wav").write_bytes(b"")
    assert sorted(prepare(songs)[1]) == ["a", "empty"]


def test_paths_that_would_share_a_key_get_different_ones(songs):
    for name in ("a b.wav", "a_b.wav", "a/b.wav", "c.wav"):
        add(songs, name)
    _, rows = prepare(songs)
    assert len(rows) == 4
    assert "c" in rows
    assert all(key.startswith("a_b_") for key in rows if key != "c")


def test_every_problem_is_listed_with_its_file(songs):
    add(songs, "twice.wav")
    add(songs, "twice.mp3")
    (songs / "gone.wav").symlink_to(songs / "nowhere.wav")
    add(songs, "latin.wav", lyrics="Grüße".encode("latin-1"))
    add(songs, "wide.wav", prompt="pop".encode("utf-16-le"))
    add(songs, "json.wav")
    (songs / "json_recaption.json").write_text("{")
    message = refusal(songs)
    assert "5 problems" in message
    lines = message.splitlines()
    for expected in (
        ("twice.mp3, twice.wav", "duplicate key 'twice'"),
        ("gone.wav", "does not exist"),
        ("latin_lyrics.txt", "not UTF-8"),
        ("wide_prompt.txt", "not UTF-8"),
        ("json.wav", "not JSON"),
    ):
        assert any(all(part in line for part in expected) for line in lines), expected


def test_a_name_that_is_not_utf8_is_a_problem(songs):
    add(songs, "a.wav")
    try:
        (songs / os.fsdecode(b"caf\xe9.wav")).write_bytes(b"x")
    except OSError:
        pytest.skip("the file system takes no such names")
    assert "not valid UTF-8" in refusal(songs)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user"
)
def test_what_may_not_be_read_is_a_problem(songs):
    add(songs, "a.wav").chmod(0)
    add(songs, "album/b.wav").parent.chmod(0)
    with pytest.raises(InputError) as caught:
        prepare(songs)
    (songs / "album").chmod(0o700)
    assert "a.wav: the file may not be read" in str(caught.value)
    assert "album: the folder cannot be read" in str(caught.value)


def test_a_folder_without_songs_is_refused(songs):
    (songs / "a_prompt.txt").write_text("pop")
    message = refusal(songs)
    assert "no songs" in message
    assert str(songs) in message


# --- tables


def test_a_csv_becomes_a_dataset(songs):
    for name in ("one.wav", "raw/two.mp3"):
        add(songs, name, prompt=None, lyrics=None)
    (songs / "voice.pt").write_bytes(b"embedding")
    rows = [
        {
            "key": "first",
            "audio_file_original_path": "one.wav",
            "tags_comma_separated": "pop, slow",
            "lyrics_multiline": "[verse]\r\nla, la\r\n",
            "speaker_emb_relative_path": "voice.pt",
            "recaption_simplified": "A song.",
            "recaption_descriptive": "",
            "Language": "DE",
        },
        dict.fromkeys(("key", "tags_comma_separated", "lyrics_multiline", "speaker_emb_relative_path"), "")
        | {"audio_file_original_path": str(songs / "raw" / "two.mp3"), "recaption_descriptive": "Long."},
    ]
    summary, prepared = prepare(write_csv(songs / "list.csv", rows, restval=""), test_fraction=0.0)
    assert prepared["first"] == {
        "keys": "first",
        "filename": "audio/one.wav",
        "tags": ["pop", "slow"],
        "norm_lyrics": "[verse]\nla, la",
        "speaker_emb_path": "speakers/voice.pt",
        "recaption": {"descriptive": None, "simplified": "A song."},
        "language": "de",
    }
    assert prepared["raw_two"]["filename"] == "audio/raw/two.mp3"
    assert row_recaption(prepared["raw_two"]) == {"descriptive": "Long."}
    assert [warning.rpartition(": ")[2] for warning in summary.warnings] == ["no tags"]
    speaker = stored_file(summary, prepared["first"]["speaker_emb_path"])
    assert speaker.read_bytes() == b"embedding"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("list.csv", {"encoding": "utf-8-sig"}),
        ("list.csv", {"delimiter": ";"}),
        ("list.TSV", {"delimiter": "\t"}),
        ("list.csv", {"lineterminator": "\n", "quoting": csv.QUOTE_ALL}),
    ],
)
def test_the_usual_kinds_of_csv_are_read(songs, name, options):
    add(songs, "a.wav")
    row = {"filename": "a.wav", "tags": "pop, slow", "lyrics": 'say "hi"; bye\nend\u2028ed'}
    _, prepared = prepare(write_csv(songs / name, [row], **options))
    assert prepared["a"]["tags"] == ["pop", "slow"]
    assert prepared["a"]["norm_lyrics"] == 'say "hi"; bye\nend\ned'


def test_only_line_ends_end_the_rows_of_a_csv(songs):
    add(songs, "a.wav")
    (songs / "list.csv").write_text(
        "filename,tags,lyrics\na.wav,pop,end\u2028ed\x0cagain\n", encoding="utf-8"
    )
    # They end lines of lyrics, though.
    assert prepare(songs / "list.csv")[1]["a"]["norm_lyrics"] == "end\ned\nagain"


def test_json_lines_become_a_dataset(songs):
    add(songs, "a.wav")
    add(songs, "b.wav")
    rows = [
        {
            "keys": 7,
            "audio": "a.wav",
            "tags": ["pop, soft", " slow ", "", 1980],
            "recaption": {"x": "X", "y": None},
        },
        {"path": "b.wav", "prompt": "rock", "lyrics": None, "recaption_x": "Y"},
    ]
    summary, prepared = prepare(write_jsonl(songs / "list.jsonl", rows))
    assert prepared["7"]["tags"] == ["pop, soft", "slow", "1980"]
    assert [row_recaption(prepared[key]) for key in ("7", "b")] == [{"x": "X"}, {"x": "Y"}]
    assert summary.warnings == []


def test_columns_that_are_not_used_are_named(songs):
    add(songs, "a.wav")
    rows = [{"filename": "a.wav", "tags": "pop", "prompt": "rock", "mood": "calm"}]
    summary, prepared = prepare(write_csv(songs / "list.csv", rows))
    assert prepared["a"]["tags"] == ["pop"]
    assert len(summary.warnings) == 2
    assert "'prompt'" in summary.warnings[0]
    assert "'mood'" in summary.warnings[1]


def test_one_audio_file_in_several_rows_is_stored_once(songs):
    add(songs, "a.wav")
    rows = [
        {"key": key, "filename": name, "tags": "x"} for key, name in (("1", "a.wav"), ("2", "sub/../a.wav"))
    ]
    summary, prepared = prepare(write_csv(songs / "list.csv", rows))
    assert prepared["1"]["filename"] == prepared["2"]["filename"] == "audio/a.wav"
    assert os.listdir(os.path.join(summary.output_dir, "audio")) == ["a.wav"]


def test_files_of_one_name_from_several_folders_do_not_collide(songs, tmp_path):
    add(songs, "a.wav")
    rows = [{"key": "0", "filename": "a.wav", "tags": "x"}]
    for number in ("1", "2"):
        add(tmp_path / number, "a.wav", audio=number.encode())
        rows.append({"key": number, "filename": f"../{number}/a.wav", "tags": "x"})
    summary, prepared = prepare(write_csv(songs / "list.csv", rows))
    contents = [stored_file(summary, prepared[key]["filename"]).read_bytes() for key in ("0", "1", "2")]
    assert contents == [b"audioa.wav", b"1a.wav", b"2a.wav"]
    assert {row["filename"] for row in prepared.values()} == {"audio/a.wav", "audio/a-2.wav", "audio/a-3.wav"}


def test_every_problem_of_a_table_is_listed_with_its_row(songs):
    add(songs, "a.wav")
    (songs / "folder").mkdir()
    lines = [
        '{"filename": "a.wav", "keys": "k", "tags": "x"}',
        '{"filename": "a.wav", "keys": "k", "tags": "x"}',
        '{"filename": "none.wav", "tags": "x"}',
        '{"tags": "x"}',
        "{",
        "",
        "[]",
        '{"filename": "folder", "tags": ["x", true]}',
        '{"filename": "a.wav", "keys": "s", "tags": "x", "speaker_emb_path": "none.pt"}',
        '{"filename": "a.wav", "keys": "r", "tags": "x", "recaption": ["x"], "lyrics": "\\ud800"}',
        json.dumps({"filename": "x" * 5000, "tags": "x"}),
    ]
    table = songs / "list.jsonl"
    table.write_text("\n".join(lines))
    message = refusal(table).splitlines()
    for expected in (
        ("line 1 (a.wav), list.jsonl, line 2 (a.wav)", "duplicate key 'k'"),
        ("line 3", "none.wav", "does not exist"),
        ("line 4", "names no audio file"),
        ("line 5", "not JSON"),
        ("line 7", "not a JSON object"),
        ("line 8", "not a file"),
        ("line 8", "tags holds bool"),
        ("line 9", "none.pt", "does not exist"),
        ("line 10", "its recaption is not an object"),
        ("line 10", "norm_lyrics", "surrogate"),
        ("line 11", "does not exist"),
    ):
        assert any(all(part in line for part in expected) for line in message), expected
    assert "11 problems" in message[0]


def test_a_csv_row_with_too_many_cells_is_a_problem(songs):
    add(songs, "a.wav")
    (songs / "list.csv").write_text("filename,tags\na.wav,pop,slow\n")
    assert "row 1: more cells than the header" in refusal(songs / "list.csv")


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
@pytest.mark.parametrize("content", ["", "\n", "filename,tags\n"])
def test_a_table_without_rows_is_refused(songs, name, content):
    (songs / name).write_text(content if name.endswith("csv") else content.replace("filename,tags", ""))
    assert "no songs" in refusal(songs / name)


# --- repeats and splits


def test_repeats_have_keys_of_their_own_and_share_the_audio(songs):
    add(songs, "a.wav")
    add(songs, "b.wav")
    summary, rows = prepare(songs, repeat_count=3)
    assert sorted(rows) == ["a_0001", "a_0002", "a_0003", "b_0001", "b_0002", "b_0003"]
    assert {row["filename"] for row in rows.values()} == {"audio/a.wav", "audio/b.wav"}
    assert (summary.songs, summary.rows) == (2, 6)


def test_a_duplicate_key_is_listed_once_however_often_songs_repeat(songs):
    add(songs, "a.wav")
    table = write_csv(songs / "list.csv", [{"key": "k", "filename": "a.wav", "tags": "x"}] * 2)
    assert refusal(table, repeat_count=5).count("duplicate key") == 1


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.01, (7, 1)), (0.25, (6, 2)), (0.5, (4, 4)), (0.99, (1, 7))]
)
def test_a_test_split_takes_its_share_and_never_none_or_all(songs, fraction, expected):
    for name in "abcdefgh":
        add(songs, f"{name}.wav")
    summary, train = prepare(songs, test_fraction=fraction)
    test = open_dataset(summary.output_dir, "test")
    assert (len(train), len(test)) == expected == (summary.splits["train"], summary.splits["test"])
    assert set(train) | set(test["keys"]) == set("abcdefgh")


def test_the_seed_chooses_the_test_songs(songs):
    for name in "abcdefgh":
        add(songs, f"{name}.wav")
    chosen = [frozenset(prepare(songs, test_fraction=0.5, seed=seed)[1]) for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1


def test_the_repeats_of_a_song_stay_in_one_split(songs):
    for name in "abcd":
        add(songs, f"{name}.wav")
    summary, _ = prepare(songs, test_fraction=0.5, repeat_count=3)
    splits = defaultdict(set)
    for split, dataset in load_from_disk(summary.output_dir).items():
        for row in dataset:
            splits[row["filename"]].add(split)
    assert sorted(map(sorted, splits.values())) == [["test"], ["test"], ["train"], ["train"]]


def test_one_song_cannot_be_split(songs):
    add(songs, "a.wav")
    assert "one song cannot be split" in refusal(songs, test_fraction=0.5, repeat_count=4)


# --- where it is read from and written to


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("repeat_count", 0),
        ("repeat_count", -1),
        ("test_fraction", 1.0),
        ("test_fraction", -0.1),
        ("test_fraction", float("nan")),
    ],
)
def test_settings_out_of_range_are_named(songs, setting, value):
    add(songs, "a.wav")
    add(songs, "b.wav")
    assert f"--{setting}" in refusal(songs, **{setting: value})


def test_a_source_that_is_no_folder_and_no_table_is_refused(songs):
    assert "does not exist" in refusal(songs / "none")
    assert "neither a folder nor a table" in refusal(add(songs, "a.wav"))
    os.mkfifo(songs / "pipe.csv")
    assert "neither a folder nor a table" in refusal(songs / "pipe.csv")


@pytest.mark.parametrize("output", ["songs", "songs/set", "."])
def test_a_dataset_inside_its_songs_or_the_reverse_is_refused(songs, output):
    add(songs, "a.wav")
    assert "inside each other" in refusal(songs, songs.parent / output)


def test_a_table_may_lie_beside_the_dataset(songs):
    add(songs, "a.wav")
    table = write_csv(songs / "list.csv", [{"filename": "a.wav", "tags": "x"}])
    assert prepare(table)[0].output_dir == str(songs / "set")


@pytest.mark.parametrize("name", ["notes.txt", "audio/a.wav", "state.json"])
def test_a_directory_with_other_peoples_files_is_refused(songs, name):
    add(songs, "a.wav")
    (songs.parent / "set" / name).parent.mkdir(parents=True)
    (songs.parent / "set" / name).write_text("mine")
    message = refusal(songs)
    assert "did not write" in message
    assert name.partition("/")[0] in message


def test_a_file_in_the_place_of_the_dataset_is_refused(songs):
    add(songs, "a.wav")
    (songs.parent / "set").write_text("mine")
    assert "--output_dir is a file" in refusal(songs)


def test_an_empty_directory_is_written_to(songs):
    add(songs, "a.wav")
    (songs.parent / "set").mkdir()
    assert list(prepare(songs)[1]) == ["a"]


def test_an_earlier_dataset_is_replaced_whole(songs):
    add(songs, "a.wav")
    add(songs, "b.wav")
    prepare(songs, test_fraction=0.5)
    (songs / "b.wav").unlink()
    summary, rows = prepare(songs)
    assert list(rows) == ["a"]
    files = {path.name for path in songs.parent.glob("set/**/*")} - {"audio"}
    assert files == {"a.wav", "prepare.json", "state.json", "dataset_info.json", "data-00000-of-00001.arrow"}
    assert {path.name for path in songs.parent.iterdir()} == {"songs", "set"}
    assert summary.splits == {"train": 1}


def test_a_file_that_was_put_into_an_earlier_dataset_is_not_deleted(songs):
    add(songs, "a.wav")
    prepare(songs)
    (songs.parent / "set" / "features").mkdir()
    assert "features" in refusal(songs)


def test_the_same_songs_give_the_same_dataset(songs):
    for name in "abc":
        add(songs, f"{name}.wav")
    prepare(songs, test_fraction=0.4)
    first = tree(songs.parent / "set")
    prepare(songs, test_fraction=0.4)
    assert tree(songs.parent / "set") == first


def test_audio_is_copied_where_it_cannot_be_linked(songs, monkeypatch):
    def refuse(*_):
        raise OSError("another file system")

    original = add(songs, "a.wav")
    monkeypatch.setattr(os, "link", refuse)
    summary, rows = prepare(songs)
    stored = stored_file(summary, rows["a"]["filename"])
    assert stored.read_bytes() == original.read_bytes()
    assert stored.stat().st_ino != original.stat().st_ino


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_earlier_dataset(songs, monkeypatch, failure):
    add(songs, "a.wav")
    prepare(songs)
    before = tree(songs.parent / "set")
    add(songs, "b.wav")

    def fail(*_):
        raise failure

    monkeypatch.setattr("acestep_ray.data.dataset_folder.link_or_copy", fail)
    with pytest.raises(DiskFullError if isinstance(failure, OSError) else KeyboardInterrupt) as caught:
        prepare(songs)
    assert tree(songs.parent / "set") == before
    assert {path.name for path in songs.parent.iterdir()} == {"songs", "set"}
    if isinstance(failure, OSError):
        assert "No space left" in str(caught.value)


def test_a_failure_between_the_renames_puts_the_earlier_dataset_back(songs, monkeypatch):
    add(songs, "a.wav")
    prepare(songs)
    before = tree(songs.parent / "set")
    rename = type(songs).rename
    monkeypatch.setattr(swap, "_exchange", lambda *_: False)  # as on a file system that cannot

    def fail_for_the_new_one(path, target):
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(type(songs), "rename", fail_for_the_new_one)
    with pytest.raises(InputError, match="Input/output error"):
        prepare(songs)
    assert tree(songs.parent / "set") == before


def test_a_run_after_a_kill_clears_what_was_left(songs):
    add(songs, "a.wav")
    prepare(songs)
    for left in (".set.partial", ".set.previous"):
        (songs.parent / left / "audio").mkdir(parents=True)
        (songs.parent / left / "audio" / "old.wav").write_bytes(b"x")
    summary, _ = prepare(songs)
    assert {path.name for path in songs.parent.iterdir()} == {"songs", "set"}
    assert os.listdir(os.path.join(summary.output_dir, "audio")) == ["a.wav"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user"
)
@pytest.mark.parametrize("output", ["closed", "closed/set"])
def test_an_output_that_may_not_be_written_is_refused(songs, output):
    add(songs, "a.wav")
    (songs.parent / "closed").mkdir(mode=0)
    with pytest.raises(InputError) as caught:
        prepare_dataset(PrepareConfig(data_dir=str(songs), output_dir=str(songs.parent / output)))
    (songs.parent / "closed").chmod(0o700)
    assert "Permission denied" in str(caught.value)


def test_an_output_below_a_file_is_refused(songs):
    add(songs, "a.wav")
    (songs.parent / "file").write_text("mine")
    assert "cannot write here" in refusal(songs, songs.parent / "file" / "set")


def test_missing_parents_of_the_output_are_made(songs):
    add(songs, "a.wav")
    output = songs.parent / "deep" / "er" / "set"
    prepare_dataset(PrepareConfig(data_dir=str(songs), output_dir=str(output)))
    assert len(open_dataset(output)) == 1
