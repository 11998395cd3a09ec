"""Texts beside songs, lists of songs and settings that wait, that have no end, or that are larger than any text."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest
import soundfile

from acestep_ray.data.text_files import text_or_file
from acestep_ray.errors import InputError
from acestep_ray.plain_files import (
    JSON,
    LYRICS,
    PROMPT,
    SETTINGS,
    Limit,
    open_regular,
    read_limited,
    read_open,
)
from acestep_ray.storage import Store
from tests.security.bounded import acestep, run_bounded

SECONDS = 60


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    where = os.getcwd()
    os.chdir(path.parent)  # an address has 107 bytes
    try:
        server = socket.socket(socket.AF_UNIX)
        server.bind(path.name)
        server.close()
    finally:
        os.chdir(where)


def make_large(path):
    with open(path, "wb") as file:
        file.truncate(5 << 30)  # takes no room on disk


THINGS = {
    "a named pipe": make_pipe,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/ptmx"),
    "Is a directory": lambda path: path.mkdir(),
    "symbolic links": lambda path: path.symlink_to(path),
    "the kernel makes up": lambda path: path.symlink_to("/proc/self/environ"),
    "larger than": make_large,
}
READABLE = {kind: kind for kind in THINGS} | {"a terminal": "a device"}


@pytest.fixture
def songs(tmp_path):
    folder = tmp_path / "songs"
    folder.mkdir()
    for name in ("a", "b"):
        soundfile.write(folder / f"{name}.wav", np.zeros(44_100), 44_100)
        (folder / f"{name}_prompt.txt").write_text("pop")
    return folder


@pytest.mark.parametrize("kind", THINGS)
def test_only_regular_files_are_opened(tmp_path, kind):
    THINGS[kind](tmp_path / "it")
    with pytest.raises(OSError, match=READABLE[kind]):
        read_limited(tmp_path / "it", LYRICS)


def test_a_file_that_grows_while_it_is_read_ends_at_the_limit(tmp_path):
    path = tmp_path / "grows"
    path.write_bytes(b"x" * 100)
    assert read_limited(path, Limit(100, "texts")) == b"x" * 100
    with open_regular(path) as file, open(path, "ab") as more:
        file.read(50)
        more.write(b"y" * 1000)
        more.flush()
        with pytest.raises(OSError, match="larger than 60 bytes, the limit of texts"):
            read_open(file, Limit(60, "texts"), "grows")


def test_objects_are_read_up_to_the_limit(tmp_path):
    store = Store.at("memory://limits")
    store.write_bytes("a", b"x" * 101)
    store.write_bytes("empty", b"")
    assert store.read_bytes("a", Limit(101, "texts")) == b"x" * 101
    assert store.read_bytes("empty", Limit(101, "texts")) == b""
    with pytest.raises(OSError, match="larger than 100 bytes"):
        store.read_bytes("a", Limit(100, "texts"))


@pytest.mark.parametrize("kind", THINGS)
def test_prepare_neither_waits_for_nor_reads_what_is_no_text(songs, tmp_path, kind):
    """All kinds of texts in one call; a folder is no file beside a song."""
    names = [
        "b_lyrics.txt",
        "a.json",
        "a.caption.txt",
        "a_recaption.json",
        "b.txt",
        "metadata.csv",
        "list.json",
    ]
    for name in names:
        THINGS[kind](songs / name)
    done = acestep("prepare", "--data_dir", songs, "--output_dir", tmp_path / "set", seconds=SECONDS)
    assert "Traceback" not in done.stderr
    if kind == "Is a directory":
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 2, done.stderr
    for name in names[:5]:
        assert f"{name}: cannot be read (" in done.stderr
    assert READABLE[kind] in done.stderr


def test_a_source_that_is_no_regular_file_is_a_mistake(tmp_path, songs):
    places = []
    for number, kind in enumerate(kind for kind in THINGS if kind not in ("larger than", "Is a directory")):
        for name in ("list.csv", "list.json", "list.parquet", "songs.tar", "folder/song.wav"):
            place = tmp_path / str(number) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            THINGS[kind](place)
            places.append(str(place.parent if name.startswith("folder") else place))
    program = f"""
import sys
from acestep_ray import cli
for place in {places!r}:
    code = cli.main(["prepare", "--data_dir", place, "--output_dir", {str(tmp_path / "set")!r}])
    print("code", code, place)
"""
    done = run_bounded(["-c", program], seconds=SECONDS)
    assert done.stdout.count("code 2") == len(places), done.stdout + done.stderr


@pytest.mark.parametrize("kind", [kind for kind in THINGS if kind != "Is a directory"])
def test_lyrics_and_prompts_of_generate(tmp_path, kind):
    THINGS[kind](tmp_path / "words.txt")
    for limit in (LYRICS, PROMPT):
        with pytest.raises(InputError, match=READABLE[kind]):
            text_or_file(str(tmp_path / "words.txt"), tmp_path, words_name_files=True, limit=limit)


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "larger than", "symbolic links"])
def test_settings_search_spaces_batches_and_lora_configurations(tmp_path, kind):
    """In one process, since each command takes seconds to start."""
    path = tmp_path / "it"
    THINGS[kind](path)
    program = f"""
from pathlib import Path
from acestep_ray import cli
from acestep_ray.config import GenerateConfig
from acestep_ray.errors import InputError
from acestep_ray.generation.requests import songs_of_file
from acestep_ray.models.weights import read_json
from acestep_ray.training.experiment import read_json as read_note
from acestep_ray.storage import Store
from acestep_ray.training.lora_config import read_lora_config
from acestep_ray.tuning.space import _read_file
path = {str(path)!r}
for read in (
    lambda: cli.check_settings_files(["--config", path]),
    lambda: songs_of_file(Path(path), GenerateConfig(checkpoint_dir="c", output_dir="o", batch_path=path), 512),
    lambda: read_lora_config(path),
    lambda: read_json(Path(path)),
    lambda: read_note(Store.at({str(tmp_path)!r}), "it"),
    lambda: _read_file(path),
):
    try:
        read()
    except InputError as error:
        print("refused", error)
"""
    done = run_bounded(["-c", program], seconds=SECONDS)
    assert done.stdout.count("refused") == 6, done.stdout + done.stderr


def test_limits_are_told(tmp_path, songs):
    (songs / "a_lyrics.txt").write_bytes(b"la\n" * (LYRICS.size // 3 + 1))
    (songs / "b_prompt.txt").write_bytes(b"x" * (PROMPT.size + 1))
    (songs / "b.json").write_bytes(b'{"caption": "' + b" " * JSON.size + b'"}')
    done = acestep("prepare", "--data_dir", songs, "--output_dir", tmp_path / "set", seconds=SECONDS)
    assert done.returncode == 2
    assert "a_lyrics.txt: cannot be read (larger than 1 MB, the limit of lyrics)" in done.stderr
    assert (
        "b_prompt.txt: cannot be read (larger than 64 KB, the limit of prompts and captions)" in done.stderr
    )
    assert "b.json: cannot be read (larger than 16 MB, the limit of JSON files)" in done.stderr
    settings = tmp_path / "settings.yaml"
    settings.write_bytes(b"#" * (SETTINGS.size + 1))
    done = acestep("prepare", "--config", settings, seconds=SECONDS)
    assert done.returncode == 2
    assert "larger than 1 MB, the limit of settings files" in done.stderr
