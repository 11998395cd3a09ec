from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants

from acestep_ray.errors import InputError
from acestep_ray.storage import (
    AccessDeniedError,
    FileStatus,
    StorageError,
    Store,
    StoredFile,
    clients,
    files,
    is_url,
)
from acestep_ray.storage import s3 as requests_of_s3
from tests.hub import REPOSITORY, hub_server
from tests.s3 import BUCKET, forget_clients

ODD_NAMES = ["a b.txt", "🎵/ü 你好.wav", "a#b?c%20d%.x", "[1]*.txt", "a+b&c=d;e", "x..y/...z", "back\\slash"]
# The test's own S3 server has no route for it.
NEWLINE = "two\nlines.wav"


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, tmp_path):
    """An empty store of each kind."""
    if request.param == "local":
        return Store.at(tmp_path / "store")
    if request.param == "memory":
        return Store.at(f"memory://{tmp_path.name}/store")
    return Store.at(request.getfixturevalue("s3").fresh())


def uploads(store: Store) -> list:
    """Multipart uploads of S3 that have begun and not ended."""
    return store.filesystem.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads") or []


# --- what is stored


@pytest.mark.parametrize("content", [b"", b"some text", bytes(range(256)) * 1000])
def test_what_is_written_is_read_back(store, content):
    store.write_bytes("deep/er/a", content)
    with store.writer("b") as file:
        file.write(content[:100])
        file.write(content[100:])
    for name in ("deep/er/a", "b"):
        assert store.read_bytes(name) == content
        assert store.status(name).size == len(content)
        with store.open(name) as file:
            assert file.read() == content
    assert store.child("deep").read_bytes("er/a") == content
    assert list(store.names()) == ["b", "deep/er/a"]


def test_anything_with_a_buffer_can_be_written(store):
    for content in (memoryview(b"text"), bytearray(b"text")):
        store.write_bytes("a", content)
        assert store.read_bytes("a") == b"text"


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, 10, b"0123456789"), (2, 3, b"234"), (8, 100, b"89"), (10, 3, b""), (99, 3, b""), (4, 0, b"")],
)
def test_a_range_ends_where_the_file_ends(store, start, length, expected):
    store.write_bytes("a", b"0123456789")
    assert store.read_range("a", start, length) == expected


def test_an_open_file_is_read_at_any_place(store, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(files, "BLOCKS_KEPT", 2)
    content = os.urandom(10_500)
    store.write_bytes("a", content)
    with store.open("a") as file:
        for start, length in ((10_400, 200), (0, 10), (995, 10), (3000, 4500), (20_000, 5), (990, 20)):
            assert file.seek(start) == start
            assert file.read(length) == content[start : start + length]
        assert file.seek(-5, io.SEEK_END) == 10_495
        assert file.read() == content[-5:]
        assert file.seek(7) == file.tell() == 7
        assert file.read() == content[7:]


def test_odd_names_are_names_like_any_other(store):
    names = [*ODD_NAMES, *([] if store.protocol == "s3" else [NEWLINE])]
    for name in names:
        store.write_bytes(name, name.encode())
    assert sorted(store.names()) == sorted(names)
    for name in names:
        assert store.read_bytes(name) == store.read_range(name, 0, 100) == name.encode()
        assert store.names()[name] == store.status(name)
        assert StoredFile.at(store.file(name).url).read_bytes() == name.encode()
        store.move(name, f"moved/{name}")
    assert sorted(store.names()) == sorted(f"moved/{name}" for name in names)
    store.delete(f"moved/{name}" for name in names)
    assert store.names() == {}


def test_deleting_takes_names_literally(store):
    for name in ("a1.wav", "a[1].wav", "ab", "a*", "keep"):
        store.write_bytes(name, b"x")
    store.delete(["a[1].wav", "a*", "was never there"])
    assert list(store.names()) == ["a1.wav", "ab", "keep"]
    store.delete([])


def test_many_files_are_deleted(store, monkeypatch):
    monkeypatch.setattr(requests_of_s3, "DELETED_AT_ONCE", 3)
    for i in range(8):
        store.write_bytes(f"sub/{i}", b"x")
    store.delete([f"sub/{i}" for i in range(7)])
    assert list(store.names()) == ["sub/7"]


def test_folders_that_are_emptied_go_on_a_local_disk(tmp_path):
    store = Store.at(tmp_path / "store")
    store.write_bytes("a/b/c", b"x")
    store.write_bytes("a/d", b"x")
    store.delete(["a/b/c"])
    assert sorted(os.listdir(tmp_path / "store" / "a")) == ["d"]
    store.delete(["a/d"])
    assert os.listdir(tmp_path / "store") == []


def test_names_are_those_below_a_folder_with_a_suffix(store):
    for name in ("a.x", "sub/b.x", "sub/deep/c.y", "submarine/d.x"):
        store.write_bytes(name, b"x")
    assert list(store.names("sub")) == ["sub/b.x", "sub/deep/c.y"]
    assert list(store.names(suffix=".x")) == ["a.x", "sub/b.x", "submarine/d.x"]
    assert list(store.names("sub", ".y")) == ["sub/deep/c.y"]
    assert store.names("none") == store.child("none").names() == store.names("a.x") == {}


def test_names_are_never_those_of_before(store):
    assert store.names() == {}
    store.write_bytes("a", b"x")
    assert list(store.names()) == ["a"]
    assert Store(store.url).names() == store.names()
    store.delete(["a"])
    assert store.names() == {}
    assert store.status("a") is None


def test_the_version_changes_with_the_content(store):
    store.write_bytes("a", b"one")
    first = store.status("a")
    assert store.status("a") == first == store.names()["a"]
    time.sleep(0.01)
    store.write_bytes("a", b"two")
    second = store.status("a")
    assert first.size == second.size == 3
    assert first.version != second.version == store.names()["a"].version


def test_what_is_missing_is_not_found(store, tmp_path):
    store.write_bytes("folder/a", b"x")
    assert store.status("none") is None
    assert store.status("folder") is None
    reads = (
        lambda: store.read_bytes("none"),
        lambda: store.read_range("none", 0, 5),
        lambda: store.open("none"),
        lambda: store.download("none", tmp_path / "copy"),
        lambda: store.move("none", "new"),
    )
    for read in reads:
        with pytest.raises(FileNotFoundError) as caught:
            read()
        assert caught.value.strerror == "No such file or directory"
        assert "none" in caught.value.filename


def test_a_file_is_downloaded(store, tmp_path):
    store.write_bytes("a", b"text")
    store.download("a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"text"


# --- whole or nothing


@pytest.mark.parametrize("before", [None, b"before"])
def test_a_writer_that_fails_leaves_what_was_there(store, before):
    if before is not None:
        store.write_bytes("a", before)

    def write_half():
        with store.writer("a") as file:
            file.write(b"half" * 100)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_half()
    assert list(store.names()) == ([] if before is None else ["a"])
    if before is not None:
        assert store.read_bytes("a") == before
    if store.is_local:
        assert len(list(store.path.rglob("*"))) == (before is not None)


def test_a_file_that_is_being_written_is_not_seen(store):
    with store.writer("a") as file:
        file.write(b"x" * 100)
        file.flush()
        assert store.names() == {}
        assert store.status("a") is None
    assert list(store.names()) == ["a"]


def test_a_killed_writer_leaves_no_file_and_what_it_left_can_be_deleted(tmp_path):
    store = Store.at(tmp_path / "store")
    store.write_bytes("sub/a", b"before")
    program = (
        "import sys; from acestep_ray.storage import Store\n"
        f"with Store.at({store.url!r}).writer('sub/a') as file:\n"
        "    file.write(b'half'); file.flush(); print('written', flush=True); sys.stdin.read()\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert store.read_bytes("sub/a") == b"before"
    assert list(store.names()) == ["sub/a"]
    assert len(os.listdir(tmp_path / "store" / "sub")) == 2
    assert store.delete_unfinished() == 1
    assert os.listdir(tmp_path / "store" / "sub") == ["a"]


def test_names_as_long_as_the_file_system_takes_are_written(tmp_path):
    Store.at(tmp_path).write_bytes("x" * 255, b"text")
    assert list(Store.at(tmp_path).names()) == ["x" * 255]


def test_a_large_file_is_uploaded_in_parts(s3):
    store = Store.at(s3.fresh())
    content = os.urandom(2**20)
    with store.writer("large") as file:
        for _ in range(101):
            file.write(content)
    assert store.status("large").size == 101 * 2**20
    assert store.read_range("large", 77 * 2**20 + 5, 100) == content[5:105]
    assert s3.requests(store.url_of("large")).count("PUT") > 1
    assert uploads(store) == []


def test_an_upload_that_fails_leaves_no_object_and_no_parts(s3, monkeypatch):
    store = Store.at(s3.fresh())
    filesystem = store.filesystem
    call = filesystem._call_s3

    async def fail_at_the_second_part(method, *args, **options):
        if method == "upload_part" and options["PartNumber"] == 2:
            raise OSError("connection lost")
        return await call(method, *args, **options)

    monkeypatch.setattr(filesystem, "_call_s3", fail_at_the_second_part)
    monkeypatch.setattr(clients, "RETRY_AFTER_SECONDS", (0.01, 0.04))
    with pytest.raises(StorageError, match="connection lost"), store.writer("large") as file:
        file.write(bytes(101 * 2**20))
    assert store.names() == {}
    assert uploads(store) == []


def test_unfinished_uploads_of_this_store_are_deleted(s3):
    store = Store.at(s3.fresh())
    other = Store.at(s3.fresh())
    store.write_bytes("whole", b"x")
    for place in (store, other):
        key = place.url_of("a").removeprefix(f"s3://{BUCKET}/")
        store.filesystem.call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)
    assert store.delete_unfinished() == 1
    assert store.delete_unfinished() == 0
    assert list(store.names()) == ["whole"]
    assert other.delete_unfinished() == 1


# --- requests, threads, processes


def test_reads_and_writes_are_single_requests(s3):
    store = Store.at(s3.fresh())

    def requests(action) -> list[str]:
        before = len(s3.requests(store.url_of("a")))
        action()
        return s3.requests(store.url_of("a"))[before:]

    def write():
        with store.writer("a") as file:
            file.write(b"0123456789")

    assert requests(write) == requests(lambda: store.write_bytes("a", b"0123456789")) == ["PUT"]
    assert requests(lambda: store.read_bytes("a")) == ["GET"]
    assert requests(lambda: store.read_range("a", 2, 3)) == ["GET"]
    assert requests(lambda: store.status("a")) == ["HEAD"]
    assert list(store.names()) == ["a"]
    prefix = store.url.removeprefix(f"s3://{BUCKET}/")
    assert s3.requests(f"s3://{BUCKET}?list-type=2&prefix={prefix}/&") == ["GET"]


def test_an_open_object_is_fetched_in_blocks_once(s3, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 100_000)
    store = Store.at(s3.fresh())
    store.write_bytes("a", bytes(1_000_000))
    before = len(s3.requests(store.url_of("a")))
    with store.open("a") as file:
        for start in (950_000, 10, 20_000, 950_000):
            file.seek(start)
            assert len(file.read(1000)) == 1000
    assert s3.requests(store.url_of("a"))[before:] == ["HEAD", "GET", "GET"]


def test_a_store_is_used_by_many_threads_at_once(store):
    def use(i: int) -> bytes:
        store.write_bytes(f"{i}", b"%d" % i)
        assert store.status(f"{i}").size == len(str(i))
        return store.read_bytes(f"{i}")

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(use, range(100))) == [b"%d" % i for i in range(100)]
    assert len(store.names()) == 100


def test_a_store_is_sent_to_other_processes(s3):
    store = Store.at(s3.fresh())
    store.write_bytes("a", b"text")
    assert pickle.loads(pickle.dumps(store)) == store
    assert pickle.loads(pickle.dumps(store.file("a"))).read_bytes() == b"text"
    # A fork has none of the threads that a client works with.
    for method in ("spawn", "fork"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply_async(store.read_bytes, ("a",)).get(timeout=60) == b"text"


# --- mistakes and failures


def actions(store: Store) -> dict:
    return {
        "read_bytes": lambda: store.read_bytes("a"),
        "read_range": lambda: store.read_range("a", 0, 5),
        "open": lambda: store.open("a"),
        "write": lambda: store.write_bytes("a", b"x"),
        "names": store.names,
        "delete": lambda: store.delete(["a"]),
        "delete_unfinished": store.delete_unfinished,
    }


def mistake(action) -> str:
    with pytest.raises(InputError) as caught:
        action()
    return str(caught.value)


def test_a_bucket_that_does_not_exist_is_a_mistake(s3):
    store = Store.at("s3://no-such-bucket/prefix")
    for name, action in actions(store).items():
        assert "bucket does not exist: s3://no-such-bucket" in mistake(action), name


def test_missing_credentials_are_a_mistake(s3, monkeypatch, tmp_path):
    url = s3.fresh()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    forget_clients()
    try:
        for name, action in actions(Store.at(url)).items():
            assert "AWS_ACCESS_KEY_ID" in mistake(action), name
        with pytest.raises(InputError, match="FSSPEC_S3_ANON"):
            Store.at(url).status("a")
    finally:
        forget_clients()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("ExpiredToken", InputError),
        ("InvalidAccessKeyId", InputError),
        ("AccessDenied", AccessDeniedError),
        ("403", AccessDeniedError),
        ("InternalError", StorageError),
    ],
)
def test_refusals_of_the_server_are_told(s3, monkeypatch, code, error):
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    store = Store.at(s3.fresh())

    async def refuse(*_, **__):
        raise translate_boto_error(ClientError({"Error": {"Code": code, "Message": "no"}}, "GetObject"))

    monkeypatch.setattr(store.filesystem, "_call_s3", refuse)
    monkeypatch.setattr(clients, "RETRY_AFTER_SECONDS", (0.01, 0.04))
    for action in (lambda: store.read_bytes("a"), lambda: store.status("a")):
        with pytest.raises(error) as caught:
            action()
        assert store.url_of("a") in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_object_that_may_not_be_deleted_is_an_error(s3, monkeypatch):
    store = Store.at(s3.fresh())

    def refuse(*_, **__):
        return {"Errors": [{"Key": "a", "Code": "AccessDenied", "Message": "no"}]}

    monkeypatch.setattr(store.filesystem, "call_s3", refuse)
    with pytest.raises(StorageError, match="AccessDenied"):
        store.delete(["a"])


@pytest.mark.parametrize("is_silent", [False, True])
def test_an_endpoint_that_is_dead_is_given_up(s3, monkeypatch, is_silent):
    import socket

    short = {"connect_timeout": 1, "read_timeout": 1, "retries": {"total_max_attempts": 2}}
    monkeypatch.setattr(clients, "S3_CONFIG", short)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if is_silent:  # it takes connections, and never answers
            listener.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(clients, "RETRY_AFTER_SECONDS", ())
        forget_clients()
        started = time.monotonic()
        try:
            with pytest.raises(StorageError, match=r"s3://bucket/dead/a"):
                Store.at("s3://bucket/dead").read_bytes("a")
        finally:
            forget_clients()
    assert time.monotonic() - started < 10


def test_the_waits_for_a_dead_endpoint_are_bounded():
    config = clients.S3_CONFIG
    attempts = config["retries"]["total_max_attempts"] * (1 + len(clients.RETRY_AFTER_SECONDS))
    assert attempts * config["read_timeout"] <= 300
    filesystem = Store.at("s3://bucket/a").filesystem
    assert filesystem.retries == 1
    assert filesystem.config_kwargs["read_timeout"] == config["read_timeout"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "names no bucket"),
        ("s3:///", "names no bucket"),
        ("nosuch://bucket/a", "unknown kind of storage"),
    ],
)
def test_urls_that_cannot_be_used_are_mistakes(url, message):
    with pytest.raises(InputError, match=message):
        Store.at(url)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    def fail(*_, **__):
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(clients.fsspec, "filesystem", fail)
    forget_clients()
    with pytest.raises(InputError, match=r"pip install 'acestep-ray\[gcs\]'"):
        Store.at("gs://bucket/a")
    forget_clients()


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/folder/"])
def test_a_file_needs_a_name(url):
    with pytest.raises(InputError, match="names no file"):
        StoredFile.at(url)


def test_places_are_paths_or_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store.at("a/../b/").url == str(tmp_path / "b") == Store.at(f"file://{tmp_path}/b").url
    assert Store.at("b").is_local
    assert Store.at("b").child("c").path == tmp_path / "b" / "c"
    assert StoredFile.at("b/C.WAV").local_path == tmp_path / "b" / "C.WAV"
    assert StoredFile.at(f"file://{tmp_path}/x").name == "x"
    assert StoredFile.at("b/C.WAV").suffix == ".wav"
    remote = StoredFile.at("memory://bucket/a/b.flac")
    assert (remote.store.url, remote.name, remote.local_path) == ("memory://bucket/a", "b.flac", None)
    assert str(remote) == remote.url == "memory://bucket/a/b.flac"
    assert Store.at("memory://bucket/a/").url == "memory://bucket/a"
    assert Store("/").file("a").url == "/a"
    assert [is_url(text) for text in ("s3://a", "/a/s3://b", "a:b", Path("a"), "memory://a\nb")] == [
        True, False, False, False, True,
    ]  # fmt: skip


def test_local_links_to_files_are_listed_and_broken_ones_are_not(tmp_path):
    store = Store.at(tmp_path / "store")
    store.write_bytes("a", b"text")
    (store.path / "link").symlink_to(store.path / "a")
    (store.path / "broken").symlink_to(store.path / "none")
    os.mkfifo(store.path / "pipe")
    assert list(store.names()) == ["a", "link"]
    assert store.status("pipe") is store.status("broken") is None
    assert store.status("link").size == 4


# --- the Hugging Face Hub


@pytest.fixture
def hub(monkeypatch):
    """A repository with two files."""
    with hub_server({"a b.txt": b"0123456789", "sub/ü🎵.wav": bytes(range(200)) * 100}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        forget_clients()
        yield server
        forget_clients()


def test_a_repository_of_the_hub_is_read(hub, tmp_path):
    store = Store.at(f"hf://datasets/{REPOSITORY}")
    assert list(store.names()) == ["a b.txt", "sub/ü🎵.wav"]
    assert list(store.child("sub").names()) == ["ü🎵.wav"]
    assert (
        store.status("a b.txt") == store.names()["a b.txt"] == FileStatus(10, store.status("a b.txt").version)
    )
    assert store.status("none") is None
    assert store.names("none") == {}
    assert store.read_bytes("a b.txt") == b"0123456789"
    assert store.read_range("a b.txt", 8, 10) == b"89"
    assert store.read_range("a b.txt", 10, 10) == b""
    with store.open("sub/ü🎵.wav") as file:
        file.seek(-10, io.SEEK_END)
        assert file.read() == bytes(range(190, 200))
    store.download("a b.txt", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789"
    for read in (store.read_bytes, store.open, lambda name: store.read_range(name, 0, 5)):
        with pytest.raises(FileNotFoundError, match="none"):
            read("none")


def test_reads_of_the_hub_are_single_requests(hub):
    store = Store.at(f"hf://datasets/{REPOSITORY}")
    store.names()
    for action in (
        lambda: store.read_bytes("a b.txt"),
        lambda: store.read_range("a b.txt", 2, 3),
        lambda: store.status("a b.txt"),
    ):
        before = len(hub.requests)
        action()
        assert len(hub.requests) == before + 1


def test_changes_on_the_hub_are_seen(hub):
    store = Store.at(f"hf://datasets/{REPOSITORY}")
    before = store.names()["a b.txt"]
    hub.files |= {"a b.txt": b"9876543210", "new": b""}
    assert store.status("a b.txt").version != before.version
    assert store.names()["a b.txt"] == store.status("a b.txt")
    assert "new" in store.names()


def test_the_hub_is_read_by_many_threads(hub):
    store = Store.at(f"hf://datasets/{REPOSITORY}")
    barrier = threading.Barrier(8)

    def use(i: int) -> bytes:
        barrier.wait()
        return store.read_range("a b.txt", i, 1)

    with ThreadPoolExecutor(8) as pool:
        assert b"".join(pool.map(use, range(8))) == b"01234567"


def test_a_repository_that_does_not_exist_is_empty_and_none_is_written_to(hub):
    store = Store.at("hf://datasets/user/none")
    assert store.names() == {}
    assert store.status("a") is None
    for write in (
        lambda: store.write_bytes("a", b""),
        lambda: store.writer("a").__enter__(),
        lambda: store.delete(["a"]),
        lambda: store.move("a", "b"),
    ):
        with pytest.raises(InputError, match="not written to"):
            write()
