"""A folder in object storage is one process's at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from acestep_ray.errors import InputError
from acestep_ray.storage import HeldError, Lease, Store, lease
from acestep_ray.training.experiment import only_run

NAME = ".lock"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.2)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 20.0)  # threads of a busy machine wait for seconds
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.1)


@pytest.fixture(params=["memory", "s3"])
def store(request, tmp_path) -> Store:
    if request.param == "memory":
        return Store.at(f"memory://{tmp_path.name}/store")
    return Store.at(request.getfixturevalue("s3").fresh())


def new_lease(store: Store, lost=pytest.fail) -> Lease:
    return Lease(store, NAME, lost=lost, say=lambda line: None)


def holder_elsewhere(store: Store) -> dict:
    """Write the lease of a process on another machine, which does not renew it."""
    holder = {"owner": "other", "host": "elsewhere", "pid": 1, "machine": "another", "started": "1"}
    store.write_bytes(NAME, json.dumps(holder).encode())
    return holder


def test_a_lease_is_held_by_one_and_free_after_its_release(store):
    first, second = new_lease(store), new_lease(store)
    first.acquire()
    with pytest.raises(HeldError, match=r"process \d+ on "):
        second.acquire()
    first.release()
    assert store.names() == {}
    third = new_lease(store)
    third.acquire()
    third.release()


def test_of_several_that_begin_at_once_one_gets_it(s3):
    store = Store.at(s3.fresh())
    leases = [new_lease(store) for _ in range(6)]
    barrier = threading.Barrier(len(leases))

    def begin(one: Lease) -> bool:
        barrier.wait()
        try:
            one.acquire()
        except HeldError:
            return False
        return True

    with ThreadPoolExecutor(len(leases)) as pool:
        won = list(pool.map(begin, leases))
    assert sum(won) == 1
    leases[won.index(True)].release()


def test_a_holder_elsewhere_that_gives_no_sign_for_a_while_is_taken_to_be_gone(store, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    holder_elsewhere(store)
    mine = new_lease(store)
    began = time.monotonic()
    mine.acquire()
    assert time.monotonic() - began >= lease.LEASE_SECONDS
    assert json.loads(store.read_bytes(NAME))["owner"] != "other"
    mine.release()


def test_of_several_that_find_a_holder_gone_one_gets_it(s3, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 4.0)
    store = Store.at(s3.fresh())
    holder_elsewhere(store)
    leases = [new_lease(store) for _ in range(4)]

    def begin(one: Lease) -> bool:
        try:
            one.acquire()
        except HeldError:
            return False
        return True

    with ThreadPoolExecutor(len(leases)) as pool:
        won = list(pool.map(begin, leases))
    assert sum(won) == 1
    leases[won.index(True)].release()


def test_a_holder_that_was_killed_on_this_machine_is_replaced_at_once(s3, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 60.0)
    store = Store.at(s3.fresh())
    program = (
        "import time; from acestep_ray.storage import Lease, Store\n"
        f"Lease(Store.at({store.url!r}), {NAME!r}, lost=print).acquire()\n"
        "print('held', flush=True); time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
    finally:
        other.kill()
        other.wait()
    began = time.monotonic()
    mine = new_lease(store)
    mine.acquire()
    assert time.monotonic() - began < 20
    mine.release()


def test_a_holder_is_told_when_somebody_else_has_taken_over(store):
    told = threading.Event()
    mine = new_lease(store, lost=lambda why: told.set())
    mine.acquire()
    holder = holder_elsewhere(store)
    assert told.wait(10)
    mine.release()
    assert json.loads(store.read_bytes(NAME)) == holder  # what is another's is not deleted


def test_a_lease_that_somebody_deletes_is_written_again(store):
    mine = new_lease(store)
    mine.acquire()
    store.delete([NAME])
    deadline = time.monotonic() + 10
    while store.status(NAME) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    mine.release()


def test_answers_that_are_lost_lose_no_lease(s3, faults):
    store = Store.at(s3.fresh())
    faults.once_each("lost")
    said = []
    mine = Lease(store, NAME, lost=pytest.fail, say=said.append)
    mine.acquire()
    assert said == []  # it takes its own lease for nobody else's
    faults.once_each("lost")  # of the renewals too
    time.sleep(1.0)
    faults.fails = lambda method, path: None
    with pytest.raises(HeldError):
        new_lease(store).acquire()
    mine.release()
    assert store.names() == {}


def test_storage_that_fails_for_a_while_is_told_once_and_the_lease_renewed_after(s3, faults):
    store = Store.at(s3.fresh())
    said = []
    mine = Lease(store, NAME, lost=pytest.fail, say=said.append)
    mine.acquire()
    faults.fails = lambda method, path: "503"
    time.sleep(1.5)
    faults.fails = lambda method, path: None
    before = store.status(NAME)
    deadline = time.monotonic() + 10
    while store.status(NAME) == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    mine.release()
    assert len(said) == 1
    assert "cannot be renewed" in said[0]


def test_a_second_run_in_one_folder_is_refused_by_name(s3):
    store = Store.at(s3.fresh())
    with (
        only_run(store),
        pytest.raises(InputError, match=r"under way \(process \d+ on") as refused,
        only_run(store),
    ):
        pytest.fail("work began")
    assert store.url in str(refused.value)
    with only_run(store):
        pass


def test_a_run_whose_folder_was_taken_comes_to_an_end_like_one_that_is_told_to(s3, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr("os.kill", lambda pid, number: ended.set())
    store = Store.at(s3.fresh())
    with only_run(store):
        holder_elsewhere(store)
        assert ended.wait(10)
