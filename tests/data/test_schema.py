from __future__ import annotations

import pickle
import re

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from acestep_ray.data.schema import (
    RejectReason,
    dataset_features,
    open_dataset,
    row_recaption,
    row_tags,
    row_text,
)
from acestep_ray.errors import InputError


def rows(*keys: str) -> list[dict]:
    return [
        {
            "keys": key,
            "filename": f"audio/{key}.wav",
            "tags": ["pop", "slow"],
            "norm_lyrics": "[verse]\nla",
            "speaker_emb_path": "",
            "recaption": {"simplified": "a song"},
        }
        for key in keys
    ]


def save(content, path, **options):
    (Dataset.from_list(content, **options) if isinstance(content, list) else content).save_to_disk(path)
    return path


def refusal(path, split="train") -> str:
    with pytest.raises(InputError) as caught:
        open_dataset(path, split)
    return str(caught.value)


def test_a_dataset_with_different_recaptions_in_its_rows_reads_back_without_the_absent_ones(tmp_path):
    one, two = rows("a", "b")
    one["recaption"] = {"simplified": "Upbeat.", "descriptive": "A cheerful track."}
    two["recaption"] = {"use_cases": "Driving.", "simplified": "  "}
    dataset = open_dataset(save([one, two], tmp_path / "set"))
    assert [row_recaption(row) for row in dataset] == [one["recaption"], {"use_cases": "Driving."}]


@pytest.mark.parametrize("recaption", [{}, None])
def test_a_dataset_whose_recaptions_are_all_empty_is_read(tmp_path, recaption):
    content = [row | {"recaption": recaption, "tags": []} for row in rows("a", "b")]
    dataset = open_dataset(save(content, tmp_path / "set"))
    assert [(row_recaption(row), row_tags(row)) for row in dataset] == [({}, [])] * 2


def test_a_dataset_with_the_required_columns_alone_is_read(tmp_path):
    dataset = open_dataset(save([{"keys": "a", "filename": "a.wav"}], tmp_path / "set"))
    assert row_recaption(dataset[0]) == {}
    assert row_tags(dataset[0]) == []
    assert row_text(dataset[0], "norm_lyrics") == row_text(dataset[0], "speaker_emb_path") == ""


def test_tags_may_be_one_text_with_commas(tmp_path):
    dataset = open_dataset(save([rows("a")[0] | {"tags": "pop, slow ,,piano "}], tmp_path / "set"))
    assert row_tags(dataset[0]) == ["pop", "slow", "piano"]


@pytest.mark.parametrize(("names", "stored"), [((), ["simplified"]), (("b", "a"), ["a", "b"])])
def test_our_features_always_store_a_recaption_that_reads_as_a_dict(tmp_path, names, stored):
    content = [row | {"recaption": dict.fromkeys(stored)} for row in rows("x")]
    path = save(Dataset.from_list(content, features=dataset_features(names)), tmp_path / "set")
    assert dict(load_from_disk(path)[0]["recaption"].items()) == dict.fromkeys(stored)
    assert "language" not in open_dataset(path).column_names
    assert "language" in dataset_features(optional=["language"])


def test_splits_are_chosen_by_name(tmp_path):
    splits = DatasetDict(train=Dataset.from_list(rows("a", "b")), test=Dataset.from_list(rows("c")))
    path = save(splits, tmp_path / "set")
    assert open_dataset(path)["keys"][:] == ["a", "b"]
    assert open_dataset(path, "test")["keys"][:] == ["c"]
    message = refusal(path, "valid")
    assert "'valid'" in message
    assert "train, test" in message


def test_a_single_dataset_has_the_split_train_alone(tmp_path):
    path = save(rows("a"), tmp_path / "set")
    assert len(open_dataset(path, "train")) == 1
    assert "it has: train" in refusal(path, "test")


def test_a_saved_format_does_not_change_the_rows(tmp_path):
    dataset = Dataset.from_list(rows("a"))
    dataset.set_format("numpy", columns=["keys"])
    assert open_dataset(save(dataset, tmp_path / "set"))[0]["tags"] == ["pop", "slow"]


def test_a_directory_that_is_no_dataset_is_refused_with_what_to_do(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "not a directory" in refusal(tmp_path / "file")
    (tmp_path / "songs").mkdir()
    assert "acestep-ray prepare" in refusal(tmp_path / "songs")
    (tmp_path / "cache" / "samples").mkdir(parents=True)
    (tmp_path / "cache" / "manifest.json").write_text("{}")
    assert "feature cache" in refusal(tmp_path / "cache")


@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "dataset_info.json"])
def test_a_dataset_that_lacks_a_file_is_refused(tmp_path, file):
    path = save(rows("a"), tmp_path / "set")
    (path / file).unlink()
    assert "incomplete" in refusal(path)


@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
@pytest.mark.parametrize("content", ["garbage", "", "[]"])
def test_a_damaged_dataset_is_refused(tmp_path, file, content):
    path = save(rows("a"), tmp_path / "set")
    (path / file).write_text(content)
    assert str(path) in refusal(path)


def test_a_dataset_without_rows_is_refused(tmp_path):
    assert "no rows" in refusal(save([], tmp_path / "set"))
    emptied = Dataset.from_list(rows("a")).filter(lambda row: False)
    path = save(DatasetDict(train=Dataset.from_list(rows("a")), test=emptied), tmp_path / "splits")
    assert "no rows" in refusal(path, "test")
    assert len(open_dataset(path, "train")) == 1


def test_missing_columns_are_named(tmp_path):
    path = save([{"file": "a.wav", "tags": []}], tmp_path / "set")
    message = refusal(path)
    assert re.search("lacks the columns keys, filename", message)
    assert "it has file, tags" in message


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("keys", 7),
        ("filename", {"path": "a.wav", "bytes": None}),
        ("tags", [1, 2]),
        ("norm_lyrics", ["a"]),
        ("recaption", "a song"),
        ("recaption", ["a song"]),
    ],
)
def test_columns_of_a_wrong_type_are_named(tmp_path, column, value):
    assert f"column {column} holds" in refusal(save([rows("a")[0] | {column: value}], tmp_path / "set"))


@pytest.mark.parametrize("column", ["keys", "filename"])
@pytest.mark.parametrize("value", [None, "", "  "])
def test_rows_without_key_or_file_name_are_listed(tmp_path, column, value):
    content = rows("a", "b", "c")
    content[2][column] = value
    message = refusal(save(content, tmp_path / "set"))
    assert f"column {column}" in message
    assert "row 2" in message


def test_duplicate_keys_are_listed(tmp_path):
    content = [row | {"norm_lyrics": str(i)} for i, row in enumerate(rows("a", "b", "c", "b", "a", "b"))]
    message = refusal(save(content, tmp_path / "set"))
    assert "2 keys" in message
    assert "keys a, b" in message


def test_only_failures_of_storage_are_transient():
    assert [reason for reason in RejectReason if reason.is_transient] == [RejectReason.UNREADABLE]


def test_a_bad_text_is_found_by_the_text_stage():
    assert RejectReason("bad_text") is RejectReason.BAD_TEXT
    assert RejectReason.BAD_TEXT.stage == "text"


@pytest.mark.parametrize("reason", RejectReason)
def test_reject_reasons_read_as_their_values(reason):
    assert f"{reason}" == reason.value == reason
    assert reason.meaning
    assert reason.stage in ("decode", "text", "encode")
    assert pickle.loads(pickle.dumps(reason)) is RejectReason(reason.value) is reason
