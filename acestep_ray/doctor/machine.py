"""This machine: Python, packages, limits of the system, disks, what decodes audio."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from acestep_ray.doctor.finding import Finding, ok, problem, warning

PACKAGE = "acestep-ray"
# What an extra of pyproject.toml is for; `dev` is for who changes the program.
EXTRAS = {
    "s3": "s3:// for songs, caches and checkpoints",
    "gcs": "gs:// for songs, caches and checkpoints",
    "torchcodec": "m4a, aac, wma and webm songs",
    "quantisation": "train --optimizer adamw-8bit",
    "search": "tune --searcher optuna",
}

OPEN_FILES = 65_536
SHARED_MEMORY_SHARE = 0.3
"""Share of a machine's memory that Ray's object store takes by default."""
_GB = 1e9
_LITTLE_SPACE, _NO_SPACE = 20 * _GB, 1 * _GB


def check_python(version: str, requires: str) -> Finding:
    """`requires` are the versions that the package needs, such as `>=3.10`."""
    found = f"{version} on {platform.platform()}"
    if version in SpecifierSet(requires):
        return ok("python", found)
    return problem("python", f"{found}, needed is {requires}", f"make an environment with Python {requires}")


def installed_version(package: str) -> str | None:
    """None where a package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(
    requirements: Sequence[str], version_of: Callable[[str], str | None] = installed_version
) -> Iterator[Finding]:
    """What the package's metadata requires against what is installed; a finding for the extras that are absent."""
    parsed = [Requirement(text) for text in requirements]
    needed = [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]
    wrong = 0
    for requirement in needed:
        version = version_of(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong += 1
            yield problem(
                "packages",
                f"{requirement.name} {version or 'is not installed'}, needed is {requirement.specifier}",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
    if not wrong:
        shown = ", ".join(f"{name} {version_of(name)}" for name in ("torch", "ray", "transformers", "peft"))
        yield ok("packages", f"{len(needed)} needed are here: {shown}")
    absent = [extra for extra in EXTRAS if not _has_extra(extra, parsed, version_of)]
    if absent:
        gives = "; ".join(f"{extra} ({EXTRAS[extra]})" for extra in absent)
        yield ok("extras", f"not installed, and needed only for what they give: {gives}")
    else:
        yield ok("extras", f"all here: {', '.join(EXTRAS)}")


def _has_extra(
    extra: str, requirements: Sequence[Requirement], version_of: Callable[[str], str | None]
) -> bool:
    return all(
        version_of(each.name) is not None
        for each in requirements
        if each.marker is not None
        and each.marker.evaluate({"extra": extra})
        and not each.marker.evaluate({"extra": ""})
    )


def check_open_files(hard: int) -> Finding:
    """`hard` is the limit of open files that Ray raises its own to, or `resource.RLIM_INFINITY`."""
    if hard == resource.RLIM_INFINITY or hard >= OPEN_FILES:
        return ok("open files", "no limit" if hard == resource.RLIM_INFINITY else f"up to {hard}")
    return warning(
        "open files",
        f"at most {hard}: Ray's processes run out of them on a machine with many cores",
        f"`ulimit -Hn {OPEN_FILES}` before Ray is started, or LimitNOFILE of its service",
    )


def check_shared_memory(size: int, memory: int) -> Finding:
    """`size` of /dev/shm and `memory` of the machine in bytes."""
    wanted = SHARED_MEMORY_SHARE * memory
    found = f"{size / _GB:.1f} GB of the machine's {memory / _GB:.1f} GB"
    if size >= wanted:
        return ok("/dev/shm", found)
    return warning(
        "/dev/shm",
        f"{found}; Ray's object store would lie on the disk",
        f"`docker run --shm-size={wanted / _GB:.0f}g`, a memory volume in Kubernetes, or `ray start "
        f"--object-store-memory={int(0.9 * size)}`",
    )


def check_disk(place: str, flag: str) -> Finding:
    """Free space where a local directory is, or would be made."""
    path = existing_parent(Path(place))
    free = shutil.disk_usage(path).free
    found = f"{free / _GB:.1f} GB free at {path} ({flag})"
    if free < _NO_SPACE:
        return problem("disk", found, f"make room, or give another {flag}")
    if free < _LITTLE_SPACE:
        return warning("disk", found, f"a run of all weights writes 40 GB a checkpoint: another {flag}?")
    return ok("disk", found)


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def check_decoders(why_no_torchcodec: str) -> Finding:
    """`why_no_torchcodec` is empty where torchcodec and FFmpeg work."""
    import soundfile

    found = f"libsndfile {soundfile.__libsndfile_version__} (wav, flac, mp3, ogg, opus, aiff)"
    if not why_no_torchcodec:
        return ok("audio", f"{found}; torchcodec with FFmpeg (m4a, aac, wma, webm)")
    return warning(
        "audio",
        f"{found}; {why_no_torchcodec}",
        f"for m4a, aac, wma and webm: install FFmpeg 4 to 8 and `pip install '{PACKAGE}[torchcodec]'`",
    )


def machine_memory() -> int:
    """Bytes."""
    return psutil.virtual_memory().total
