"""What killed processes leave is found and deleted, what living ones use is not, and one process at a time writes."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from acestep_ray.errors import InputError
from acestep_ray.storage import (
    DiskFullError,
    Store,
    check_room,
    full_disk_explained,
    lease,
    lock_name,
    only_writer,
    only_writer_of,
    output_folder,
    replaced_folder,
    scratch_folder,
    swap,
    updated_folder,
)
from acestep_ray.storage.disk import full_disk_of
from acestep_ray.storage.files import _delete_abandoned_once
from acestep_ray.storage.swap import put_in_place, restore_previous


def in_another_process(code: str, folder: Path) -> subprocess.Popen[str]:
    """Run code that prints a line and then waits, for ever; `folder` is its folder."""
    program = f"import sys\nfrom pathlib import Path\nfolder = Path({str(folder)!r})\n{code}"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


WAIT = "print('ready', flush=True)\n    import time; time.sleep(100)\n"
HOLD = (
    "from acestep_ray.storage import Store, only_writer_of\n"
    f"with only_writer_of(Store.at(folder / 'out'), 'x'):\n    {WAIT}"
)
WRITE = f"from acestep_ray.storage.files import written_whole\nwith written_whole(folder / 'a'):\n    {WAIT}"
SCRATCH = f"from acestep_ray.storage.scratch import scratch_folder\nwith scratch_folder(folder):\n    {WAIT}"


def fail_in(output: AbstractContextManager[Path], name: str) -> None:
    """Write a file of a folder, and fail."""
    with contextlib.suppress(RuntimeError), output as folder:
        (folder / name).write_text("half")
        raise RuntimeError


def test_a_living_writer_blocks_and_a_killed_one_does_not(tmp_path):
    holder = in_another_process(HOLD, tmp_path)
    output = Store.at(tmp_path / "out")
    with pytest.raises(InputError) as refused, only_writer_of(output, f"--output_dir {output.url}"):
        pytest.fail("two at a time")
    assert str(refused.value).splitlines()[0] == (
        f"process {holder.pid} is writing to the same place: --output_dir {output.url}"
    )
    holder.kill()
    holder.wait()
    assert os.listdir(tmp_path) == [".out.lock"]
    with only_writer_of(output, "x"), pytest.raises(InputError), only_writer_of(output, "x"):
        pytest.fail("two at a time in one process")
    assert os.listdir(tmp_path) == []


def test_one_process_at_a_time_writes_to_object_storage(s3, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 20.0)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.2)
    output = Store.at(s3.fresh())
    with output_folder(output.url) as folder:
        (folder / "a").write_text("1")
        with pytest.raises(InputError, match="is writing to the same place"), only_writer_of(output, "x"):
            pytest.fail("two at a time")
    assert list(output.names()) == ["a"]


def test_half_written_files_of_killed_writers_are_deleted_and_those_of_living_ones_stay(tmp_path):
    writer = in_another_process(WRITE, tmp_path)
    (half,) = os.listdir(tmp_path)
    _delete_abandoned_once.cache_clear()
    store = Store.at(tmp_path)
    store.write_bytes("b", b"1")
    assert store.delete_unfinished() == 0
    assert sorted(os.listdir(tmp_path)) == [half, "b"]
    writer.kill()
    writer.wait()
    _delete_abandoned_once.cache_clear()
    store.write_bytes("b", b"2")
    assert os.listdir(tmp_path) == ["b"]


def test_temporary_folders_of_killed_processes_are_deleted_and_others_stay(tmp_path):
    user = in_another_process(SCRATCH, tmp_path)
    (used,) = os.listdir(tmp_path)
    for name in (".acestep-ray-unpacked-abc_1234", ".acestep-ray-notes", "acestep-ray-songs"):
        (tmp_path / name).mkdir()
    with scratch_folder(tmp_path) as folder:
        assert sorted(os.listdir(tmp_path)) == sorted(
            [used, folder.name, ".acestep-ray-notes", "acestep-ray-songs"]
        )
    user.kill()
    user.wait()
    with scratch_folder(tmp_path):
        assert not (tmp_path / used).exists()
    assert sorted(os.listdir(tmp_path)) == [".acestep-ray-notes", "acestep-ray-songs"]


def test_what_killed_processes_left_of_a_folder_is_deleted_by_the_next_one(tmp_path):
    for name in (f".out.{'a' * 32}", f".other.{'b' * 32}"):
        (tmp_path / name).mkdir()
    with output_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert sorted(os.listdir(tmp_path)) == [f".other.{'b' * 32}", "out"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_another_one(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(swap, "_exchange", lambda *_: False)
    place = tmp_path / "place"
    for text in ("1", "2"):
        new = tmp_path / "new"
        new.mkdir()
        (new / text).write_text(text)
        put_in_place(new, place)
        assert os.listdir(place) == [text]
        assert os.listdir(tmp_path) == ["place"]
    place.rename(tmp_path / ".place.previous")  # killed between two renames
    restore_previous(place)
    assert os.listdir(place) == ["2"]


def test_a_replaced_folder_is_the_old_one_until_the_new_one_is_whole(store):
    store.write_bytes("old", b"1")
    fail_in(replaced_folder(store, last=["index"]), "index")
    assert list(store.names()) == ["old"]
    with replaced_folder(store, last=["index"]) as folder:
        (folder / "index").write_text("2")
    assert {name: store.read_bytes(name) for name in store.names()} == {"index": b"2"}


def test_an_updated_folder_is_as_before_after_an_exception(store):
    store.write_bytes("a", b"1")
    fail_in(updated_folder(store), "a")
    assert {name: store.read_bytes(name) for name in store.names()} == {"a": b"1"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error writing: I/O error: No space left on device (os error 28)"),
        ValueError("[Errno 27] Error writing bytes to file. Detail: [errno 27] File too large"),
    ],
)
def test_a_full_disk_is_one_error_whichever_library_meets_it(tmp_path, error):
    with pytest.raises(DiskFullError) as raised, full_disk_explained(tmp_path / "file"):
        raise error
    message = str(raised.value)
    assert message.startswith("no room on the disk (")
    assert str(tmp_path / "file") in message
    assert raised.value.exit_code == 1
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (str(copy), copy.errno) == (message, raised.value.errno)
    wrapped = RuntimeError("a worker failed")
    wrapped.__cause__ = raised.value
    assert full_disk_of(wrapped) == raised.value.errno
    assert full_disk_of(RuntimeError("something else")) is None


def test_room_is_asked_for_before_the_work(tmp_path):
    check_room(tmp_path / "new" / "er", 1, "--output_dir x")
    with pytest.raises(InputError, match=r"are to be written, .* are free: --output_dir x"):
        check_room(tmp_path / "new", 1 << 60, "--output_dir x")


def test_a_lock_has_a_name_that_a_disk_takes(tmp_path):
    for name in ("music.wav", "x" * 255, "ü" * 127):
        with only_writer(Store.at(tmp_path), "x", lock=lock_name(name)):
            assert os.listdir(tmp_path) == [lock_name(name)]
