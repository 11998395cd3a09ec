from __future__ import annotations

import resource
from collections import namedtuple

import pytest

from acestep_ray.doctor import machine
from acestep_ray.doctor.finding import Finding
from acestep_ray.doctor.machine import (
    check_decoders,
    check_disk,
    check_open_files,
    check_packages,
    check_python,
    check_shared_memory,
    existing_parent,
    installed_version,
)

NEEDED = ["ray[data,train]<3,>=2.60", "torch>=2.9", "transformers>=5.0", "peft>=0.18"]
EXTRA = ['s3fs>=2024.6; extra == "s3"', 'optuna>=4.0; extra == "search"', 'gcsfs; extra == "gcs"']
INSTALLED = {
    "ray": "2.60.0",
    "torch": "2.9.0+cu128",
    "transformers": "5.1",
    "peft": "0.18.0",
    "optuna": "4.1",
}


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]


def test_a_finding_is_one_line_whatever_it_holds():
    line = Finding("disk", "problem", "full\n  of files", "make\nroom").render()
    assert line == "problem  disk             full of files → make room"


def test_python_is_held_against_what_the_package_needs():
    assert check_python("3.11.2", ">=3.10").level == "ok"
    old = check_python("3.9.1", ">=3.10")
    assert old.level == "problem"
    assert "3.9.1" in old.found
    assert ">=3.10" in old.remedy


def test_packages_within_their_bounds_are_one_line():
    needed, extras = check_packages(NEEDED + EXTRA, INSTALLED.get)
    assert needed.level == "ok"
    assert "4 needed are here: torch 2.9.0+cu128, ray 2.60.0" in needed.found
    assert extras.level == "ok"


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        ("ray", "3.0.0", "ray 3.0.0, needed is <3,>=2.60"),
        ("ray", "2.59.1", "ray 2.59.1, needed"),
        ("peft", None, "peft is not installed, needed is >=0.18"),
    ],
)
def test_a_package_that_is_missing_or_out_of_its_bounds_is_a_problem(package, version, said):
    findings = list(check_packages(NEEDED, {**INSTALLED, package: version}.get))
    assert levels(findings)[0] == "problem"
    assert said in findings[0].found
    assert f"pip install '{package}" in findings[0].remedy
    assert not any("needed are here" in finding.found for finding in findings)


def test_extras_that_are_absent_are_said_with_what_they_would_give():
    *_, extras = check_packages(NEEDED + EXTRA, INSTALLED.get)
    assert "s3 (s3:// for songs" in extras.found
    assert "gcs (gs://" in extras.found
    assert "search" not in extras.found
    everything = {**INSTALLED, "s3fs": "2026", "gcsfs": "2026"}
    *_, extras = check_packages(NEEDED + EXTRA, everything.get)
    assert "all here" in extras.found


def test_every_extra_of_the_package_is_explained():
    metadata = machine.importlib.metadata.metadata("acestep-ray")
    assert set(metadata.get_all("Provides-Extra")) - {"dev"} == set(machine.EXTRAS)


def test_a_package_that_is_not_installed_has_no_version():
    assert installed_version("torch")
    assert installed_version("no-such-package-anywhere") is None


def test_few_open_files_are_a_warning():
    assert check_open_files(resource.RLIM_INFINITY).level == "ok"
    assert check_open_files(65_536).level == "ok"
    few = check_open_files(4096)
    assert (few.level, "4096" in few.found, "ulimit" in few.remedy) == ("warning", True, True)


def test_little_shared_memory_is_a_warning():
    assert check_shared_memory(30 * 10**9, 100 * 10**9).level == "ok"
    docker = check_shared_memory(64 * 2**20, 100 * 10**9)
    assert docker.level == "warning"
    assert "--shm-size=30g" in docker.remedy


@pytest.mark.parametrize(("free", "level"), [(1e12, "ok"), (10e9, "warning"), (1e8, "problem")])
def test_free_space_is_looked_at_where_a_directory_would_be_made(tmp_path, monkeypatch, free, level):
    asked = []
    usage = namedtuple("usage", "free")

    def disk_usage(path):
        asked.append(path)
        return usage(free)

    monkeypatch.setattr(machine.shutil, "disk_usage", disk_usage)
    finding = check_disk(str(tmp_path / "a/b"), "--exp_dir")
    assert (finding.level, asked) == (level, [tmp_path])
    assert "--exp_dir" in finding.found


def test_the_nearest_folder_that_is_there(tmp_path):
    assert existing_parent(tmp_path) == existing_parent(tmp_path / "a/b") == tmp_path


def test_formats_that_are_not_read_are_a_warning_with_the_reason():
    assert check_decoders("").level == "ok"
    without = check_decoders("torchcodec finds no FFmpeg that it can use")
    assert without.level == "warning"
    assert "no FFmpeg" in without.found
    assert "acestep-ray[torchcodec]" in without.remedy
