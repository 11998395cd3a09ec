"""What the tests of deployment share: the image's steps carried out, linters, overlays built."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.builder import ROOT, Builder, Image, read_dockerfile


def pytest_collection_modifyitems(items):
    """Installing and linting take minutes where others use the same cores."""
    for item in items:
        if item.get_closest_marker("deploy"):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def image(tmp_path_factory) -> Image:
    """The Dockerfile's steps, carried out."""
    if sys.version_info < (3, 11):
        pytest.skip("the image's steps are for its Python, 3.11")
    _, stages = read_dockerfile((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    return Builder(tmp_path_factory.mktemp("image")).build(stages)


@pytest.fixture(scope="session")
def linter() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a linter that `make test-deploy` installs."""

    def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = Path(sys.prefix) / "linters" / "bin" / name
        if not command.exists():
            pytest.skip(f"{name} is not installed: make test-deploy")
        return subprocess.run(
            [command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
        )

    return run


@pytest.fixture(scope="session")
def kustomize() -> Callable[[Path], list[dict[str, Any]]]:
    """The Kubernetes objects that `kubectl apply -k` sends of a folder; not to be changed, for others get them too."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    built: dict[Path, list[dict[str, Any]]] = {}

    def build(folder: Path) -> list[dict[str, Any]]:
        if folder not in built:
            done = subprocess.run(
                ["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, done.stderr
            built[folder] = list(
                yaml.load_all(done.stdout, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            )
        return built[folder]

    return build
