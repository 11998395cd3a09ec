"""A large file is read once on a machine, and again when it has changed."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from acestep_ray.models import fingerprints
from acestep_ray.models.fingerprints import file_sha256, noted_sha256, notes_folder


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def notes(tmp_path, monkeypatch) -> Path:
    """The user's cache folder; every file is worth a note, whenever it was written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "NOTED_BYTES", 0)
    monkeypatch.setattr(fingerprints, "SETTLED_SECONDS", 0.0)
    return notes_folder()


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """What is read from now on, as by a process that has just begun."""
    read, paths = fingerprints._sha256_of.__wrapped__, []

    def noting(path: str, *version: int) -> str:
        paths.append(Path(path).name)
        return read(path, *version)

    monkeypatch.setattr(fingerprints, "_sha256_of", noting)
    return paths


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    os.utime(path, (1e9, 1e9))  # long ago
    return path


def test_a_file_that_did_not_change_is_read_once_in_a_process(weights, monkeypatch):
    assert file_sha256(weights) == sha256(b"weights")
    monkeypatch.setattr("builtins.open", None)
    assert file_sha256(weights) == sha256(b"weights")


def test_a_later_process_does_not_read_it_again(weights, reads, tmp_path, monkeypatch):
    assert [noted_sha256(weights) for _ in range(3)] == [sha256(b"weights")] * 3
    monkeypatch.chdir(tmp_path)
    assert noted_sha256(Path("weights")) == sha256(b"weights")
    assert reads == ["weights"]


def change_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"WEIGHTS")


def replace_keeping_the_time(path: Path) -> None:
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"WEIGHTS")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [change_in_place, replace_keeping_the_time])
def test_a_file_that_has_changed_is_read_again(weights, reads, change):
    noted_sha256(weights)
    change(weights)
    assert noted_sha256(weights) == sha256(b"WEIGHTS")
    assert noted_sha256(weights) == sha256(b"WEIGHTS")
    assert reads == ["weights", "weights"]


def test_a_file_that_was_written_just_now_is_not_noted_yet(weights, notes, monkeypatch):
    monkeypatch.setattr(fingerprints, "SETTLED_SECONDS", 3600.0)
    assert noted_sha256(weights) == sha256(b"weights")
    assert not notes.exists()


def test_a_file_that_changes_while_it_is_read_is_not_noted(weights, notes, monkeypatch):
    def read(path: str, *version: int) -> str:
        Path(path).write_bytes(b"half of it is new")
        return "of neither"

    monkeypatch.setattr(fingerprints, "_sha256_of", read)
    noted_sha256(weights)
    assert not notes.exists()


def test_copies_and_small_files_have_no_note_of_another(weights, reads, notes, tmp_path, monkeypatch):
    noted_sha256(weights)
    copy = Path(shutil.copy2(weights, tmp_path / "copy"))
    assert noted_sha256(copy) == sha256(b"weights")
    assert reads == ["weights", "copy"]
    monkeypatch.setattr(fingerprints, "NOTED_BYTES", 100)
    small = tmp_path / "small"
    small.write_bytes(b"small")
    assert noted_sha256(small) == sha256(b"small")
    assert len(list(notes.iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"version": 3, "sha256": "0"}', b"\xff"])
def test_a_damaged_note_is_written_anew(weights, reads, notes, content):
    noted_sha256(weights)
    (note,) = notes.iterdir()
    note.write_bytes(content)
    assert noted_sha256(weights) == noted_sha256(weights) == sha256(b"weights")
    assert len(reads) == 2


def test_a_cache_folder_that_cannot_be_written_to_is_no_error(weights, reads, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert noted_sha256(weights) == noted_sha256(weights) == sha256(b"weights")
    assert len(reads) == 2


def test_nothing_is_written_beside_the_file(weights, tmp_path):
    noted_sha256(weights)
    assert {path.name for path in tmp_path.iterdir()} == {"weights", "cache"}
