"""Uploading what was exported to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from acestep_ray.errors import AceStepError, InputError


def check_repository(repository: str) -> None:
    """Raise InputError for what is no name of a repository of a user or organisation."""
    where = f"--push_to_hub {repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"no name of a repository ({error})", where=where, fix="give USER/NAME") from None
    if "/" not in repository:
        raise InputError("no name of a repository", where=where, fix="give USER/NAME")


def planned_upload(folder: Path) -> list[str]:
    """A line for every file that would be uploaded, with its size."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [f"{file.relative_to(folder).as_posix()}  {file.stat().st_size:,} bytes" for file in files]


def upload(folder: Path, repository: str, *, exported_to: str) -> str:
    """Upload a folder as one commit, making a private repository where there is none; returns the address.

    `exported_to` is where the files stay, whatever becomes of the upload. Raises AceStepError where the Hub or the
    network refuses.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repository, commit_message="Upload a LoRA of ACE-Step v1"
        )
    except (HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OSError) as error:
        raise AceStepError(
            f"the upload to {repository} failed, what was exported is in {exported_to}: {error}\n"
            "  → look at the network, log in with `hf auth login` (a token that may write), "
            f"then `hf upload {repository} FOLDER` with these files"
        ) from error
    return str(address)
