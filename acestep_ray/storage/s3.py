"""Requests with conditions, and those of S3 that fsspec has no call for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from fsspec.asyn import sync

from acestep_ray.errors import AceStepError
from acestep_ray.hidden_secrets import without_secrets
from acestep_ray.storage.clients import tried
from acestep_ray.storage.errors import StorageError, is_failed_condition, knows_no_conditions
from acestep_ray.storage.files import FileStatus

Made = TypeVar("Made")

DELETED_AT_ONCE = 1000  # S3 takes no more keys in one request


class ConditionFailedError(AceStepError):
    """An object is there already, or is not the one that was expected."""


class NoConditionsError(AceStepError):
    """The storage takes no conditions."""


def conditional(request: Callable[[], Made]) -> Made:
    """What a request with a condition returns. Raises ConditionFailedError and NoConditionsError."""
    try:
        return request()
    except Exception as error:
        if is_failed_condition(error):
            raise ConditionFailedError(str(error)) from error
        if knows_no_conditions(error):
            raise NoConditionsError(str(error)) from error
        raise


def read_if_same(filesystem: Any, url: str, start: int, end: int, status: FileStatus) -> bytes:
    """Bytes of an object that still has this status."""
    bucket, key, _ = filesystem.split_path(url)

    async def read() -> bytes:
        answer = await filesystem._call_s3(
            "get_object",
            Bucket=bucket,
            Key=key,
            Range=f"bytes={start}-{end - 1}",
            IfMatch=_entity_tag(status),
        )
        async with answer["Body"] as body:
            return await body.read()

    return sync(filesystem.loop, read)


def write_if_same(filesystem: Any, url: str, content: bytes, status: FileStatus) -> None:
    """Replace an object that still has this status."""
    bucket, key, _ = filesystem.split_path(url)
    filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=content, IfMatch=_entity_tag(status))


def delete_objects(filesystem: Any, urls: Iterable[str], protocol: str) -> None:
    """Delete objects; what is not there is no error."""
    remaining = iter(urls)
    while some := list(islice(remaining, DELETED_AT_ONCE)):
        # s3fs takes names for patterns (`a[1].wav`), and does not tell what was not deleted.
        places = [filesystem.split_path(url) for url in some]
        options = {
            "Bucket": places[0][0],
            "Delete": {"Objects": [{"Key": key} for _, key, _ in places], "Quiet": True},
        }
        answer = tried(partial(filesystem.call_s3, "delete_objects", **options), some[0], protocol)
        for error in answer.get("Errors", []):
            reason = without_secrets(f"{error.get('Code')}: {error.get('Message')}")
            raise StorageError(f"an object cannot be deleted ({reason}): {error.get('Key')}")


def abort_uploads(filesystem: Any, url: str, protocol: str) -> int:
    """End the multipart uploads below a URL that were not completed; returns how many there were."""
    bucket, prefix, _ = filesystem.split_path(url)
    options = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}

    def listed() -> list[dict[str, Any]]:
        return filesystem.call_s3("list_multipart_uploads", **options).get("Uploads") or []

    count = 0
    while uploads := tried(listed, url, protocol):
        for upload in uploads:
            with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
                abort = partial(filesystem.abort_mpu, bucket, upload["Key"], upload["UploadId"])
                tried(abort, url, protocol)
        count += len(uploads)
    return count


def _entity_tag(status: FileStatus) -> str:
    """As the status of an object has it, behind its size."""
    return status.version.partition("-")[2]
