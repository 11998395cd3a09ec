"""What a store promises, on Google's storage; S3 has tests of faults beside."""

from __future__ import annotations

import logging
import os

import pytest

from acestep_ray.errors import InputError
from acestep_ray.storage import Store

NAMES = [
    "plain.txt",
    "sub/ünï [1].wav",
    "sub/b*?.wav",
    "sub/deep/c%20d.wav",
    "sub/#hash&.wav",
    "sub/new\nline.wav",
]


@pytest.fixture
def store(gcs, tmp_path) -> Store:
    return Store.at(gcs(f"{tmp_path.name}/a folder"))


def test_files_are_written_listed_and_read(store):
    assert store.names() == {}
    for name in NAMES:
        assert store.status(name) is None
        store.write_bytes(name, name.encode())
        assert store.read_bytes(name) == name.encode()
        assert store.status(name).size == len(name.encode())
    assert list(store.names()) == sorted(NAMES)
    assert list(store.names("sub", ".wav")) == sorted(NAMES[1:])
    assert {name: store.status(name) for name in NAMES} == store.names()
    store.delete([*NAMES[1:], "never there"])
    assert list(store.names()) == ["plain.txt"]


def test_what_is_not_there_is_told_with_its_url(store):
    for read in (store.read_bytes, lambda name: store.read_range(name, 0, 3), store.open):
        with pytest.raises(FileNotFoundError, match="a folder/gone"):
            read("gone")


def test_ranges_are_read_and_cut_at_the_end(store):
    store.write_bytes("ten", b"0123456789")
    assert [store.read_range("ten", start, 4) for start in (0, 3, 8, 10, 50)] == [
        b"0123",
        b"3456",
        b"89",
        b"",
        b"",
    ]
    with store.open("ten") as file:
        file.seek(7)
        assert file.read() == b"789"
    store.write_bytes("empty", b"")
    assert (store.read_bytes("empty"), store.status("empty").size) == (b"", 0)


def test_another_content_has_another_status(store):
    store.write_bytes("a", b"one")
    before = store.status("a")
    store.write_bytes("a", b"two")
    assert store.status("a") != before


def test_a_large_file_comes_and_goes_in_parts(store, tmp_path, monkeypatch):
    monkeypatch.setattr("acestep_ray.storage.store._ONE_REQUEST_BYTES", 2**20)
    monkeypatch.setattr("acestep_ray.storage.store._DOWNLOADED_AT_ONCE", 2**20)
    content = os.urandom(5 * 2**20 + 17)
    with store.writer("large") as file:
        file.write(content)
    store.download("large", tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == content


def test_what_a_writer_does_not_finish_is_not_there(store):
    def write_half() -> None:
        with store.writer("half") as file:
            file.write(b"some")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert store.status("half") is None


def test_an_object_is_created_once_and_exchanged_as_it_was_seen(store):
    assert store.create("lease", b"mine")
    assert not store.create("lease", b"theirs")
    seen = store.status("lease")
    assert store.exchange("lease", b"renewed", seen)
    assert not store.exchange("lease", b"stolen", seen)
    assert store.read_bytes("lease") == b"renewed"


def test_what_the_client_raises_is_not_logged_with_a_traceback_too(store):
    """It would be after half a minute of attempts, which is long for a test."""
    assert store.status("anything") is None
    assert not logging.getLogger("gcsfs").isEnabledFor(logging.ERROR)


def test_a_file_is_moved(store):
    store.write_bytes("a", b"1")
    store.move("a", "b/c")
    assert (store.status("a"), store.read_bytes("b/c")) == (None, b"1")


def test_credentials_in_a_url_are_refused():
    with pytest.raises(InputError, match="credentials do not belong"):
        Store.at("gs://key@bucket/folder")
