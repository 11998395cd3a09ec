"""A run is tagged with what it ran with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from acestep_ray.tracking import environment, environment_tags


@pytest.fixture
def checkout(tmp_path) -> Callable[..., str]:
    """A git checkout in `tmp_path` with one file; runs git in it."""

    def git(*arguments: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *names, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-qm", "first")
    return git


def test_tags_name_the_versions_and_the_commit_of_this_package():
    import ray
    import torch

    tags = environment_tags()
    folder = Path(environment.__file__).parent
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert tags["version.torch"] == torch.__version__
    assert tags["version.ray"] == ray.__version__
    assert tags["version.python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"version.acestep_ray", "version.peft", "version.transformers", "platform"} <= set(tags)
    assert tags.get("mlflow.source.git.commit", "") == commit.stdout.strip()
    assert all(isinstance(value, str) for value in tags.values())


@pytest.mark.parametrize("place", ["in another checkout", "elsewhere"])
def test_an_installed_package_is_tagged_with_the_commit_of_the_current_folder(
    checkout, tmp_path, tmp_path_factory, monkeypatch, place
):
    folder = tmp_path_factory.mktemp("installed")
    if place == "in another checkout":  # one that has a virtual environment in it
        checkout("-C", str(folder), "init", "-q")
        checkout("-C", str(folder), "commit", "-qm", "another", "--allow-empty")
    installed = folder / "environment.py"
    installed.write_text("")
    monkeypatch.setattr(environment, "__file__", str(installed))
    monkeypatch.chdir(tmp_path)
    tags = environment_tags()
    assert tags["mlflow.source.git.commit"] == checkout("rev-parse", "HEAD")
    assert tags["mlflow.source.git.dirty"] == "false"
    (tmp_path / "a.py").write_text("2")
    assert environment_tags()["mlflow.source.git.dirty"] == "true"


def test_a_checkout_of_this_package_goes_before_the_current_folder(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "a.py"))
    monkeypatch.chdir(Path(__file__).parent)
    assert environment_tags()["mlflow.source.git.commit"] == checkout("rev-parse", "HEAD")


def test_without_git_there_are_no_tags_of_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert not [name for name in environment_tags() if "git" in name]
