"""One file from a server that fails in every way a server can."""

from __future__ import annotations

import hashlib
import threading
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest

from acestep_ray.errors import AceStepError
from acestep_ray.fetch import download as download_module
from acestep_ray.fetch.download import (
    Content,
    Downloader,
    NotPublishedError,
    Patience,
    StoppedError,
    shown,
)
from tests.fetch.server import (
    answer_from,
    corrupt,
    cut,
    ignore_range,
    refuse,
    send_more,
    serving,
    stall,
)

FILE = bytes(range(256)) * 40
WHOLE = Content(size=len(FILE), sha256=hashlib.sha256(FILE).hexdigest())
QUICK = Patience(stall_seconds=0.3, attempts=3, first_wait_seconds=0.0)


class Noted:
    """What a download tells."""

    def __init__(self):
        self.bytes, self.lines = 0, []

    def add(self, num_bytes: int) -> None:
        self.bytes += num_bytes

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def server():
    with serving() as server:
        server.files["file"] = FILE
        server.faults["file"] = []
        yield server


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "folder/file"


def part_of(target: Path) -> Path:
    return target.with_name("file.part")


def bring(server, target, *, content=WHOLE, patience=QUICK, **options) -> Noted:
    noted = Noted()
    Downloader(patience=patience, **options).download(f"{server.url}/file", target, content, noted)
    return noted


def test_a_file_arrives_whole_and_its_bytes_are_told(server, target):
    noted = bring(server, target)
    assert target.read_bytes() == FILE
    assert not part_of(target).exists()
    assert (noted.bytes, noted.lines) == (len(FILE), [])


@pytest.mark.parametrize("held", [0, 1, 5000, len(FILE) - 1, len(FILE)])
def test_a_process_killed_at_any_byte_leaves_what_the_next_one_goes_on_from(server, target, held):
    target.parent.mkdir()
    part_of(target).write_bytes(FILE[:held])
    noted = bring(server, target)
    assert target.read_bytes() == FILE
    assert noted.bytes == len(FILE) - held
    ranges = [request.range for request in server.gets()]
    assert ranges == ([] if held == len(FILE) else [f"bytes={held}-" if held else None])


def test_a_connection_that_breaks_is_made_again_from_where_it_broke(server, target):
    server.faults["file"] = [cut(3000), cut(2000)]
    noted = bring(server, target)
    assert target.read_bytes() == FILE
    assert [request.range for request in server.gets()] == [None, "bytes=3000-", "bytes=5000-"]
    assert len(noted.lines) == 2


def test_attempts_that_get_further_are_not_counted(server, target):
    server.faults["file"] = [cut(100) for _ in range(20)]
    bring(server, target)
    assert target.read_bytes() == FILE
    assert len(server.gets()) == 21


def test_attempts_that_bring_nothing_come_to_an_end_and_the_part_stays(server, target):
    server.faults["file"] = [cut(3000), *(cut(0) for _ in range(9))]
    with pytest.raises(
        AceStepError, match=f"cannot download {server.url}/file: .* 3 times in a row"
    ) as error:
        bring(server, target)
    assert "it goes on where it stopped" in str(error.value)
    assert len(server.gets()) == 3
    assert part_of(target).read_bytes() == FILE[:3000]
    assert not target.exists()


def test_a_server_that_ignores_ranges_and_breaks_at_one_place_comes_to_an_end(server, target):
    server.faults["file"] = [cut(3000), *(send_short(3000) for _ in range(9))]
    with pytest.raises(AceStepError, match=f"ended after 3000 of {len(FILE)} bytes, 3 times in a row"):
        bring(server, target)
    assert len(server.gets()) == 3


def send_short(count: int):
    def answer(handler, content):
        handler.send(200, content[:count])

    return answer


def test_a_connection_that_stalls_is_given_up_and_made_again(server, target):
    server.faults["file"] = [stall(3000), stall(0)]
    noted = bring(server, target)
    assert target.read_bytes() == FILE
    assert [request.range for request in server.gets()] == [None, "bytes=3000-", "bytes=3000-"]
    assert "timed out" in noted.lines[0].lower()


def test_a_server_that_only_stalls_is_an_error_and_no_hang(server, target):
    server.faults["file"] = [stall(0) for _ in range(9)]
    with pytest.raises(AceStepError, match="3 times in a row"):
        bring(server, target)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again(server, target, status):
    server.faults["file"] = [refuse(status), refuse(status)]
    noted = bring(server, target)
    assert target.read_bytes() == FILE
    assert all(f"the server answers {status}" in line for line in noted.lines)


def waits_of(server, target, monkeypatch, patience) -> list[float]:
    waits = []
    downloader = Downloader(patience=patience)
    monkeypatch.setattr(downloader._stopped, "wait", waits.append)
    downloader.download(f"{server.url}/file", target, WHOLE, Noted())
    return waits


def test_waits_grow_up_to_a_bound(server, target, monkeypatch):
    server.faults["file"] = [refuse(503) for _ in range(5)]
    patience = Patience(attempts=6, first_wait_seconds=2.0, longest_wait_seconds=10.0)
    assert waits_of(server, target, monkeypatch, patience) == [2, 4, 8, 10, 10]


def test_the_wait_that_the_server_asks_for_is_kept(server, target, monkeypatch):
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=100), usegmt=True)
    server.faults["file"] = [
        refuse(429, Retry_After="7"),
        refuse(503, Retry_After=date),
        refuse(503, Retry_After="soon"),
        refuse(503, Retry_After="99999999"),
    ]
    seconds, dated, unknown, absurd = waits_of(server, target, monkeypatch, Patience(first_wait_seconds=1.0))
    assert seconds == 7
    assert 60 < dated <= 100
    assert unknown == 4
    assert absurd == 600


def test_a_file_that_is_not_published_is_not_asked_for_again(server, target):
    del server.files["file"]
    with pytest.raises(NotPublishedError, match=f"cannot download {server.url}/file: the server answers 404"):
        bring(server, target)
    assert len(server.gets()) == 1


def test_a_file_that_may_not_be_read_says_so_once(server, target):
    server.faults["file"] = [refuse(401)]
    with pytest.raises(AceStepError, match=r"answers 401.*\n.*HF_TOKEN"):
        bring(server, target)
    assert len(server.gets()) == 1


def test_a_server_that_is_not_there_is_named(server, target):
    with pytest.raises(
        AceStepError, match=r"cannot download http://127\.0\.0\.1:9/file: .* 3 times in a row"
    ):
        Downloader(patience=QUICK).download("http://127.0.0.1:9/file", target, WHOLE, Noted())


@pytest.mark.parametrize(
    "content",
    [
        WHOLE,
        Content(
            size=len(FILE),
            git_blob=hashlib.sha1(b"blob %d\0" % len(FILE) + FILE).hexdigest(),
        ),
    ],
)
def test_a_file_with_another_sum_is_deleted_and_said(server, target, content):
    server.faults["file"] = [corrupt]
    with pytest.raises(
        AceStepError, match=r"/file came with .* and not [0-9a-f]{40,64}; the file was deleted"
    ):
        bring(server, target, content=content)
    assert list(target.parent.iterdir()) == []
    bring(server, target, content=content)
    assert target.read_bytes() == FILE


def test_a_file_of_another_size_is_not_even_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"12345")
    monkeypatch.setattr(download_module, "file_sha256", lambda path: pytest.fail("it was read"))
    assert Content(size=6, sha256=WHOLE.sha256).mismatch(tmp_path / "file") == "5 bytes and not 6"
    assert Content(size=5).mismatch(tmp_path / "file") is None


def test_a_part_of_another_file_is_found_by_the_sum(server, target):
    target.parent.mkdir()
    part_of(target).write_bytes(b"?" * 100)
    with pytest.raises(AceStepError, match="came with SHA-256"):
        bring(server, target)
    bring(server, target)
    assert target.read_bytes() == FILE


@pytest.mark.parametrize("fault", [ignore_range, answer_from(0), answer_from(10)])
def test_a_server_that_does_not_send_what_was_asked_for_costs_no_wrong_byte(server, target, fault):
    target.parent.mkdir()
    part_of(target).write_bytes(FILE[:3000])
    server.faults["file"] = [fault]
    noted = bring(server, target)
    assert target.read_bytes() == FILE
    assert noted.bytes == len(FILE) - 3000


def test_of_a_server_that_sends_more_only_the_file_is_taken(server, target):
    server.faults["file"] = [send_more(1_000_000)]
    noted = bring(server, target)
    assert target.read_bytes() == FILE
    assert noted.bytes == len(FILE)
    assert len(server.gets()) == 1


@pytest.mark.parametrize("held", [len(FILE) + 1, 2 * len(FILE)])
def test_a_part_longer_than_the_file_is_begun_anew(server, target, held):
    target.parent.mkdir()
    part_of(target).write_bytes(b"?" * held)
    bring(server, target)
    assert target.read_bytes() == FILE


def test_a_server_whose_file_is_shorter_than_the_part_is_asked_from_the_start(server, target):
    target.parent.mkdir()
    part_of(target).write_bytes(FILE[:3000])
    server.faults["file"] = [refuse(416)]
    bring(server, target)
    assert [request.range for request in server.gets()] == ["bytes=3000-", None]
    assert target.read_bytes() == FILE


def test_a_file_of_unknown_size_is_taken_as_far_as_it_goes(server, target):
    unknown = Content(sha256=WHOLE.sha256)
    bring(server, target, content=unknown)
    assert target.read_bytes() == FILE
    target.rename(part_of(target))  # whole, and killed before it was renamed
    bring(server, target, content=unknown)
    assert target.read_bytes() == FILE


def test_the_token_goes_to_its_server_alone(server, target):
    with serving() as other:
        other.files["file"] = FILE
        server.faults["file"] = [refuse(302, Location=f"{other.url}/file?Signature=x")]
        bring(server, target, token="hf_secret", token_for=f"{server.url}/any")
        assert [request.authorization for request in server.gets()] == ["Bearer hf_secret"]
        assert [request.authorization for request in other.gets()] == [None]
        other.faults["file"] = [refuse(302, Location=f"{server.url}/file")]
        target.unlink()
        server.requests.clear()
        Downloader(token="hf_secret", token_for=other.url).download(
            f"{other.url}/file", target, WHOLE, Noted()
        )
        assert [request.authorization for request in server.gets()] == [None]
    assert target.read_bytes() == FILE


def test_a_redirect_of_the_same_server_keeps_the_token(server, target):
    server.files["renamed"] = FILE
    server.faults["file"] = [refuse(307, Location="/renamed")]
    bring(server, target, token="hf_secret", token_for=server.url)
    assert [request.authorization for request in server.gets("renamed")] == ["Bearer hf_secret"]


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/file"])
def test_a_redirect_leads_to_no_other_kind_of_place(server, target, place):
    server.faults["file"] = [refuse(302, Location=place)]
    with pytest.raises(AceStepError, match=f"it redirects to {place}"):
        bring(server, target)


def test_redirects_that_go_round_come_to_an_end(server, target):
    server.faults["file"] = [refuse(302, Location="/file") for _ in range(99)]
    with pytest.raises(AceStepError, match="redirects again and again"):
        bring(server, target)


def test_messages_hold_no_password_and_no_signature():
    assert shown("https://me:password@host:1/a/file?Signature=secret#x") == "https://host:1/a/file"
    assert shown("no address") == "no address"


def test_what_a_stop_interrupts_ends_and_leaves_its_part(server, target):
    downloader = Downloader(patience=Patience(stall_seconds=0.3, first_wait_seconds=3600.0))
    server.faults["file"] = [stall(3000)]
    ended = []

    class Stopping(Noted):
        def say(self, line: str) -> None:  # it is about to wait for an hour
            downloader.stop()

    def work() -> None:
        with pytest.raises(StoppedError):
            downloader.download(f"{server.url}/file", target, WHOLE, Stopping())
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert ended == [True]
    assert len(server.gets()) == 1
    assert part_of(target).read_bytes() == FILE[:3000]


def test_a_disk_that_fails_is_told_with_the_file(server, target, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download_module.os, "fsync", full)
    with pytest.raises(AceStepError, match=rf"cannot write {part_of(target)}: .*No space left"):
        bring(server, target)


def test_what_the_hub_forbids_offline_says_how_to_allow_it(server, target, monkeypatch):
    def offline(*_, **__):
        raise download_module.OfflineModeIsEnabled

    monkeypatch.setattr(download_module, "get_session", offline)
    with pytest.raises(AceStepError, match="HF_HUB_OFFLINE"):
        bring(server, target)


class TestDescribe:
    def describe(self, server, name="file"):
        return Downloader(patience=QUICK).describe(f"{server.url}/{name}", Noted().say)

    def test_any_server_tells_the_size_and_its_tag_is_no_sum(self, server):
        found = self.describe(server)
        assert found.content == Content(size=len(FILE))
        assert found.commit is None

    def test_the_hub_tells_commit_and_sum_of_small_and_large_files_without_asking_its_store(self, server):
        with serving() as store:
            server.large_files_at = store
            server.commits["me/model"] = "c1"
            server.files |= {"me/model/resolve/c1/config.json": FILE, "me/model/resolve/c1/a.bin": FILE}
            small = self.describe(server, "me/model/resolve/main/config.json")
            large = self.describe(server, "me/model/resolve/main/a.bin")
            assert store.requests == []
        blob = hashlib.sha1(b"blob %d\0" % len(FILE) + FILE).hexdigest()
        assert (small.content, small.commit) == (Content(size=len(FILE), git_blob=blob), "c1")
        assert (large.content, large.commit) == (WHOLE, "c1")

    def test_a_server_that_takes_no_head_is_asked_for_one_byte(self, server, monkeypatch):
        handler = server.RequestHandlerClass
        monkeypatch.setattr(handler, "do_HEAD", lambda self: self.send(405, b""))
        assert self.describe(server).content == Content(size=len(FILE))
        assert [request.range for request in server.gets()] == ["bytes=0-0"]

    def test_a_file_that_is_not_there_is_said(self, server):
        with pytest.raises(NotPublishedError, match="404"):
            self.describe(server, "other")
