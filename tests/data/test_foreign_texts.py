"""Folders, tables and datasets as other trainers and libraries keep them, through `prepare` and read directly."""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, Dataset, DatasetDict, load_from_disk
from pyarrow import feather

from acestep_ray.cache.songs import Song
from acestep_ray.config import PrepareConfig
from acestep_ray.data.prepare import PrepareSummary, prepare_dataset
from acestep_ray.data.prompts import prompt_variants
from acestep_ray.data.songs import SongTable
from acestep_ray.errors import InputError

LYRICS = "[verse]\nThe night is long"


@pytest.fixture
def songs(tmp_path):
    """An empty folder for songs."""
    (tmp_path / "songs").mkdir()
    return tmp_path / "songs"


def add(folder, *files: str) -> None:
    """Audio files, which are not decoded here."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def write(folder, texts: dict[str, object]) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")


def prepare(source, **settings) -> tuple[PrepareSummary, dict[str, dict]]:
    """The summary, and what rows hold by key, empty values left out."""
    output = source.parent / "set"
    summary = prepare_dataset(PrepareConfig(data_dir=str(source), output_dir=str(output), **settings))
    rows = {row["keys"]: filled(row) for row in load_from_disk(str(output))}
    return summary, rows


def filled(row: dict) -> dict:
    row = {**row, "recaption": {name: text for name, text in (row.get("recaption") or {}).items() if text}}
    return {name: value for name, value in row.items() if value not in ("", None, [], {}) and name != "keys"}


def prompts(row: dict) -> list[str]:
    """What ACE-Step v1 is prompted with for a row."""
    song = Song.from_row({"keys": "k", "filename": "", **row})
    return [each.text for each in prompt_variants(song.tags, song.recaption, key="k", shuffles=4, seed=0)]


def wav(frequency: float = 200.0) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, 0.3 * np.sin(np.arange(4410) * frequency / 7000), 44100, format="WAV")
    return content.getvalue()


# --- texts beside songs


def test_a_folder_of_ace_step_15_is_read(songs):
    add(songs, "a.wav", "b.wav", "c.wav", "d.wav", "e.wav")
    write(
        songs,
        {
            "a.txt": LYRICS,
            "a.json": {
                "caption": "slow pop",
                "bpm": 96,
                "keyscale": "A minor",
                "timesignature": "4",
                "language": "en",
            },
            "b.lyrics.txt": LYRICS,
            "b.caption.txt": "A slow song, with piano.",
            "c.txt": "la la la\nlu lu",
            "d.lyrics.txt": "[Instrumental]",
            "d.json": {"caption": "calm", "is_instrumental": True},
            "e.txt": LYRICS,
            "meta.csv": "File,BPM,Key,Caption\nc.wav,120,C#m,fast rock\n",
        },
    )
    summary, rows = prepare(songs)
    assert summary.layouts == ["5 songs in ACE-Step 1.5's layout"]
    assert rows["a"] == {
        "filename": "audio/a.wav",
        "norm_lyrics": LYRICS,
        "caption": "slow pop",
        "bpm": 96,
        "keyscale": "A minor",
        "timesignature": "4",
        "language": "en",
    }
    assert rows["b"] == {
        "filename": "audio/b.wav",
        "norm_lyrics": LYRICS,
        "caption": "A slow song, with piano.",
    }
    assert rows["c"] == {
        "filename": "audio/c.wav",
        "norm_lyrics": "la la la\nlu lu",
        "caption": "fast rock",
        "bpm": 120,
        "keyscale": "C# minor",
    }
    assert (rows["d"]["instrumental"], rows["d"]["caption"]) == (True, "calm")
    assert rows["e"] == {"filename": "audio/e.wav", "norm_lyrics": LYRICS}
    assert [warning for warning in summary.warnings if "e.wav: no prompt" not in warning] == []


def test_a_folder_of_side_step_is_read(songs):
    add(songs, "x.wav", "y.wav")
    lines = "caption: warm folk\ngenre: folk, guitar\nbpm: 90\nkey: G major\nsignature: 3/4\n"
    write(
        songs,
        {
            "x.txt": f"{lines}is_instrumental: false\nlyrics:\n{LYRICS}\nbpm: sung\n",
            "y.txt": "\ufeffcaption: pad\r\nbpm:\r\nis_instrumental: true\r\nlyrics:\r\n",
        },
    )
    summary, rows = prepare(songs)
    assert summary.layouts == ["2 songs in Side-Step's layout"]
    assert rows["x"] == {
        "filename": "audio/x.wav",
        "tags": ["folk", "guitar"],
        "norm_lyrics": f"{LYRICS}\nbpm: sung",
        "caption": "warm folk",
        "bpm": 90,
        "keyscale": "G major",
        "timesignature": "3",
        "instrumental": False,
    }
    assert rows["y"] == {"filename": "audio/y.wav", "caption": "pad", "instrumental": True}


def test_a_folder_of_ai_toolkit_is_read(songs):
    add(songs, "x.wav")
    write(
        songs,
        {
            "x.txt": f"<CAPTION>\nslow pop\n</CAPTION>\n<LYRICS>\n{LYRICS}\n</LYRICS>\n<BPM>96</BPM>\n"
            "<KEYSCALE>A minor</KEYSCALE>\n<TIMESIGNATURE>4</TIMESIGNATURE>\n<DURATION>5</DURATION>\n"
            "<LANGUAGE>en</LANGUAGE>"
        },
    )
    summary, rows = prepare(songs)
    assert summary.layouts == ["1 song in ai-toolkit's layout"]
    assert rows["x"] == {
        "filename": "audio/x.wav",
        "norm_lyrics": LYRICS,
        "caption": "slow pop",
        "bpm": 96,
        "keyscale": "A minor",
        "timesignature": "4",
        "language": "en",
    }
    assert summary.warnings == []


def test_a_folder_of_this_project_is_read_as_before(songs):
    add(songs, "a.wav", "b.wav", "c.wav")
    write(
        songs,
        {
            "a_prompt.txt": "pop, slow",
            "a_lyrics.txt": LYRICS,
            "b.txt": "rock, loud",
            "b.lyrics": "la",
            "c.txt": "a calm song",
            "c_recaption.json": {"x": "X"},
        },
    )
    summary, rows = prepare(songs)
    assert summary.layouts == ["3 songs in ACE-Step v1's layout"]
    assert rows == {
        "a": {"filename": "audio/a.wav", "tags": ["pop", "slow"], "norm_lyrics": LYRICS},
        "b": {"filename": "audio/b.wav", "tags": ["rock", "loud"], "norm_lyrics": "la"},
        "c": {"filename": "audio/c.wav", "tags": ["a calm song"], "recaption": {"x": "X"}},
    }
    assert summary.warnings == []


def test_a_description_or_json_in_a_plain_text_file_is_no_list_of_tags(songs):
    add(songs, "a.wav", "b.wav")
    text = "A slow, dreamy song with a piano and a warm voice. It feels like rain."
    write(songs, {"a.txt": text, "b.txt": {"caption": "slow", "bpm": 99, "lyrics": "la"}})
    summary, rows = prepare(songs)
    assert rows["a"] == {"filename": "audio/a.wav", "caption": text}
    assert rows["b"] == {"filename": "audio/b.wav", "caption": "slow", "bpm": 99, "norm_lyrics": "la"}
    assert summary.layouts == ["1 song in plain captions (NAME.txt)", "1 song in ACE-Step 1.5's layout"]
    assert prepare(songs, texts="v1")[1]["a"]["tags"][0] == "A slow"


def test_each_kind_of_texts_in_a_folder_has_its_line(songs):
    add(songs, "a.wav", "b.wav", "c.wav")
    write(songs, {"a_prompt.txt": "pop", "b.txt": "caption: x\nlyrics:\nla", "c_prompt.txt": "pop"})
    summary, _ = prepare(songs)
    assert summary.layouts == ["2 songs in ACE-Step v1's layout", "1 song in Side-Step's layout"]
    assert "texts    2 songs in ACE-Step v1's layout" in summary.render()
    assert SongTable.open(songs).layouts == summary.layouts


def test_a_text_that_could_be_either_is_told_with_what_to_pass(songs):
    add(songs, "a.wav")
    write(songs, {"a.txt": "la la la\nlu lu"})
    summary, rows = prepare(songs)
    assert rows["a"]["tags"] == ["la la la", "lu lu"]
    (warning,) = summary.warnings
    assert warning.startswith("a.txt: could be tags or lyrics, and is read as tags")
    assert "--texts v15" in warning
    summary, rows = prepare(songs, texts="v15")
    assert (rows["a"]["norm_lyrics"], "tags" in rows["a"]) == ("la la la\nlu lu", False)
    summary, rows = prepare(songs, texts="v1")
    assert (rows["a"]["tags"], summary.warnings) == (["la la la", "lu lu"], [])
    (song,) = SongTable.open(songs, layout="v15")
    assert song["norm_lyrics"] == "la la la\nlu lu"


def test_a_layout_that_is_asked_for_is_kept_to(songs):
    add(songs, "a.wav")
    write(songs, {"a.txt": "caption: slow\nlyrics:\nla"})
    assert prepare(songs, texts="v1")[1]["a"]["tags"] == ["caption: slow", "lyrics:", "la"]
    assert prepare(songs, texts="caption")[1]["a"]["caption"] == "caption: slow lyrics: la"
    summary, rows = prepare(songs, texts="ai-toolkit")
    assert rows["a"] == {"filename": "audio/a.wav"}
    assert "a.txt: is not in ai-toolkit's layout" in summary.warnings[-1]
    with pytest.raises(InputError, match="--texts is 'v2'"):
        prepare(songs, texts="v2")
    with pytest.raises(InputError, match="--texts is 'v2'"):
        SongTable.open(songs, layout="v2")


def test_values_that_cannot_be_read_are_told_and_left_out(songs):
    add(songs, "a.wav")
    write(songs, {"a.json": {"caption": "x", "bpm": "fast", "keyscale": "H7", "timesignature": "5/4"}})
    summary, rows = prepare(songs)
    assert rows["a"] == {"filename": "audio/a.wav", "caption": "x"}
    for text in ("bpm 'fast' is not one number", "key 'H7' is none", "time signature '5/4'"):
        assert any(text in warning for warning in summary.warnings)


def test_a_json_file_that_was_meant_for_a_song_is_a_problem_if_it_is_damaged(songs):
    add(songs, "a.wav", "b.wav")
    write(songs, {"a.json": '{"caption": "x", ', "b.json": "{not for us"})
    with pytest.raises(InputError, match=r"a\.json: not JSON"):
        prepare(songs)
    (songs / "a.json").unlink()
    summary, _ = prepare(songs)
    assert "b.json: has no field that is known" in " ".join(summary.warnings)


def test_timed_lyrics_beside_a_song_lose_their_times(songs):
    add(songs, "a.wav", "b.wav")
    write(
        songs,
        {
            "a.lrc": "[ti:Song]\n[00:01.00]first\n[00:03.00]second",
            "b.srt": "1\n00:00:01,000 --> 00:00:02,000\nfirst\n\n2\n00:00:02,000 --> 00:00:03,000\nsecond\n",
        },
    )
    _, rows = prepare(songs)
    assert {row["norm_lyrics"] for row in rows.values()} == {"first\nsecond"}


def test_texts_are_paired_by_what_a_person_reads(songs):
    nfc, nfd = (unicodedata.normalize(form, "Café Été") for form in ("NFC", "NFD"))
    add(songs, f"{nfc}.wav", "Song.wav", "x.wav", "X.wav")
    write(
        songs,
        {f"{nfd}_prompt.txt": "chill", f"{nfd}_lyrics.txt": "la", "SONG.TXT": "pop", "x_prompt.txt": "low"},
    )
    _, rows = prepare(songs)
    assert (rows["Café_Été"]["tags"], rows["Café_Été"]["norm_lyrics"]) == (["chill"], "la")
    assert rows["Song"]["tags"] == ["pop"]
    assert rows["x"]["tags"] == ["low"]
    assert "tags" not in rows["X"]
    table = songs / "t.csv"
    table.write_text(f"filename,tags\n{nfd}.wav,chill\nSONG.WAV,pop\n", encoding="utf-8")
    assert {row["filename"] for row in prepare(table)[1].values()} == {f"audio/{nfc}.wav", "audio/Song.wav"}


def test_a_file_that_only_looks_like_the_one_that_is_named_is_shown_as_different(songs):
    add(songs, "song b.wav")
    table = songs / "t.csv"
    table.write_text("filename\nsong\u00a0b.wav\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"song\\xa0b\.wav looks like song b\.wav"):
        prepare(table)


# --- prompts of ACE-Step v1


def test_a_caption_without_tags_is_the_one_prompt():
    assert prompts({"tags": [], "caption": "slow pop"}) == ["slow pop"]
    assert prompts({"tags": ["a"], "caption": "slow pop"}) == ["a"]
    assert prompts({"tags": [], "caption": "slow pop", "recaption": {"x": "X"}}) == ["slow pop", "X"]
    assert prompts({"tags": []}) == ["music"]


def test_tempo_and_key_join_the_tags_if_that_is_asked_for(songs):
    add(songs, "a.wav", "b.wav")
    write(
        songs,
        {"a.txt": "genre: pop\nbpm: 96\nkey: Am\nlyrics:\nla", "b.json": {"caption": "slow", "bpm": 90}},
    )
    assert prepare(songs)[1]["a"]["tags"] == ["pop"]
    rows = prepare(songs, tag_metas=True)[1]
    assert rows["a"]["tags"] == ["pop", "96 bpm", "A minor"]
    assert prompts(rows["b"]) == ["slow, 90 bpm"]
    direct = {row["keys"]: row for row in SongTable.open(songs, tag_metas=True)}
    assert direct["a"]["tags"] == ["pop", "96 bpm", "A minor"]
    prepared = SongTable.open(songs.parent / "set", tag_metas=True)
    assert prepared.row(0)["tags"] == ["pop", "96 bpm", "A minor"]  # none twice


# --- tables


def test_an_audiofolder_of_hugging_face_is_read(songs):
    add(songs, "train/x.wav", "train/y.wav", "z.wav")
    write(
        songs,
        {
            "train/metadata.jsonl": '{"file_name": "x.wav", "text": "calm piano"}\n'
            '{"file_name": "y.wav", "caption": "loud", "tags": ["rock"], "lyrics": "la"}\n'
            '{"file_name": "gone.wav", "text": "x"}\n',
            "z_prompt.txt": "pop",
        },
    )
    summary, rows = prepare(songs)
    assert summary.layouts == [
        "2 songs in a Hugging Face audiofolder (train/metadata.jsonl)",
        "1 song in ACE-Step v1's layout",
    ]
    assert rows == {
        "train_x": {"filename": "audio/train/x.wav", "caption": "calm piano"},
        "train_y": {
            "filename": "audio/train/y.wav",
            "caption": "loud",
            "tags": ["rock"],
            "norm_lyrics": "la",
        },
        "z": {"filename": "audio/z.wav", "tags": ["pop"]},
    }
    assert summary.warnings == ["train/metadata.jsonl: 1 rows name no audio file of the folder (gone.wav)"]
    assert {row["caption"] for row in prepare_table(songs / "train" / "metadata.jsonl", gone=True)} == {
        "calm piano",
        "loud",
    }


def prepare_table(table, gone: bool) -> list[dict]:
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join(lines[: -1 if gone else None]), encoding="utf-8")
    return list(prepare(table)[1].values())


def test_a_table_in_a_folder_wins_over_the_files_beside_a_song(songs):
    add(songs, "a.wav")
    write(
        songs, {"metadata.csv": "file_name,caption\na.wav,from the table\n", "a.caption.txt": "from the file"}
    )
    summary, rows = prepare(songs)
    assert rows["a"]["caption"] == "from the table"
    assert "differ in caption" in summary.warnings[0]


def test_a_feature_cache_and_strange_tables_in_a_folder_are_no_texts(songs):
    add(songs, "a.wav")
    write(songs, {"a_prompt.txt": "pop", "notes.csv": "day,mood\n1,ok\n", "package.json": {"name": "x"}})
    write(songs, {"a.info.json": {"description": "a video", "path": "a.wav"}, "broken.csv": "filename\n\0"})
    (songs / "cache").mkdir()
    pq.write_table(pa.table({"filename": ["a.wav"], "tags": ["cached"]}), songs / "cache" / "rows.parquet")
    summary, rows = prepare(songs)
    assert rows == {"a": {"filename": "audio/a.wav", "tags": ["pop"]}}
    assert summary.warnings == []


OFFICIAL = {
    "metadata": {"custom_tag": "ohwx", "tag_position": "prepend", "genre_ratio": 0, "all_instrumental": False},
    "samples": [
        {
            "id": "1",
            "audio_path": "C:\\music\\x.wav",
            "filename": "x.wav",
            "caption": "slow pop",
            "genre": "pop",
            "lyrics": LYRICS,
            "raw_lyrics": "raw",
            "formatted_lyrics": "formatted",
            "bpm": 96,
            "keyscale": "A minor",
            "timesignature": "4",
            "duration": 5,
            "language": "en",
            "is_instrumental": False,
            "custom_tag": "ohwx",
            "labeled": True,
            "prompt_override": None,
        },
        {"audio_path": "./songs/y.wav", "filename": "y.wav", "caption": "", "lyrics": "[Instrumental]",
         "bpm": None, "keyscale": "", "language": "unknown", "is_instrumental": True},
    ],
}  # fmt: skip


@pytest.mark.parametrize("direct", [True, False])
def test_the_dataset_json_of_ace_step_15_is_read(songs, direct):
    add(songs, "sub/x.wav", "y.wav")
    write(songs, {"dataset.json": OFFICIAL})
    summary, rows = prepare(songs / "dataset.json" if direct else songs)
    assert summary.layouts[0].startswith("2 songs in ACE-Step 1.5's dataset JSON")
    assert summary.warnings == []
    assert rows["sub_x"] == {
        "filename": "audio/sub/x.wav",
        "tags": ["ohwx", "pop"],
        "norm_lyrics": LYRICS,
        "caption": "ohwx, slow pop",
        "bpm": 96,
        "keyscale": "A minor",
        "timesignature": "4",
        "language": "en",
        "instrumental": False,
    }
    assert rows["y"]["caption"] == "ohwx"
    assert rows["y"]["instrumental"] is True


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"sep=;\r\nfilename;tags;bpm\r\na.wav;pop, slow;96,5\r\n"),
        ("t.csv", b"\xef\xbb\xbffile|prompt|bpm\na.wav|pop, slow|96\n"),
        ("t.csv", 'Path,Genre,Tempo\na.wav,"pop, slow",96 bpm\n'.encode("utf-16")),
        ("t.tsv", b"audio_path\ttags\tBPM\na.wav\tpop, slow\t96.0\n"),
        ("t.json", b'[{"path": "a.wav", "tags": ["pop", "slow"], "bpm": 96}]'),
        ("t.json", b'{"songs": [{"path": "a.wav", "tags": "pop, slow", "bpm": "96"}]}'),
        ("t.json", b'{"path": "a.wav", "tags": "pop, slow", "bpm": "96"}\n{"path": "b.wav"}'),
        (
            "t.jsonl",
            b'\xef\xbb\xbf[{"audio": {"path": "a.wav"}, "tags": "[\'pop\', \'slow\']", "bpm": 96.0}]',
        ),
        ("t.jsonl", '{"audio_filepath": "a.wav", "tags": "pop, slow", "bpm": 96}'.encode("utf-16")),
        ("t.csv", b'file name,tags,bpm\na.wav,"[""pop"", ""slow""]",96\n'),
    ],
)
def test_tables_are_read_however_they_are_written(songs, name, content):
    add(songs, "a.wav", "b.wav")
    (songs / name).write_bytes(content)
    _, rows = prepare(songs / name)
    assert (rows["a"]["tags"], rows["a"]["bpm"]) == (["pop", "slow"], 96)


@pytest.mark.parametrize("name", ["t.parquet", "t.feather"])
def test_tables_of_parquet_and_arrow_are_read(songs, name):
    add(songs, "a.wav", "b.wav")
    table = pa.table({"file_name": ["a.wav", "b.wav"], "tags": [["pop"], None], "bpm": [96.0, float("nan")],
                      "lyrics": ["la", None], "year": [1999, 2000]})  # fmt: skip
    if name.endswith("parquet"):
        pq.write_table(table, songs / name)
    else:
        feather.write_feather(table, songs / name)
    summary, rows = prepare(songs / name)
    assert rows["a"] == {"filename": "audio/a.wav", "tags": ["pop"], "norm_lyrics": "la", "bpm": 96}
    assert rows["b"] == {"filename": "audio/b.wav"}
    assert "'year' is not used" in summary.warnings[-1]
    (songs / name).write_bytes(b"PAR1 broken")
    with pytest.raises(InputError, match="is damaged"):
        prepare(songs / name)


def test_cells_without_a_value_are_empty_and_numbers_are_texts(songs):
    add(songs, "a.wav", "7.wav")
    write(
        songs,
        {"t.jsonl": '{"path": "a.wav", "tags": null, "caption": NaN, "lyrics": "nan", "language": "N/A"}\n'
         '{"path": "7.wav", "key": 7, "tags": 1999.0, "lyrics": 99.5}'},
    )  # fmt: skip
    _, rows = prepare(songs / "t.jsonl")
    assert rows["a"] == {"filename": "audio/a.wav"}
    assert rows["7"] == {"filename": "audio/7.wav", "tags": ["1999"], "norm_lyrics": "99.5"}


@pytest.mark.parametrize(
    ("table", "keys", "keyscales"),
    [
        ("filename,key\na.wav,A minor\nb.wav,C major\n", ["a", "b"], ["A minor", "C major"]),
        ("filename,key\na.wav,A minor\nb.wav,A minor\n", ["a", "b"], ["A minor", "A minor"]),
        ("filename,key\na.wav,Am\nb.wav,\n", ["a", "b"], ["A minor", None]),
        ("filename,key,bpm\na.wav,A,90\nb.wav,C,100\n", ["a", "b"], ["A major", "C major"]),
        ("filename,keys,key\na.wav,one,A\nb.wav,two,C\n", ["one", "two"], ["A major", "C major"]),
        ("filename,key\na.wav,A\nb.wav,C\n", ["A", "C"], [None, None]),
        ("filename,key\na.wav,A minor\nb.wav,my song\n", ["A minor", "my song"], [None, None]),
    ],
)
def test_a_column_key_is_a_musical_key_where_it_holds_some(songs, table, keys, keyscales):
    add(songs, "a.wav", "b.wav")
    write(songs, {"t.csv": table})
    _, rows = prepare(songs / "t.csv")
    assert list(rows) == keys
    assert [row.get("keyscale") for row in rows.values()] == keyscales


def test_a_table_that_was_moved_with_its_songs_finds_them(songs):
    add(songs, "album/a.wav", "b.wav")
    write(songs, {"t.csv": "filename,tags\n/old/place/album/a.wav,x\nD:\\songs\\b.wav,y\n"})
    assert {row["filename"] for row in prepare(songs / "t.csv")[1].values()} == {
        "audio/album/a.wav",
        "audio/b.wav",
    }


def test_home_is_expanded_in_a_table(songs, monkeypatch):
    monkeypatch.setenv("HOME", str(songs))
    add(songs, "a.wav")
    (songs / "lists").mkdir()
    write(songs, {"lists/t.csv": "filename,tags\n~/a.wav,x\n"})
    assert prepare(songs / "lists" / "t.csv")[1]["a"]["filename"] == "audio/a.wav"


# --- songs inside other files


def audio_dataset(*names: str | None, **columns) -> Dataset:
    cells = [{"bytes": wav(200 + i), "path": name} for i, name in enumerate(names)]
    return Dataset.from_dict({"audio": cells, **columns}).cast_column("audio", Audio())


def test_a_repository_with_audio_inside_is_unpacked(songs):
    (songs / "data").mkdir()
    (songs / "README.md").write_text("x")
    audio_dataset("one.wav", None, "one.wav", text=["calm", "loud", None]).to_parquet(
        songs / "data" / "0.parquet"
    )
    summary, rows = prepare(songs)
    assert summary.layouts == ["3 songs in a Hugging Face dataset with audio inside"]
    assert {key: row.get("caption") for key, row in rows.items()} == {
        "one": "calm",
        "000001": "loud",
        "one-2": None,
    }
    assert (songs.parent / "set" / rows["one"]["filename"]).read_bytes() == wav(200)
    assert [path.name for path in songs.parent.iterdir()] == ["set", "songs"] or len(
        list(songs.parent.iterdir())
    ) == 2
    with pytest.raises(InputError, match="inside other files"):
        SongTable.open(songs)
    with pytest.raises(InputError, match="inside other files"):
        SongTable.open(songs / "data" / "0.parquet")
    assert list(prepare(songs / "data" / "0.parquet")[1]) == list(rows)


def test_a_saved_dataset_with_audio_inside_is_unpacked(songs):
    splits = DatasetDict(
        train=audio_dataset("a.wav", tags=[["x"]]), test=audio_dataset("b.wav", tags=[["y"]])
    )
    splits.save_to_disk(str(songs / "saved"))
    summary, rows = prepare(songs / "saved")
    assert summary.layouts == ["2 songs in a Hugging Face dataset with audio inside"]
    assert {key: row["tags"] for key, row in rows.items()} == {"a": ["x"], "b": ["y"]}
    with pytest.raises(InputError, match="inside other files"):
        SongTable.open(songs / "saved")


def test_a_prepared_dataset_can_be_prepared_again(songs):
    add(songs, "a.wav", "b.wav")
    write(songs, {"a.json": {"caption": "slow", "bpm": 90, "lyrics": "la"}, "b_prompt.txt": "pop"})
    output = songs.parent / "set"
    before = prepare_dataset(PrepareConfig(data_dir=str(songs), output_dir=str(output), test_fraction=0.5))
    assert before.splits == {"train": 1, "test": 1}
    again = prepare_dataset(PrepareConfig(data_dir=before.output_dir, output_dir=str(songs.parent / "again")))
    rows = {row["keys"]: filled(row) for row in load_from_disk(again.output_dir)}
    assert (rows["a"]["caption"], rows["a"]["bpm"], rows["b"]["tags"]) == ("slow", 90, ["pop"])
    assert "are one now" in again.warnings[-1]


def test_webdataset_tars_are_unpacked_and_nothing_outside_is_written(songs):
    for shard in range(2):
        with tarfile.open(songs / f"shard-{shard}.tar", "w") as tar:
            for name, content in (
                ("0.wav", wav(200 + shard)),
                ("0.json", b'{"caption": "slow", "lyrics": "la"}'),
                ("0.txt", b"pop, sad"),
                ("../../evil.wav", b"x"),
                ("/evil.wav", b"x"),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("link.wav")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    summary, rows = prepare(songs)
    assert summary.layouts[0] == "4 songs in a WebDataset"
    row = rows["shard-0_0"]
    assert (row["caption"], row["tags"], row["norm_lyrics"]) == ("slow", ["pop", "sad"], "la")
    assert set(rows) == {"shard-0_0", "shard-1_0", "shard-0_evil", "shard-1_evil"}
    assert sorted(path.name for path in songs.parent.iterdir()) == ["set", "songs"]
    assert set(prepare(songs / "shard-0.tar")[1]) == {"0", "evil"}


def test_a_tar_that_is_cut_off_is_a_mistake_and_leaves_nothing(songs):
    with tarfile.open(songs / "a.tar", "w") as tar:
        member = tarfile.TarInfo("0.wav")
        member.size = len(wav())
        tar.addfile(member, io.BytesIO(wav()))
    content = (songs / "a.tar").read_bytes()
    (songs / "a.tar").write_bytes(content[:2000])
    with pytest.raises(InputError, match=r"a\.tar: is damaged"):
        prepare(songs)
    assert [path.name for path in songs.parent.iterdir()] == ["songs"]


@pytest.mark.parametrize(("name", "advice"), [("a.xlsx", "save the table as CSV"), ("a.zip", "unpack it")])
def test_files_that_are_not_read_come_with_advice(songs, name, advice):
    (songs / name).write_bytes(b"PK")
    for read in (prepare, SongTable.open):
        with pytest.raises(InputError, match=advice):
            read(songs / name)
