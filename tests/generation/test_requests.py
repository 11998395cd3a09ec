from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from acestep_ray.data.lyrics import LyricTokenizer, build_tiny_vocabulary
from acestep_ray.errors import InputError
from acestep_ray.generation.requests import (
    check_lyrics,
    is_name,
    parse_seeds,
    songs_of_file,
    songs_of_flags,
)
from acestep_ray.generation.song import together
from tests.generation.conftest import song

SPEAKER_DIM = 512


@pytest.fixture
def batch(config, tmp_path):
    """Gives the songs of rows, or of lines that are text."""

    def read(*rows, **flags):
        path = tmp_path / "songs.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        return songs_of_file(path, replace(config, **flags), SPEAKER_DIM)

    return read


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> LyricTokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.json"
    build_tiny_vocabulary(path)
    return LyricTokenizer.from_file(path)


def test_flags_make_a_song_for_each_seed(config):
    (one,) = songs_of_flags(config, "song", SPEAKER_DIM).songs
    assert (one.name, one.seed, one.frames, one.lyrics) == ("song", 0, 21, "[verse]\nhello there")
    three = songs_of_flags(replace(config, seed="3,1, 2"), "song", SPEAKER_DIM).songs
    assert [(song.name, song.seed) for song in three] == [
        ("song-seed3", 3),
        ("song-seed1", 1),
        ("song-seed2", 2),
    ]


@pytest.mark.parametrize(
    ("value", "seeds"),
    [(7, [7]), ("7", [7]), ("1, 2,3", [1, 2, 3]), ([4, 5], [4, 5]), (2**63 - 1, [2**63 - 1])],
)
def test_seeds_are_a_number_a_list_or_a_text_with_commas(value, seeds):
    assert parse_seeds(value) == seeds


@pytest.mark.parametrize(
    "value", ["", "1,,2", "one", "1.5", [], [1.5], [True], [[1]], -1, "-1", 2**63, "1,1", [2, 2]]
)
def test_other_seeds_are_refused(value):
    with pytest.raises(InputError, match="seed"):
        parse_seeds(value)


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("duration", 0.0, "from 1 to 240 seconds"),
        ("duration", 10_000.0, "from 1 to 240 seconds"),
        ("duration", -5.0, "from 1 to 240 seconds"),
        ("duration", math.nan, "not a finite number"),
        ("duration", math.inf, "not a finite number"),
        ("duration", 0.01, "shorter than one latent frame"),
        ("infer_steps", 0, "at least one step"),
        ("guidance_scale", math.nan, "not a finite number"),
        ("omega", math.inf, "not a finite number"),
        ("shift", 0.0, "above 0"),
        ("scheduler", "dpm", "euler, heun, pingpong"),
        ("seed", "1,x", "not a list of seeds"),
        ("lyrics", "missing.txt", "no such file"),
        ("speaker_emb_path", "missing.npy", "does not exist"),
        ("prompt", "caf\udce9", "not Unicode text"),
        ("lyrics", "caf\udce9", "not Unicode text"),
    ],
)
def test_a_wrong_flag_is_named_with_its_value(config, flag, value, told):
    with pytest.raises(InputError, match=told) as raised:
        songs_of_flags(replace(config, **{flag: value}), "song", SPEAKER_DIM)
    assert f"--{flag} {value}" in str(raised.value)


def test_a_language_that_is_not_supported_is_detected_and_told_once(config, batch, capsys):
    request = songs_of_flags(replace(config, language="tlh"), "song", SPEAKER_DIM)
    assert request.songs[0].language is None
    request.show_warnings()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("warning: lyrics in the language 'tlh' are not supported")
    rows = batch({"language": "tlh"}, {"language": "tlh"}, {"language": "zh-CN"})
    assert [song.language for song in rows.songs] == [None, None, "zh"]
    assert len(rows.warnings) == 1


@pytest.mark.parametrize(
    ("flag", "value"), [("lyrics", "song.lrc"), ("prompt", "tags.txt"), ("lyrics", "words/one")]
)
def test_the_name_of_a_missing_file_is_not_sung(config, batch, flag, value):
    with pytest.raises(InputError, match="no such file"):
        songs_of_flags(replace(config, **{flag: value}), "song", SPEAKER_DIM)
    with pytest.raises(InputError, match=f"line 1: `{flag}`: no such file"):
        batch({flag: value})


def test_lyrics_are_read_and_what_was_changed_is_told(config, batch, tmp_path):
    typed = songs_of_flags(replace(config, lyrics=r"[verse]\none\ntwo"), "song", SPEAKER_DIM)
    assert typed.songs[0].lyrics == "[verse]\none\ntwo"
    assert typed.warnings == [r"lyrics: 2 typed \n read as line ends"]
    (tmp_path / "a.lrc").write_text("[ti:x]\n[00:12.34]hello\n[00:13.34]there", encoding="utf-16")
    (tmp_path / "tags.txt").write_bytes(b"jazz,\r\nslow\r\n")
    rows = batch(
        {"lyrics": "a.lrc", "name": "a", "prompt": "tags.txt"}, {"lyrics": "[00:12.34]one", "name": "b"}
    )
    assert [song.lyrics for song in rows.songs] == ["hello\nthere", "one"]
    assert rows.songs[0].prompt == "jazz, slow"
    assert rows.warnings == [
        "lyrics of 1 song (a): 1 line of LRC metadata removed",
        "lyrics of 2 songs (a, b): times of 3 lines removed",
    ]


def test_lyrics_that_the_model_cannot_sing_are_an_error_or_a_warning(config, batch, tokenizer):
    thai = songs_of_flags(replace(config, lyrics="คืนนี้ฝนตกหนัก"), "song", SPEAKER_DIM)
    with pytest.raises(InputError, match=r"cannot sing these lyrics(.|\n)*100 % (.|\n)*\(Thai\)"):
        check_lyrics(thai, tokenizer, False, where="--lyrics")
    assert check_lyrics(thai, tokenizer, True, where="--lyrics").warnings == [
        "100 % of the lyrics' tokens are unknown to the model (Thai)"
    ]
    rows = batch(
        {"lyrics": "hello there, hello, כל בני"},
        {"lyrics": "hello"},
        {"lyrics": "hello there, hello, כל בני"},
    )
    (warning,) = check_lyrics(rows, tokenizer, False, where="--batch_path").warnings
    assert warning.startswith("line 1: ")
    assert warning.endswith("unknown to the model (Hebrew)")


@pytest.mark.parametrize(("name", "language"), [("German", "de"), ("unknown", None), ("jpn", "ja")])
def test_a_language_is_a_code_or_a_name(config, name, language):
    assert songs_of_flags(replace(config, language=name), "song", SPEAKER_DIM).songs[0].language == language


def test_nonsense_is_no_language(config):
    with pytest.raises(InputError, match="no language is called 'xx'"):
        songs_of_flags(replace(config, language="xx"), "song", SPEAKER_DIM)


def test_a_row_sets_what_it_names_and_the_flags_the_rest(batch, tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words/one.txt").write_text("from a file", encoding="utf-8")
    np.save(tmp_path / "voice.npy", np.full(SPEAKER_DIM, 0.5, np.float32))
    first, second, third = batch(
        {
            "prompt": "jazz",
            "lyrics": "words/one.txt",
            "duration": 3,
            "name": "a/b",
            "speaker_emb_path": "voice.npy",
        },
        "",
        {"seed": 4, "infer_steps": 9, "guidance_scale": 1, "scheduler": "heun", "omega": 0, "shift": 1.5},
        {"prompt": None, "lyrics": "la\nla", "language": "fr"},
        omega=7.0,
    ).songs
    assert (first.prompt, first.lyrics, first.frames, first.name) == ("jazz", "from a file", 32, "a/b")
    assert first.speaker == [0.5] * SPEAKER_DIM
    assert (first.seed, first.infer_steps, first.omega, first.line) == (0, 3, 7.0, 1)
    assert (second.prompt, second.name, second.line, second.seed) == ("pop, piano", "0003", 3, 4)
    assert second.sampled_with == (21, 9, 1.0, "heun", 0.0, 1.5)
    assert (third.prompt, third.lyrics, third.language) == ("pop, piano", "la\nla", "fr")


def test_a_row_with_several_seeds_makes_several_songs(batch):
    songs = batch({"name": "x", "seed": [1, 2]}, {"name": "y", "seed": "3"}, {"name": "z"}, seed="8,9").songs
    assert [(song.name, song.seed) for song in songs] == [
        ("x-seed1", 1),
        ("x-seed2", 2),
        ("y", 3),
        ("z-seed8", 8),
        ("z-seed9", 9),
    ]


WRONG_ROWS = [
    ('{"prompt": ', "not JSON"),
    ("[1]", "not a JSON object"),
    ({"promt": "pop"}, "`promt` is unknown"),
    ({"prompt": 5}, "`prompt` is 5, and has to be text"),
    ({"duration": "long"}, '`duration` is "long", and has to be a number'),
    ({"duration": True}, "`duration` is true"),
    ({"infer_steps": 2.5}, "`infer_steps` is 2.5, and has to be a whole number"),
    ('{"duration": NaN}', "`duration`: not a finite number"),
    ('{"omega": 1%s}' % ("0" * 400), "`omega`: not a finite number"),
    ({"duration": 0}, "`duration`: out of range"),
    ({"seed": [1, "x"]}, "`seed`: not a list of seeds"),
    ({"scheduler": "dpm"}, "`scheduler`: unknown scheduler"),
    ({"lyrics": "words.txt"}, "`lyrics`: no such file"),
    ({"prompt": "\ud83c"}, "`prompt`: not Unicode text"),
    ({"speaker_emb_path": "voice.pt"}, "`speaker_emb_path`: the speaker embedding does not exist"),
    ({"name": "../up"}, '`name` is "../up", and has to name a file within the output folder'),
    ({"name": "first"}, "`first` is the name of a song of line 1 already"),
    ({"name": "second-seed1"}, "`second-seed1` is the name of a song of line 2 already"),
]


def test_every_line_that_is_wrong_is_listed_with_its_number(batch):
    good = [{"name": "first"}, {"name": "second", "seed": [1, 2]}]
    with pytest.raises(InputError) as raised:
        batch(*good, *(row for row, _ in WRONG_ROWS))
    told = str(raised.value).splitlines()
    assert told[0].startswith(f"{len(WRONG_ROWS)} mistakes in the songs")
    for number, (line, (_, wrong)) in enumerate(zip(told[1:-1], WRONG_ROWS, strict=True), start=3):
        assert line.startswith(f"  - line {number}: {wrong}")


def test_a_line_with_several_mistakes_tells_them_all(batch):
    with pytest.raises(InputError, match=r"line 1: `duration`(?s:.*)line 1: `omega`"):
        batch({"duration": 1e9, "omega": math.inf})


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe{}"])
def test_a_file_without_songs_is_refused(config, tmp_path, content):
    path = tmp_path / "songs.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"--batch_path .*songs\.jsonl"):
        songs_of_file(path, config, SPEAKER_DIM)
    with pytest.raises(InputError, match="cannot read the songs"):
        songs_of_file(tmp_path, config, SPEAKER_DIM)


@pytest.mark.parametrize("name", ["song", "a/b c", "01. Größe", "日本"])
def test_names_of_files_are_names(name):
    assert is_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "/a",
        "../a",
        "a/../b",
        "a//b",
        "a/",
        ".hidden",
        "a/.b",
        "a\\b",
        "a\nb",
        "a\0",
        "c:x",
        "x" * 300,
    ],
)
def test_names_that_leave_the_folder_or_are_no_files_are_not(name):
    assert not is_name(name)


def test_a_long_line_of_lyrics_is_no_file(config):
    (made,) = songs_of_flags(replace(config, lyrics="la " * 300), "song", SPEAKER_DIM).songs
    assert made.lyrics == "la " * 300


def test_songs_of_one_length_and_sampling_go_together():
    songs = [
        song(name="a"),
        song(name="b", frames=30),
        song(name="c", prompt="rock", lyrics="words", seed=9),
        song(name="d", scheduler="heun"),
        song(name="e"),
    ]
    assert [[one.name for one in group] for group in together(songs, 2)] == [["a", "c"], ["b"], ["d"], ["e"]]
    assert [len(group) for group in together(songs, 1)] == [1] * 5
