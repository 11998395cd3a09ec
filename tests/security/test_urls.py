"""URLs of strangers: not this machine's, not a metadata service's, and no more bytes or seconds than a bound."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from acestep_ray import cli
from acestep_ray.cache.decoding import decode_song, file_versions
from acestep_ray.cache.songs import Recipe, Reject, Settings, Song
from acestep_ray.errors import InputError
from acestep_ray.storage import StorageError, Store, StoredFile, http
from acestep_ray.storage import clients as storage_clients

SPELLINGS = (
    *("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0x7f000001", "0.0.0.0", "127.8.9.1", "[::]"),
    *("[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[::127.0.0.1]", "[2002:7f00:1::1]"),
)
METADATA = ("169.254.169.254", "[fd00:ec2::254]", "[fe80::1]", "[::ffff:169.254.169.254]", "100.100.100.200")
UNRESOLVED = ("2130706433", "017700000001", "127.1", "2852039166", "0xa9fea9fe")


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/latest/meta-data/")
            self.send_header("Content-Length", "0")
        else:
            self.send_response(200)
            if self.path != "/no-length":
                self.send_header("Content-Length", str(1 << 40) if self.path == "/huge" else "5")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        if self.path == "/huge":
            while not self.wfile.closed:
                try:
                    self.wfile.write(bytes(1 << 16))
                except OSError:
                    return
        elif not self.path.startswith("/redirect"):
            self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def only_redirects_refused(monkeypatch):
    """The test's own server is allowed, all else is as it is."""
    refused = http.is_refused
    monkeypatch.setattr(http, "is_refused", lambda address: address != "127.0.0.1" and refused(address))
    storage_clients.filesystem_of.cache_clear()


@pytest.mark.parametrize("host", [*SPELLINGS, *METADATA, *UNRESOLVED])
def test_no_spelling_of_this_machine_or_of_a_metadata_service_is_asked(server, host, monkeypatch):
    monkeypatch.setattr(storage_clients, "RETRY_AFTER_SECONDS", ())
    file = StoredFile.at(f"http://{host}:{server.server_port}/latest/a.wav")
    for read in (file.status, file.read_bytes, file.open):
        try:
            found = read()
        except (InputError, FileNotFoundError, StorageError):
            continue
        assert found is None
    assert not server.asked
    if host not in UNRESOLVED:
        with pytest.raises(InputError, match=http.ALLOW_LOCAL_URLS):
            file.read_bytes()


def test_a_name_that_leads_there_is_refused(monkeypatch):
    async def resolve(*_: object, **__: object):
        return [{"hostname": "music.example", "host": "169.254.169.254", "port": 80}]

    monkeypatch.setattr("aiohttp.TCPConnector._resolve_host", resolve)
    with pytest.raises(InputError, match=r"music\.example, which leads to 169\.254\.169\.254"):
        StoredFile.at("http://music.example/a.wav").status()


@pytest.mark.usefixtures("only_redirects_refused")
def test_a_redirect_to_a_metadata_service_is_not_followed(server):
    file = StoredFile.at(f"http://127.0.0.1:{server.server_port}/redirect/a.wav")
    for read in (file.status, file.read_bytes):
        with pytest.raises(InputError, match=r"169\.254\.169\.254"):
            read()


def test_a_user_may_allow_them(server, monkeypatch):
    monkeypatch.setenv(http.ALLOW_LOCAL_URLS, "1")
    file = StoredFile.at(f"http://127.0.0.1:{server.server_port}/a.wav")
    assert file.read_bytes() == b"hello"
    assert file.store.read_range("a.wav", 0, 3) == b"hel"


@pytest.mark.parametrize("protocol", ["ftp", "sftp", "ssh", "smb", "webhdfs"])
def test_other_protocols_that_name_machines_are_looked_at(protocol):
    with pytest.raises(InputError, match=http.ALLOW_LOCAL_URLS):
        Store.at(f"{protocol}://169.254.169.254/songs")


@pytest.mark.parametrize("protocol", ["simplecache", "reference", "generic", "dir", "zip", "github", "data"])
def test_protocols_that_read_through_others_are_refused(protocol):
    with pytest.raises(InputError, match="unknown kind of storage"):
        Store.at(f"{protocol}://http://169.254.169.254/songs")


@pytest.mark.usefixtures("only_redirects_refused")
def test_an_answer_without_end_is_cut(server, monkeypatch):
    monkeypatch.setattr(http, "_MOST_BYTES", 1 << 20)
    store = Store.at(f"http://127.0.0.1:{server.server_port}/")
    started = time.monotonic()
    with pytest.raises(StorageError, match="longer than"):
        store.read_bytes("huge")
    assert len(store.read_range("huge", 0, 1000)) == 1000
    with pytest.raises(StorageError, match="only whole"):
        store.read_range("huge", 5, 1000)
    with pytest.raises(StorageError, match="is not downloaded"):
        store.download("huge", "/nowhere/at/all")
    with pytest.raises(StorageError, match="does not say how large"):
        store.status("no-length")
    assert time.monotonic() - started < 20


def test_a_row_with_such_a_url_costs_its_song(tmp_path):
    recipe = Recipe(Settings(tag_shuffles=1, ssl_frame_stride=1, seed=0, speaker_dim=6), {})
    root = Store.at(tmp_path)
    urls = ("http://169.254.169.254/a.wav", "http://localhost/a.wav", "generic://a/b")
    for filename in (*urls, "\ud800.wav", "a" * 300):
        song = Song("a", filename, ["pop"], {}, "la", "en", "")
        (outcome,) = decode_song(root, song, recipe, file_versions(root, song))
        assert isinstance(outcome, Reject), filename


def test_a_lora_or_dataset_at_such_a_url_is_a_mistake(capsys):
    for arguments in (
        ["info", "http://169.254.169.254/lora.safetensors"],
        ["prepare", "--data_dir", "http://[::1]/songs.csv", "--output_dir", "/tmp/nowhere/at/all"],
    ):
        assert cli.main(arguments) == 2, arguments
        assert http.ALLOW_LOCAL_URLS in capsys.readouterr().err
