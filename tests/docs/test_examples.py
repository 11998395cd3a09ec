"""The examples of files in the guide are what the program reads."""

from __future__ import annotations

import json

from datasets import Dataset

from acestep_ray.data.schema import COLUMNS, open_dataset, row_recaption
from acestep_ray.data.songs import SongTable
from acestep_ray.training.lora_config import read_lora_config
from tests.docs.pages import ROOT, blocks

GUIDE = list(blocks(ROOT / "docs" / "guide.md"))


def examples(language: str) -> list[str]:
    return [block.body for block in GUIDE if block.language == language]


def test_the_row_of_a_dataset_has_every_column(tmp_path):
    row = json.loads(examples("json")[0])
    assert set(row) == set(COLUMNS)
    Dataset.from_list([row]).save_to_disk(tmp_path / "dataset")
    (read,) = open_dataset(tmp_path / "dataset")
    assert read["norm_lyrics"].splitlines()[0] == "[verse]"
    assert set(row_recaption(read)) == {"simplified", "descriptive"}


def test_the_lora_configuration_is_the_one_of_the_repository(tmp_path):
    path = tmp_path / "lora_config.json"
    path.write_text(examples("json")[1])
    assert read_lora_config(path) == read_lora_config(ROOT / "lora_config.json")


def test_the_table_of_songs_is_read(tmp_path):
    table = tmp_path / "songs.csv"
    table.write_text(examples("csv")[0])
    songs = SongTable.open(table)
    assert songs.keys == ["night_train"]
    assert songs.warnings == []
    row = songs.row(0)
    assert row["tags"] == ["synthwave", "night", "female voice"]
    assert row["norm_lyrics"].splitlines() == ["[verse]", "The night train runs through rain and light"]
    assert (row["language"], row["recaption"]) == ("en", {"simplified": "synthwave"})


def test_every_json_block_is_json():
    for text in examples("json"):
        json.loads(text)
