"""Folders appear whole or not at all, and are brought here for a time."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from acestep_ray.errors import InputError
from acestep_ray.storage import StorageError, Store, check_new, fetched, output_folder, updated_folder
from acestep_ray.storage.files import LOCK
from acestep_ray.storage.folders import upload_folder


def write(folder: Path, **texts: str) -> None:
    """Files by name; `_` in a name is a folder."""
    for name, text in texts.items():
        path = folder / name.replace("_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def no_leftovers(tmp_path_factory, monkeypatch):
    """A test that leaves nothing in the folder for temporary files."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert os.listdir(folder) == []


def test_a_folder_is_at_its_place_once_it_is_written(store, no_leftovers):
    with output_folder(store.url, last=["index"]) as folder:
        write(folder, index="1", deep_er_a="2")
        assert store.names().keys() <= {LOCK}
    assert {name: store.read_bytes(name) for name in store.names()} == {"deep/er/a": b"2", "index": b"1"}


def test_an_exception_leaves_nothing(store, no_leftovers):
    def write_half():
        with output_folder(store.url) as folder:
            write(folder, a="1")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_half()
    assert store.names() == {}
    if store.is_local:
        assert list(store.path.parent.iterdir()) == []


def test_nothing_is_written_where_something_is(store):
    store.write_bytes("a", b"before")
    with (
        pytest.raises(InputError, match=r"there is something here: --report_dir"),
        output_folder(store.url, flag="--report_dir"),
    ):
        pytest.fail("work began")
    with pytest.raises(InputError, match="--output_dir"):
        check_new(store.url)
    check_new(store.child("new").url)


def test_what_readers_look_for_is_uploaded_last(s3):
    store = Store.at(s3.fresh())
    with output_folder(store.url, last=["a", "marker"]) as folder:
        write(folder, marker="", a="1", b="2", z="3")
    order = _put_names(s3, store)
    assert order[-2:] == ["a", "marker"]
    assert sorted(name for name in order[:-2] if name != LOCK) == ["b", "z"]


def _put_names(s3, store: Store) -> list[str]:
    """Names of the objects in the order of their uploads."""
    prefix = store.url.removeprefix("s3:/") + "/"
    with open(s3.log, encoding="utf-8", errors="replace") as file:
        paths = [line.split("PUT ")[1].split(" ")[0] for line in file if "PUT " in line]
    return [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]


def test_an_upload_that_fails_takes_back_what_was_uploaded(s3, faults, tmp_path):
    store = Store.at(s3.fresh())
    write(tmp_path, a="1", b="2", marker="")
    faults.fails = lambda method, path: "503" if method == "PUT" and path.endswith("marker") else None
    with pytest.raises(StorageError, match="marker"):
        upload_folder(tmp_path, store, last=["marker"])
    assert store.names() == {}


def test_a_folder_is_brought_here_for_a_time(store, no_leftovers):
    store.write_bytes("a", b"1")
    store.write_bytes("deep/b", b"2")
    with fetched(store.url) as folder:
        assert (folder / "a").read_bytes() == b"1"
        assert (folder / "deep" / "b").read_bytes() == b"2"
        assert folder.name == store.name
    with fetched(store.child("none")) as folder:
        assert not folder.exists() or list(folder.iterdir()) == []


def test_a_mistake_in_a_copy_is_told_of_its_url(s3):
    store = Store.at(s3.fresh())
    store.write_bytes("a", b"1")
    with pytest.raises(InputError) as raised, fetched(store) as folder:
        raise InputError("damaged", where=f"{folder / 'a'} and others", fix="mend it")
    assert str(raised.value) == f"damaged: {store.url_of('a')} and others\n  → mend it"


def test_an_updated_folder_replaces_files_one_by_one_and_leaves_others(store, no_leftovers):
    store.write_bytes("kept", b"0")
    store.write_bytes("a", b"before")
    with updated_folder(store, last=["index"]) as folder:
        write(folder, a="after", index="1")
    assert {name: store.read_bytes(name) for name in store.names()} == {
        "a": b"after", "index": b"1", "kept": b"0",
    }  # fmt: skip
