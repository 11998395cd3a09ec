from __future__ import annotations

from pathlib import Path

import pytest

from acestep_ray.data.file_names import locate_file
from acestep_ray.errors import InputError
from acestep_ray.storage import Store

ROOTS = ["/music/set", "memory://bucket/set", "/"]


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("a.wav", "a.wav"),
        ("audio/a.wav", "audio/a.wav"),
        ("./audio//x/../a.wav", "audio/a.wav"),
        ("..a/...wav", "..a/...wav"),
        (" a .wav ", " a .wav "),
        ("two\nlines 🎵#?%20.wav", "two\nlines 🎵#?%20.wav"),
        ("..\\a.wav", "..\\a.wav"),
        ("a:b/c.wav", "a:b/c.wav"),
    ],
)
def test_file_names_are_relative_to_the_root(root, filename, name):
    file = locate_file(Store.at(root), filename)
    assert (file.store, file.name) == (Store.at(root), name)
    assert file.url == f"{root.rstrip('/')}/{name}"


@pytest.mark.parametrize("root", ROOTS)
def test_absolute_paths_and_urls_are_taken_as_they_are(root):
    assert locate_file(Store.at(root), "/elsewhere/../a.wav").local_path == Path("/a.wav")
    assert locate_file(Store.at(root), "memory://other/x/a.wav").url == "memory://other/x/a.wav"
    assert locate_file(Store.at(root), "file:///x/a.wav").local_path == Path("/x/a.wav")


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize(
    "filename",
    [
        "../a.wav",
        "a/../../b.wav",
        "..",
        ".",
        "a/..",
        "",
        " ",
        "\n",
        "a\0.wav",
        "../set2/a.wav",
        "nosuch://a/b.wav",
        "s3://",
    ],
)
def test_file_names_that_leave_the_root_or_are_malformed_are_refused(root, filename):
    with pytest.raises(InputError):
        locate_file(Store.at(root), filename)


def test_symbolic_links_are_followed(tmp_path):
    (tmp_path / "outside.wav").write_bytes(b"x")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.wav").symlink_to(tmp_path / "outside.wav")
    assert locate_file(Store.at(tmp_path / "set"), "a.wav").read_bytes() == b"x"
