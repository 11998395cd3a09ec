"""The whole of a released checkpoint, from servers on this machine."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import signal
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from acestep_ray.errors import AceStepError, InputError
from acestep_ray.fetch import job
from acestep_ray.fetch.download import Patience
from acestep_ray.fetch.job import PART_NAMES, fetch_checkpoint
from acestep_ray.fetch.pins import PINS
from acestep_ray.models.checkpoint import ACE_STEP_V1, LYRIC_VOCAB_VARIABLE, PARTS, CheckpointDir, Release
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from tests.fetch.server import FileServer, corrupt, cut, refuse, serving, stall
from tests.processes import wait_until

REPOSITORY = "ACE-Step/tiny"
SSL_REPOSITORIES = {"mert": "m-a-p/tiny", "mhubert": "utter-project/tiny"}
VOCAB = "vocab.json"
WEIGHTS = "ace_step_transformer/diffusion_pytorch_model.safetensors"
QUICK = Patience(stall_seconds=1.0, attempts=2, first_wait_seconds=0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> CheckpointDir:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("released") / "tiny")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("HF_TOKEN", LYRIC_VOCAB_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(checkpoint, monkeypatch):
    """The Hub and GitHub in one, with the tiny checkpoint; large files lie at `hub.large_files_at`."""
    with serving() as server, serving() as store:
        server.commits = {REPOSITORY: "v1"} | dict.fromkeys(SSL_REPOSITORIES.values(), "c1")
        for name, content in contents(checkpoint.path).items():
            part, _, file = name.partition("/")
            if part in SSL_REPOSITORIES:
                server.files[f"{SSL_REPOSITORIES[part]}/resolve/c1/{file}"] = content
            elif part == "lyric_tokenizer":
                server.files[VOCAB] = content
            else:
                server.files[f"{REPOSITORY}/resolve/v1/{name}"] = content
        for repository in SSL_REPOSITORIES.values():
            server.files[f"{repository}/resolve/c1/README.md"] = b"not needed"
        store.files = server.files
        server.large_files_at = store
        monkeypatch.setattr(job.constants, "ENDPOINT", server.url)
        yield server


@pytest.fixture
def release(hub) -> Release:
    prefix = f"{REPOSITORY}/resolve/v1/"
    return Release(
        repository=REPOSITORY,
        revision="v1",
        files={
            path.removeprefix(prefix): hashlib.sha256(content).hexdigest()
            for path, content in hub.files.items()
            if path.startswith(prefix)
        },
        lyric_vocab_url=f"{hub.url}/{VOCAB}",
        lyric_vocab_sha256=hashlib.sha256(hub.files[VOCAB]).hexdigest(),
        ssl_repositories=SSL_REPOSITORIES,
    )


def contents(directory: Path) -> dict[str, bytes]:
    """Files by name, without those of fetching itself."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*.*")
        if path.name not in (PINS, ".fetch.lock")
    }


def all_requests(hub: FileServer) -> list:
    return hub.requests + hub.large_files_at.requests


def forget_requests(hub: FileServer) -> None:
    hub.requests.clear()
    hub.large_files_at.requests.clear()


def publish(hub: FileServer, commit: str) -> None:
    """Another commit of the SSL models, with another MERT."""
    for repository in SSL_REPOSITORIES.values():
        for path in [path for path in hub.files if path.startswith(f"{repository}/resolve/c1/")]:
            hub.files[path.replace("/c1/", f"/{commit}/")] = hub.files[path]
        hub.commits[repository] = commit
    config = json.loads(hub.files[f"m-a-p/tiny/resolve/{commit}/config.json"])
    hub.files[f"m-a-p/tiny/resolve/{commit}/config.json"] = json.dumps({**config, "new": 1}).encode()


def fetch(directory, release, **options):
    options = {"patience": QUICK, "stream": io.StringIO(), **options}
    return fetch_checkpoint(directory, release=release, **options)


def test_every_part_arrives_and_nothing_else(hub, release, tmp_path, checkpoint):
    told = io.StringIO()
    summary = fetch(tmp_path / "new", release, stream=told)
    assert contents(tmp_path / "new") == contents(checkpoint.path)
    assert summary.kept == []
    assert summary.num_bytes == sum(map(len, contents(checkpoint.path).values()))
    assert f"{len(summary.downloaded)} files, {summary.num_bytes / 1e6:.3g} MB, of which 0 B are there" in (
        told.getvalue()
    )
    assert "m-a-p/tiny c1" in summary.render()


def test_where_all_is_right_nothing_is_asked_for(hub, release, tmp_path):
    first = fetch(tmp_path, release)
    forget_requests(hub)
    second = fetch(tmp_path, release)
    assert all_requests(hub) == []
    assert sorted(second.kept) == sorted(first.downloaded)
    assert second.downloaded == []


def test_only_what_is_missing_or_changed_is_downloaded(hub, release, tmp_path, checkpoint):
    fetch(tmp_path, release)
    (tmp_path / "umt5-base/tokenizer.json").unlink()
    (tmp_path / "music_vocoder/config.json").write_text("{}")
    (tmp_path / "mert/config.json").write_text("{}")
    told = io.StringIO()
    summary = fetch(tmp_path, release, stream=told)
    changed = {"music_vocoder/config.json", "mert/config.json"}
    assert set(summary.downloaded) == {"umt5-base/tokenizer.json", *changed}
    assert contents(tmp_path) == contents(checkpoint.path)
    for name in changed:
        assert f"{tmp_path / name} is not the released file" in told.getvalue()


def test_a_broken_download_is_gone_on_with(hub, release, tmp_path, checkpoint):
    path = f"{REPOSITORY}/resolve/v1/{WEIGHTS}"
    store = hub.large_files_at
    store.faults[path] = [cut(100_000), *(cut(0) for _ in range(9))]
    with pytest.raises(AceStepError, match="it goes on where it stopped"):
        fetch(tmp_path, release, jobs=1)  # no other file is there in part
    assert not (tmp_path / WEIGHTS).exists()
    store.faults.clear()
    forget_requests(hub)
    told = io.StringIO()
    fetch(tmp_path, release, stream=told)
    assert [request.range for request in store.gets(WEIGHTS)] == ["bytes=100000-"]
    assert "of which 100 kB are there" in told.getvalue()
    assert contents(tmp_path) == contents(checkpoint.path)


def test_ctrl_c_ends_a_stalled_download_and_leaves_its_part(hub, release, tmp_path, request):
    part = tmp_path / f"{WEIGHTS}.part"

    def press_when_some_is_there() -> None:
        wait_until(lambda: part.exists() and part.stat().st_size > 0, lambda: False)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    # Other tests of this process may have left a handler of their own.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    store = hub.large_files_at
    store.faults[f"{REPOSITORY}/resolve/v1/{WEIGHTS}"] = [stall(100_000, press_when_some_is_there)]
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path, release, patience=Patience(stall_seconds=3600.0))
    # The process can end now, also where a server still has one of its threads wait.
    waiting = [thread for thread in threading.enumerate() if "(work)" in thread.name]
    assert all(thread.daemon for thread in waiting)
    held = part.stat().st_size
    assert 0 < held <= 100_000
    store.requests.clear()
    fetch(tmp_path, release)
    assert [sent.range for sent in store.gets(WEIGHTS)] == [f"bytes={held}-"]


def test_a_wrong_file_is_named_and_deleted(hub, release, tmp_path):
    hub.large_files_at.faults[f"{REPOSITORY}/resolve/v1/{WEIGHTS}"] = [corrupt]
    with pytest.raises(AceStepError, match=rf"{WEIGHTS} came with SHA-256 .* deleted"):
        fetch(tmp_path, release)
    assert list((tmp_path / "ace_step_transformer").glob("diffusion*")) == []


def test_files_of_the_ssl_models_are_held_against_the_hubs_sums(hub, release, tmp_path):
    for name, server in (("config.json", hub), ("model.safetensors", hub.large_files_at)):
        server.faults[f"m-a-p/tiny/resolve/c1/{name}"] = [corrupt]
        with pytest.raises(AceStepError, match=rf"m-a-p/tiny/resolve/c1/{name} came with .* deleted"):
            fetch(tmp_path / name, release, only="mert", jobs=1)
        assert not (tmp_path / name / "mert" / name).exists()


def test_a_disk_that_is_too_small_is_told_before_anything_is_downloaded(hub, release, tmp_path, monkeypatch):
    (tmp_path / "ace_step_transformer").mkdir()
    held = 100_000
    (tmp_path / f"{WEIGHTS}.part").write_bytes(hub.files[f"{REPOSITORY}/resolve/v1/{WEIGHTS}"][:held])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(job, "_SPARE_BYTES", 0)
    needed = sum(len(content) for path, content in hub.files.items() if not path.endswith("README.md")) - held
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed - 1))
    with pytest.raises(InputError) as error:
        fetch(tmp_path, release)
    assert f"{needed / 1e6:.3g} MB are to be downloaded, {(needed - 1) / 1e6:.3g} MB are free" in str(
        error.value
    )
    assert str(tmp_path) in str(error.value)
    assert [request for request in all_requests(hub) if request.method == "GET"] == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed))
    fetch(tmp_path, release)


class TestPins:
    def test_later_runs_and_other_machines_get_the_revision_of_the_first(
        self, hub, release, tmp_path, checkpoint
    ):
        fetch(tmp_path / "first", release)
        publish(hub, "c2")
        shutil.rmtree(tmp_path / "first/mert")
        fetch(tmp_path / "first", release)
        (tmp_path / "second").mkdir()
        shutil.copy(tmp_path / "first" / PINS, tmp_path / "second")
        fetch(tmp_path / "second", release)
        fetch(tmp_path / "new", release)
        assert contents(tmp_path / "first") == contents(tmp_path / "second") == contents(checkpoint.path)
        assert b'"new"' in (tmp_path / "new/mert/config.json").read_bytes()

    def test_what_is_noted_is_revision_size_and_sha256_of_every_file(self, hub, release, tmp_path):
        fetch(tmp_path, release)
        models = json.loads((tmp_path / PINS).read_text())["models"]
        assert {folder: model["revision"] for folder, model in models.items()} == {
            "mert": "c1",
            "mhubert": "c1",
        }
        for folder, model in models.items():
            assert model["files"] == {
                name: {
                    "size": (tmp_path / folder / name).stat().st_size,
                    "sha256": hashlib.sha256((tmp_path / folder / name).read_bytes()).hexdigest(),
                }
                for name in ("config.json", "model.safetensors")
            }

    def test_a_run_that_broke_off_has_noted_the_revision_already(self, hub, release, tmp_path, checkpoint):
        hub.faults[VOCAB] = [refuse(404)]
        with pytest.raises(AceStepError, match=f"cannot download {hub.url}/{VOCAB}.*404"):
            fetch(tmp_path, release, jobs=1)
        publish(hub, "c2")
        fetch(tmp_path, release)
        assert contents(tmp_path) == contents(checkpoint.path)

    def test_pickled_weights_are_taken_where_there_are_no_others(self, hub, release, tmp_path):
        weights = hub.files.pop("m-a-p/tiny/resolve/c1/model.safetensors")
        hub.files["m-a-p/tiny/resolve/c1/pytorch_model.bin"] = weights
        fetch(tmp_path, release, only="mert")
        assert (tmp_path / "mert/pytorch_model.bin").read_bytes() == weights
        assert "pytorch_model.bin" in json.loads((tmp_path / PINS).read_text())["models"]["mert"]["files"]
        del hub.files["m-a-p/tiny/resolve/c1/pytorch_model.bin"]
        with pytest.raises(AceStepError, match=r"cannot download .*/pytorch_model\.bin.*404"):
            fetch(tmp_path / "other", release, only="mert")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda pins: "{broken",
            lambda pins: json.dumps({**pins, "format": 2}),
            lambda pins: json.dumps(pins).replace('"config.json"', '"../config.json"'),
            lambda pins: json.dumps(pins).replace('"sha256"', '"md5"'),
            lambda pins: re.sub(r', "sha256": "\w+"', "", json.dumps(pins)),
            lambda pins: re.sub(r'"size": (\d+)', r'"size": "\1"', json.dumps(pins)),
            lambda pins: json.dumps(pins).replace("m-a-p/tiny", "m-a-p/other"),
            lambda pins: json.dumps(pins).replace('"mert"', '"../mert"'),
            lambda pins: json.dumps([pins]),
        ],
    )
    def test_a_damaged_file_of_pins_is_a_mistake_of_the_user(self, hub, release, tmp_path, damage):
        fetch(tmp_path, release)
        path = tmp_path / PINS
        path.write_text(damage(json.loads(path.read_text())))
        with pytest.raises(InputError, match=PINS):
            fetch(tmp_path, release)


class TestMirror:
    @pytest.fixture
    def mirror(self, hub):
        """A plain copy of the files, that tells nothing of commits and sums."""
        with serving() as server:
            server.files = {path: content for path, content in hub.files.items() if path != VOCAB}
            yield server

    def test_all_but_the_vocabulary_comes_from_it_and_it_gets_no_token(
        self, hub, mirror, release, tmp_path, checkpoint, monkeypatch
    ):
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        fetch(tmp_path / "first", release)
        (tmp_path / "second").mkdir()
        shutil.copy(tmp_path / "first" / PINS, tmp_path / "second")
        forget_requests(hub)
        fetch(tmp_path / "second", release, mirror=f"{mirror.url}/")
        assert contents(tmp_path / "second") == contents(checkpoint.path)
        assert {request.path for request in all_requests(hub)} == {VOCAB}
        assert {request.authorization for request in all_requests(hub) + mirror.requests} == {None}

    def test_one_that_does_not_tell_revisions_needs_those_of_the_hub(self, mirror, release, tmp_path):
        said = f"{mirror.url} does not tell the revision.*m-a-p/tiny\n.*{PINS}"
        with pytest.raises(AceStepError, match=said):
            fetch(tmp_path, release, mirror=mirror.url)
        mirror.files["m-a-p/tiny/resolve/main/config.json"] = b"{}"
        with pytest.raises(AceStepError, match=said):
            fetch(tmp_path, release, mirror=mirror.url)

    def test_one_that_tells_revisions_and_no_sums_is_not_enough(self, mirror, release, tmp_path, monkeypatch):
        mirror.commits = dict.fromkeys(SSL_REPOSITORIES.values(), "c1")
        handler = mirror.RequestHandlerClass
        monkeypatch.setattr(handler, "hub_headers", lambda *_: {"X-Repo-Commit": "c1"})
        with pytest.raises(AceStepError, match="does not tell the revision and the sums"):
            fetch(tmp_path, release, mirror=mirror.url)
        assert mirror.gets() == []

    def test_its_wrong_files_are_not_taken(self, mirror, release, tmp_path):
        mirror.files[f"{REPOSITORY}/resolve/v1/{WEIGHTS}"] = b"?" * 1000
        with pytest.raises(AceStepError, match=f"{mirror.url}.*{WEIGHTS} came with SHA-256"):
            fetch(tmp_path, release, mirror=mirror.url, only="transformer")

    @pytest.mark.parametrize("address", ["mirror", "ftp://mirror", "https://", "file:///tmp"])
    def test_what_is_no_address_is_told(self, release, tmp_path, address):
        with pytest.raises(InputError, match=f"--mirror {address}"):
            fetch(tmp_path, release, mirror=address)


def test_the_token_goes_to_the_hub_and_is_never_shown(hub, release, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    told = io.StringIO()
    hub.faults[f"{REPOSITORY}/resolve/v1/{WEIGHTS}"] = [refuse(503), refuse(401)]
    with pytest.raises(AceStepError, match="401") as error:
        fetch(tmp_path, release, stream=told)
    summary = fetch(tmp_path, release, stream=told)
    asked = [request for request in hub.requests if request.path != VOCAB]
    assert {request.authorization for request in asked} == {"Bearer hf_secret"}
    assert {request.authorization for request in hub.large_files_at.requests} == {None}
    for text in (told.getvalue(), str(error.value), summary.render()):
        assert "hf_secret" not in text
        assert "secret-of-the-store" not in text


def test_only_the_parts_that_are_named_are_downloaded(hub, release, tmp_path):
    summary = fetch(tmp_path, release, only="codec, lyric_vocab")
    assert {name.partition("/")[0] for name in contents(tmp_path)} == {"music_dcae_f8c8", "lyric_tokenizer"}
    assert sorted(summary.downloaded) == sorted(contents(tmp_path))
    with pytest.raises(InputError, match="no such part: 'vocals'"):
        fetch(tmp_path, release, only="codec,vocals")
    assert set(PART_NAMES) == {*PARTS, "lyric_vocab"}


def test_the_vocabulary_of_the_variable_is_taken_if_it_is_the_released_one(
    hub, release, tmp_path, monkeypatch
):
    monkeypatch.setenv(LYRIC_VOCAB_VARIABLE, str(tmp_path / "vocab.json"))
    (tmp_path / "vocab.json").write_bytes(hub.files[VOCAB])
    fetch(tmp_path / "a", release, only="lyric_vocab")
    assert all_requests(hub) == []
    (tmp_path / "vocab.json").write_text("{}")
    fetch(tmp_path / "b", release, only="lyric_vocab")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_two_processes_do_not_write_to_one_directory(hub, release, tmp_path):
    refused = []

    def second() -> None:
        with pytest.raises(InputError, match="another process downloads into this directory"):
            fetch(tmp_path, release)
        refused.append(True)

    def while_the_first_downloads() -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    hub.large_files_at.faults[f"{REPOSITORY}/resolve/v1/{WEIGHTS}"] = [stall(10, while_the_first_downloads)]
    fetch(tmp_path, release)
    assert refused == [True]


def test_a_directory_that_cannot_be_written_is_told(release, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"{tmp_path}/file/checkpoint"):
        fetch(tmp_path / "file/checkpoint", release)


def test_without_a_network_the_error_says_what_could_not_be_reached(release, tmp_path):
    with pytest.raises(AceStepError, match=r"cannot download http://127\.0\.0\.1:9/ACE-Step/tiny"):
        fetch(tmp_path, release, mirror="http://127.0.0.1:9", only="transformer")


def test_a_terminal_gets_a_bar_below_the_names_of_the_files(hub, release, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    summary = fetch(tmp_path, release, stream=terminal)
    drawn = terminal.getvalue()
    assert f"\r\x1b[2K{WEIGHTS}: whole\n" in drawn
    assert f"{len(summary.downloaded)} of {len(summary.downloaded)} files" in drawn
    assert drawn.rfind("\x1b[?25h") > drawn.rfind("\x1b[?25l")  # the cursor is back


def test_the_released_sums_are_whole():
    assert len(ACE_STEP_V1.files) == 11
    for sha256 in [*ACE_STEP_V1.files.values(), ACE_STEP_V1.lyric_vocab_sha256]:
        assert len(bytes.fromhex(sha256)) == 32
