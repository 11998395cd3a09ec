"""Paths as people write them: with `~`, in lists, in URIs, and in commands to paste."""

from __future__ import annotations

import getpass
import os
import shlex
from pathlib import Path

import pytest

from acestep_ray.config import (
    EvaluateConfig,
    GenerateConfig,
    MixConfig,
    PrepareConfig,
    QuickstartConfig,
    TrainConfig,
    TuneConfig,
)
from acestep_ray.errors import InputError
from acestep_ray.names import check_run_name
from acestep_ray.paths import file_uri, path_of_file_uri, shell_command
from acestep_ray.quickstart import next_command
from acestep_ray.storage import Store, StoredFile, expand_home, split_paths

ODD_NAMES = ["a?b", "100%25", "50%", "a#b", "my songs", "a&b", "日本", 'a"b', "a'b", "a,b", "[x]"]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_home_folder_stands_for_a_tilde(home):
    user = getpass.getuser()
    assert expand_home("~") == str(home)
    assert expand_home("~/a b") == f"{home}/a b"
    assert expand_home(f"~{user}/a") == os.path.expanduser(f"~{user}/a") != f"~{user}/a"
    for unchanged in ("", ".", "./~x", "a/~/b", "/~", "s3://bucket/~/x", "~no-such-user-9/x", "http://~"):
        assert expand_home(unchanged) == unchanged


def test_a_tilde_without_a_home_folder_makes_no_folder_of_that_name(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(InputError, match="home folder is not known"):
        expand_home("~/x")


def test_settings_have_the_home_folder_in_their_paths_however_they_are_made(home):
    assert PrepareConfig("~/songs", "~/d").output_dir == f"{home}/d"
    assert PrepareConfig(data_dir=Path("~/songs"), output_dir="d").data_dir == f"{home}/songs"
    train = TrainConfig(
        dataset_path="~/c", checkpoint_dir="~", tracking_uri="sqlite:///~/m.db", exp_name="~x"
    )
    assert (train.dataset_path, train.checkpoint_dir) == (f"{home}/c", str(home))
    assert (train.tracking_uri, train.exp_name) == (f"sqlite:///{home}/m.db", "~x")
    assert TuneConfig("d", "c", space="~/s.yaml").space == f"{home}/s.yaml"
    assert QuickstartConfig(songs="~/s").songs == f"{home}/s"
    assert MixConfig("~/a, ~/b,s3://b/~", "o").lora_path == f"{home}/a, {home}/b,s3://b/~"
    assert EvaluateConfig("c", "o", models="base,~/a").models == f"base,{home}/a"
    assert GenerateConfig("c", prompt="~/words", lyrics="~ oh ~").prompt == "~/words"


def test_stores_and_files_are_found_below_the_home_folder(home):
    assert Store.at("~/x").url == f"{home}/x"
    assert Store.at(Path("~/x")).url == f"{home}/x"
    assert StoredFile.at("~/x/y.json").url == f"{home}/x/y.json"
    assert Store.at("file://~/x").url == f"{home}/x"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_file_uri_names_the_path_that_it_was_made_of(name, tmp_path):
    folder = tmp_path / name
    assert path_of_file_uri(file_uri(str(folder))) == str(folder)
    assert Store.at(file_uri(str(folder))).path == folder
    assert Store.at(file_uri(str(folder)).replace("file://", "file://localhost")).path == folder


def test_a_file_uri_that_was_written_unescaped_names_what_is_there(tmp_path):
    (tmp_path / "100%25").mkdir()
    assert Store.at(f"file://{tmp_path}/100%25").path == tmp_path / "100%25"


def test_a_comma_of_an_existing_path_separates_nothing(home, tmp_path):
    for name in ("a,b", "c", "home/d, e"):
        (tmp_path / name).mkdir()
    assert split_paths("a,b,c") == ["a,b", "c"]
    assert split_paths("c, a,b") == ["c", "a,b"]
    assert split_paths("~/d, e,c,x") == [f"{home}/d, e", "c", "x"]
    assert split_paths("x , y,,") == ["x", "y"]
    assert split_paths(r"s3://b/x\,y,z") == ["s3://b/x,y", "z"]
    (tmp_path / "end ").mkdir()
    assert split_paths("end ,c") == ["end ", "c"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_printed_command_is_one_that_a_shell_reads(name):
    made = GenerateConfig(checkpoint_dir=f"/{name}/c", lora_path=f"/{name}/l", prompt="it's, pop")
    words = shlex.split(next_command(QuickstartConfig(songs="s"), made))
    assert words[words.index("--checkpoint_dir") + 1] == f"/{name}/c"
    assert words[words.index("--lora_path") + 1] == f"/{name}/l"
    assert shlex.split(shell_command("mlflow", Path(name))) == ["mlflow", name]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "...",
        "a/b",
        "a\\b",
        "a\nb",
        "a\tb",
        "a\x1bb",
        "a\udce9",
        "a\u2028",
        "a,b",
        "-a",
        " a",
        "a ",
    ],
)
def test_a_name_that_no_later_command_takes_is_refused_at_the_start(name):
    with pytest.raises(InputError):
        check_run_name(name)


@pytest.mark.parametrize("name", ["日本 1", "a=b", "a:b", "my run", "a?b", "100%25", "~x", "a..b", "né"])
def test_other_names_are_taken(name):
    check_run_name(name)


def test_a_run_that_was_begun_under_a_name_with_a_comma_is_continued():
    check_run_name("a,b", is_new=False)


@pytest.mark.parametrize("place", ["a\nb", "a\tb", "\udce9/x", "x" * 256])
def test_a_path_to_write_is_text_of_one_line(place):
    with pytest.raises(InputError, match="name"):
        PrepareConfig("songs", place)
