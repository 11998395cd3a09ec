"""Which songs a model is measured on: such as it was not trained on."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.reader import CacheReader
from acestep_ray.data.lyrics import LyricTokenizer
from acestep_ray.errors import InputError
from acestep_ray.evaluation.candidates import find_candidates
from acestep_ray.evaluation.notes import Notes
from acestep_ray.evaluation.songs import check_lyrics, choose_songs, open_cache
from acestep_ray.storage import Store
from acestep_ray.training.experiment import FINGERPRINTS
from acestep_ray.training.holdout import hold_out
from acestep_ray.training.lora_config import DEFAULT_LORA
from tests.cache.rows import song_row, write_rows
from tests.training.songs import cached_song


@pytest.fixture
def index(tmp_path) -> CacheIndex:
    """Forty songs of as many recordings."""
    rows = [song_row(f"song{i:02}", audio_sha256=f"{i:064}") for i in range(40)]
    return CacheIndex.open(write_rows(Store.at(tmp_path / "forty"), rows))


@pytest.fixture
def run_on(write_run, trained, index):
    """Writes a run that was trained on the forty songs, or on others."""

    def write(name: str, val_songs: int | None, *, same_songs: bool = True):
        run = write_run({10: trained(DEFAULT_LORA)}, DEFAULT_LORA, name=name, val_songs=val_songs)
        noted = json.loads((run / "run.json").read_text())
        noted[FINGERPRINTS["dataset"]] = index.fingerprint if same_songs else "others"
        (run / "run.json").write_text(json.dumps(noted))
        return run

    return write


def choose(settings, checkpoint, index, *models, **changes) -> tuple[list[int], list[str]]:
    config = settings(models=",".join(map(str, models)), dataset_path="forty", **changes)
    notes = Notes()
    return choose_songs(index, find_candidates(config, checkpoint, ExitStack()), config, notes), notes.lines


def held_out(count: int | None) -> list[int]:
    return hold_out([f"{i:064}" for i in range(40)], count).tolist()


@pytest.mark.parametrize("val_songs", [None, 5])
def test_they_are_those_that_the_run_held_out(settings, checkpoint, index, run_on, val_songs):
    chosen, notes = choose(settings, checkpoint, index, "base", run_on("a", val_songs))
    assert chosen == held_out(val_songs)
    assert len(chosen) == {None: 2, 5: 5}[val_songs]
    assert notes == []


def test_of_several_runs_they_are_those_that_all_held_out(settings, checkpoint, index, run_on):
    chosen, _ = choose(settings, checkpoint, index, run_on("a", 6), run_on("b", 3), run_on("c", 9))
    assert chosen == held_out(3)


def test_no_more_than_were_asked_for(settings, checkpoint, index, run_on):
    assert choose(settings, checkpoint, index, run_on("a", 6), songs=4)[0] == held_out(6)[:4]


def test_the_flag_says_how_many_were_held_out(settings, checkpoint, index, run_on):
    assert choose(settings, checkpoint, index, run_on("a", 6), val_songs=3)[0] == held_out(3)


def test_a_run_that_held_out_none_is_measured_on_its_own_songs_which_is_told(
    settings, checkpoint, index, run_on
):
    chosen, notes = choose(settings, checkpoint, index, run_on("a", 0))
    assert chosen == list(range(8))
    assert "held out no songs" in notes[0]


def test_a_cache_that_no_model_knows_is_new_to_all_of_them(settings, checkpoint, index, run_on):
    chosen, notes = choose(settings, checkpoint, index, "base", run_on("a", 6, same_songs=False), songs=50)
    assert chosen == list(range(40))
    assert "a was not trained on this cache" in notes[0]
    assert "all taken to be new" in notes[1]


def test_holding_out_more_than_there_are_is_refused(settings, checkpoint, index):
    with pytest.raises(InputError, match="40 are held out"):
        choose(settings, checkpoint, index, "base", val_songs=40)


def test_a_runs_damaged_notes_are_told(settings, checkpoint, index, run_on):
    run = run_on("a", 6)
    (run / "run.json").write_text("{")
    with pytest.raises(InputError, match="cannot read what the run held out"):
        choose(settings, checkpoint, index, run)


def test_a_cache_of_another_model_is_refused(settings, checkpoint, index, tmp_path):
    with pytest.raises(InputError, match="prompts have width 6, the model reads 32"):
        open_cache(settings(dataset_path=str(tmp_path / "forty")), checkpoint)


def test_a_cache_of_another_codec_is_refused(settings, checkpoint, tiny_cache, tmp_path):
    assert len(open_cache(settings(dataset_path=tiny_cache), checkpoint)) == 3
    copy = Store.at(tmp_path / "copy")
    for file in tiny_cache.rglob("*.*"):
        copy.write_bytes(file.relative_to(tiny_cache).as_posix(), file.read_bytes())
    manifest = json.loads(copy.read_bytes("manifest.json"))
    copy.write_bytes("manifest.json", json.dumps({**manifest, "checkpoint": {"codec": "other"}}).encode())
    with pytest.raises(InputError, match="computed with another codec than the checkpoint's"):
        open_cache(settings(dataset_path=tmp_path / "copy"), checkpoint)


def test_a_song_without_lyrics_has_none_in_its_condition():
    for lyrics in (0, 5):
        song = cached_song("one", lyrics=lyrics)
        condition = song.condition("cpu")
        assert condition["lyric_mask"].any().item() == (lyrics > 0)
        assert condition["lyric_ids"].shape == condition["lyric_mask"].shape == (1, max(lyrics, 1))
        assert torch.equal(condition["text"][0], song.text_embeddings[0].float())
        assert torch.equal(condition["speaker"][0], song.speaker)


def test_songs_that_the_model_cannot_sing_are_an_error_unless_they_are_kept(settings, checkpoint, tmp_path):
    tokenizer = LyricTokenizer.from_file(checkpoint.lyric_vocab_path())
    lyrics = {
        "english": "hello world",
        "mixed": "hello world, hello, כל",
        "thai": "[verse]\nคืนนี้ฝนตกหนัก",
        "none": "",
    }
    rows = []
    for key, text in lyrics.items():
        tokens = tokenizer.encode(text)
        rows.append(song_row(key, lyric_ids=[] if tokens.is_empty else tokens.ids))
    reader = CacheReader(write_rows(Store.at(tmp_path / "sung"), rows))
    positions = [reader.index.position(key) for key in lyrics]
    with pytest.raises(InputError, match="cannot sing") as raised:
        check_lyrics(reader, positions, checkpoint, settings(dataset_path="sung"), Notes())
    assert "thai 100 %" in str(raised.value)
    assert "english" not in str(raised.value)
    notes = Notes()
    check_lyrics(
        reader, positions, checkpoint, settings(dataset_path="sung", keep_unknown_lyrics=True), notes
    )
    mixed, thai = notes.lines
    assert "mixed" in mixed
    assert thai == "warning: 100 % of the lyric tokens of thai are unknown to the model"
