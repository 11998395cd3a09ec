"""What a run ran with: package versions, the machine, the git commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

from acestep_ray import __version__

GIT_SECONDS = 5.0


def environment_tags() -> dict[str, str]:
    """What a run ran with: `version.PACKAGE`, `device`, `platform`, and MLflow's own tags of the git commit.

    The commit is that of the checkout this package is tracked in, or else of the current folder; without one, none.
    """
    import torch

    tags = {
        "version.acestep_ray": __version__,
        "version.python": platform.python_version(),
        "version.torch": str(torch.__version__),  # unlike the package's, it tells of CUDA
    }
    for package in ("ray", "peft", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    tags["platform"] = platform.platform()
    if torch.cuda.is_available():
        tags["device"] = torch.cuda.get_device_name()
    here = Path(__file__).resolve()
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name) is not None
    checkout = here.parent if tracked else Path()
    commit = _git(checkout, "rev-parse", "HEAD")
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
        changes = _git(checkout, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        if changes is not None:
            tags["mlflow.source.git.dirty"] = str(changes != "").lower()
    return tags


def _git(folder: Path, *arguments: str) -> str | None:
    """What a git command prints; None where it fails, or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
