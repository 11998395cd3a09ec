"""What is installed: the version, the licences and every file that the package reads."""

from __future__ import annotations

import ast
import email
import hashlib
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

import acestep_ray
from tests.deploy.builder import ROOT

PACKAGE = ROOT / "acestep_ray"
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)

# https://www.apache.org/licenses/LICENSE-2.0.txt
APACHE_2_0 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


@pytest.fixture(scope="session")
def wheel(image) -> zipfile.ZipFile:
    """The wheel that the image's steps build."""
    (path,) = image.path("wheel", "/wheels").glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="session")
def metadata(wheel) -> email.message.Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_string(wheel.read(name).decode("utf-8"))


def test_the_licence_is_apache_2_0_to_the_letter():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_0


def test_the_notice_names_every_model_that_fetch_downloads():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for model in ("ACE-Step-v1-3.5B", "MERT-v1-330M", "mHuBERT-147"):
        assert re.search(rf"{re.escape(model)} .*(Apache License 2.0|CC BY-NC)", notice)


def test_the_changelog_begins_with_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == acestep_ray.__version__


def test_the_version_is_written_in_one_place():
    assert 'dynamic = ["version"]' in PYPROJECT
    written = [
        path.relative_to(ROOT)
        for path in [ROOT / "pyproject.toml", *PACKAGE.rglob("*.py")]
        if f'"{acestep_ray.__version__}"' in path.read_text(encoding="utf-8")
    ]
    assert written == [Path("acestep_ray/__init__.py")]


def test_the_source_is_of_the_oldest_python_that_is_promised():
    oldest = tuple(map(int, PYTHONS[0].split(".")))
    for path in PACKAGE.rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=oldest)


@pytest.mark.deploy
@pytest.mark.parametrize("version", PYTHONS)
def test_each_promised_python_at_hand_compiles_it(version, tmp_path):
    found = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for python in filter(None, found):
        if subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0:
            break
    else:
        pytest.skip(f"there is no Python {version} here")
    target = tmp_path / "acestep_ray"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    command = [python, "-W", "error", "-m", "compileall", "-q", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.deploy
def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel, image):
    build = image.path("wheel", "/build")
    files = {path.relative_to(build) for path in (build / "acestep_ray").rglob("*") if path.is_file()}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == {path.as_posix() for path in files if not any(part[0] == "." for part in path.parts)}
    assert any(name.endswith(".json") for name in packed)


@pytest.mark.deploy
def test_the_wheel_says_what_it_is(wheel, metadata):
    assert metadata["Name"] == "acestep-ray"
    assert metadata["Version"] == acestep_ray.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert sorted(metadata.get_all("License-File")) == ["LICENSE", "NOTICE"]
    assert metadata["Requires-Python"] == f">={PYTHONS[0]}"
    for name in ("LICENSE", "NOTICE"):
        (packed,) = [each for each in wheel.namelist() if each.endswith(f".dist-info/licenses/{name}")]
        assert wheel.read(packed) == (ROOT / name).read_bytes()


@pytest.mark.deploy
def test_the_installed_package_finds_its_tables(image, tmp_path):
    script = (
        "from importlib.resources import files\n"
        "print(len(files('acestep_ray.data.lyrics').joinpath('tables.json').read_bytes()))"
    )
    done = image.run("python", "-c", script, cwd=tmp_path)
    assert int(done.stdout) == (PACKAGE / "data/lyrics/tables.json").stat().st_size


@pytest.mark.deploy
def test_every_module_of_the_installed_package_can_be_imported(image, tmp_path):
    script = """
import importlib, pkgutil, acestep_ray
for module in pkgutil.walk_packages(acestep_ray.__path__, "acestep_ray."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if not error.name.startswith("torchao"):  # of the extra `quantisation`
            raise
    print(module.name)
"""
    done = image.run("python", "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 80
