"""fsspec's clients of object storage, and how long they and we try."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import fsspec
from fsspec.config import conf as fsspec_config

from acestep_ray.errors import AceStepError, InputError
from acestep_ray.storage.errors import S3, may_pass, told

Made = TypeVar("Made")

# The extra of this project that brings the package behind a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
GOOGLE = ("gs", "gcs")

# Attempts of the client for a request. An endpoint that does not answer is given up after half a minute, one that
# stalls in every answer after five.
S3_CONFIG = {
    "connect_timeout": 5,
    "read_timeout": 20,
    "retries": {"mode": "standard", "total_max_attempts": 5},
    "max_pool_connections": 64,
}
RETRY_AFTER_SECONDS = (1.0, 4.0)
"""Our own waits between attempts, each of them several of the client's; what an answer stalls in is read again too."""


@lru_cache(maxsize=64)
def filesystem_of(protocol: str, process: int, thread: int | None) -> fsspec.AbstractFileSystem:
    """A client; `process` and `thread` are those that may use it, since none survives a fork."""
    # Listings that are remembered would hide what other processes write.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in S3:
        options["config_kwargs"] = {**S3_CONFIG, **fsspec_config.get("s3", {}).get("config_kwargs", {})}
    if protocol in GOOGLE:
        # For buckets of one zone gcsfs asks another service, with rights of its own, what kind each bucket is: where it
        # may not, before every request, with a warning.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        # It logs what it raises, with a traceback.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        if protocol in ("http", "https"):
            from acestep_ray.storage.http import BoundedHTTP  # imported here: aiohttp takes a while

            return BoundedHTTP(**options)
        filesystem = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        fix = f"pip install 'acestep-ray[{extra}]'" if extra else f"install its package ({error})"
        raise InputError(f"{protocol}:// needs a package that is not installed", fix=fix) from None
    except Exception as error:  # kinds that lie inside another storage fail in ways of their own without it
        raise InputError(f"unknown kind of storage ({error})", where=f"{protocol}://") from None
    if protocol in S3:
        filesystem.retries = 1  # attempts of s3fs, around the client's and within ours
    return filesystem


def tried(action: Callable[[], Made], url: str, protocol: str) -> Made:
    """What `action` returns; tried again while storage fails, up to a bound, and then told with the URL.

    Raises the errors that `Store` promises. The action has to be one that may be done twice.
    """
    for wait in (*RETRY_AFTER_SECONDS, None):
        try:
            return action()
        except AceStepError:
            raise
        except Exception as error:  # every client has errors of its own
            told_as = told(error, url, protocol)
            if wait is None or not may_pass(error, told_as):
                raise told_as from error
        # Many workers that fail together shall not come back together.
        time.sleep(wait * random.uniform(0.75, 1.25))
    raise AssertionError("the last attempt returns or raises")


def read_hub(filesystem: Any, url: str, start: int | None = None, end: int | None = None) -> bytes:
    """A file of the Hub, or its bytes from `start` to before `end`; the client itself would list the folder first."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    place = filesystem.resolve_path(url)
    if not hasattr(place, "repo_id"):  # a storage bucket, not a repository
        return filesystem.cat_file(url, start=start, end=end)
    address = hf_hub_url(
        place.repo_id,
        place.path_in_repo,
        repo_type=place.repo_type,
        revision=place.revision,
        endpoint=filesystem.endpoint,
    )
    headers = build_hf_headers(token=filesystem.token)
    if start is not None and end is not None:
        headers["Range"] = f"bytes={start}-{end - 1}"
    response = http_backoff("GET", address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(response)
    return response.content
