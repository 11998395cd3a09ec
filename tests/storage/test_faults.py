"""Storage that fails now and then is asked again; one that fails for good is told with its URL, and nothing is half."""

from __future__ import annotations

import os

import pytest

from acestep_ray.errors import InputError
from acestep_ray.storage import AccessDeniedError, StorageError, Store, clients, errors, files
from tests.s3 import forget_clients

ACTIONS = {
    "read": lambda store, _: store.read_bytes("a"),
    "range": lambda store, _: store.read_range("a", 10, 50),
    "open": lambda store, _: store.open("a").read(),
    "download": lambda store, path: [store.download("a", path), path.read_bytes()][1],
    "status": lambda store, _: store.status("a").size,
    "names": lambda store, _: list(store.names()),
    "write": lambda store, _: [store.write_bytes("b", b"new"), list(store.names())][1],
    "create": lambda store, _: [store.create("b", b"new"), store.read_bytes("b")][1],
    "move": lambda store, _: [store.move("a", "b"), list(store.names())][1],
    "delete": lambda store, _: [store.delete(["a"]), list(store.names())][1],
}


@pytest.mark.parametrize("kind", ["503", "reset", "lost", "cut"])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_request_that_fails_once_changes_nothing(s3, faults, tmp_path, action, kind):
    outcomes = []
    for name in ("calm", kind):
        faults.fails = lambda method, path: None
        store = Store.at(s3.fresh())
        store.write_bytes("a", bytes(range(200)))
        requests = len(faults.requests)
        if name == kind:
            faults.once_each(kind)
        outcomes.append(ACTIONS[action](store, tmp_path / name))
        requests = len(faults.requests) - requests
    assert outcomes[0] == outcomes[1]
    has_bodies = kind != "cut" or action not in ("status", "write", "create", "move")
    assert requests > 1 or not has_bodies


@pytest.mark.parametrize("kind", ["503", "reset", "cut"])
def test_storage_that_fails_for_good_is_told_with_the_url_after_as_many_attempts(s3, faults, tmp_path, kind):
    store = Store.at(s3.fresh())
    store.write_bytes("a", bytes(1000))
    before = len(faults.requests)
    faults.fails = lambda method, path: kind if method == "GET" else None
    with pytest.raises(StorageError, match=store.url_of("a")):
        store.read_bytes("a")
    attempts = 1 + len(clients.RETRY_AFTER_SECONDS)
    # aiohttp itself asks again where a connection was closed without an answer.
    assert attempts <= len(faults.requests) - before <= attempts * (2 if kind == "reset" else 1)
    (tmp_path / "copy").write_bytes(b"before")
    with pytest.raises(StorageError, match=store.url_of("a")):
        store.download("a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["copy"]


def test_a_file_that_cannot_be_uploaded_is_not_there(s3, faults):
    store = Store.at(s3.fresh())
    faults.fails = lambda method, path: "503" if method in ("PUT", "POST") else None
    with pytest.raises(StorageError, match=store.url_of("a")), store.writer("a") as file:
        file.write(b"text")
    faults.fails = lambda method, path: None
    assert store.names() == {}


def test_an_answer_that_comes_late_is_waited_for(s3, faults):
    store = Store.at(s3.fresh())
    store.write_bytes("a", b"text")
    before = len(faults.requests)
    faults.fails = lambda method, path: "slow"
    assert store.read_bytes("a") == b"text"
    assert len(faults.requests) == before + 1


def test_an_answer_that_does_not_come_is_asked_for_again(s3, faults, monkeypatch):
    config = {"read_timeout": 0.5, "retries": {"total_max_attempts": 1}}
    monkeypatch.setattr(clients, "S3_CONFIG", config)
    forget_clients()
    store = Store.at(s3.fresh())
    store.write_bytes("a", b"text")
    faults.seconds = 3.0
    faults.once_each("slow")
    try:
        assert store.read_bytes("a") == b"text"
    finally:
        forget_clients()


@pytest.mark.parametrize("name", ["bucket", "denied", "missing"])
def test_what_time_does_not_mend_is_not_tried_again(s3, faults, name):
    store = Store.at("s3://no-such-bucket/a" if name == "bucket" else s3.fresh())
    expected = {"bucket": InputError, "denied": AccessDeniedError, "missing": FileNotFoundError}[name]
    if name == "denied":
        faults.fails = lambda method, path: "403"
    with pytest.raises(expected):
        store.read_bytes("a")
    assert len(faults.requests) == 1


def test_a_file_that_is_replaced_while_it_is_read_is_not_mixed_up(s3, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    store = Store.at(s3.fresh())
    store.write_bytes("a", b"1" * 100_000)
    with store.open("a") as file:
        assert file.read(10) == b"1" * 10
        store.write_bytes("a", b"2" * 100_000)
        file.seek(90_000)
        with pytest.raises(StorageError, match=r"replaced while it was read.*/a"):
            file.read(10)


# --- no secrets


def test_credentials_in_a_url_are_refused_and_not_repeated():
    with pytest.raises(InputError, match="do not belong into a URL") as refused:
        Store.at("s3://AKIAEXAMPLE:wJalrSecret@bucket/folder")
    assert "AKIAEXAMPLE" not in str(refused.value)
    assert "wJalrSecret" not in str(refused.value)
    assert "s3://bucket/folder" in str(refused.value)


def test_an_object_may_have_an_at_in_its_name(s3):
    store = Store.at(s3.fresh()).child("a@b")
    store.write_bytes("c@d", b"text")
    assert Store.at(store.url).read_bytes("c@d") == b"text"


def test_errors_hold_no_passwords_and_no_signatures(s3, quick, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://someone:sesame@127.0.0.1:9")
    forget_clients()
    try:
        with pytest.raises(StorageError) as failed:
            Store.at("s3://bucket/folder").read_bytes("a")
    finally:
        forget_clients()
    assert "s3://bucket/folder/a" in str(failed.value)
    assert "sesame" not in str(failed.value)
    error = OSError("cannot connect to http://someone:sesame@host/bucket")
    assert str(errors.told(error, "s3://bucket/a", "s3")) == (
        "object storage failed (OSError: cannot connect to http://host/bucket): s3://bucket/a"
    )
    signed = "GET https://bucket.s3.amazonaws.com/a?X-Amz-Credential=AKIA%2F1&X-Amz-Signature=5eAf&x=1 failed"
    assert errors.without_secrets(signed) == (
        "GET https://bucket.s3.amazonaws.com/a?X-Amz-Credential=…&X-Amz-Signature=…&x=1 failed"
    )
