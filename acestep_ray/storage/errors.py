"""What the clients of object storage raise, as the errors that a user is told."""

from __future__ import annotations

import errno
import os
import re
from typing import Any

from acestep_ray.errors import AceStepError, InputError
from acestep_ray.hidden_secrets import without_secrets

S3 = ("s3", "s3a")

# What storage calls a mistake of its user, in its errors' codes and its client's classes.
_BAD_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "SSOTokenLoadError",
    "ProfileNotFound",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "DefaultCredentialsError",
    "RefreshError",
    "401",
}
_DENIED = {"AccessDenied", "AllAccessDisabled", "403"}
_PAST_THE_END = {"InvalidRange", "416"}
_NO_BUCKET = {"NoSuchBucket"}
_CONDITION_FAILED = {"FileExistsError", "PreconditionFailed", "ConditionalRequestConflict", "409", "412"}
_NO_CONDITIONS = {"NotImplemented", "501"}
# Of the mistakes of a request (4xx), those that are the moment's and not the request's; and what aiohttp calls 400
# though it is an answer that was cut.
_PASSING = {"408", "425", "429", "RequestTimeout", "409", "OperationAborted", "ClientPayloadError"}


class StorageError(AceStepError):
    """Object storage could not be read or written, after attempts with waits between them."""


class AccessDeniedError(StorageError):
    """The credentials give no right to an object or a bucket."""


def told(error: Exception, url: str, protocol: str) -> Exception:
    """The error that a user is told for one of a storage's client; it holds no credentials."""
    codes = _codes(error)
    url, message = without_secrets(url), without_secrets(str(error))
    if codes & _BAD_CREDENTIALS:
        return InputError(
            f"object storage does not take the credentials ({message})",
            where=url,
            fix=_credentials_fix(protocol),
        )
    if codes & _NO_BUCKET:
        return InputError("the bucket does not exist", where=url, fix="create it, or correct its name")
    if isinstance(error, FileNotFoundError) or "404" in codes:
        return not_found(url)
    if codes & _DENIED:
        return AccessDeniedError(
            f"object storage denies access ({message}): {url}\n"
            "  → the credentials need the right to list, read and, for an output, write and delete there"
        )
    return StorageError(f"object storage failed ({type(error).__name__}: {message}): {url}")


def may_pass(error: Exception, told_as: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    if not isinstance(told_as, StorageError) or isinstance(told_as, AccessDeniedError):
        return False
    codes = _codes(error)
    is_of_the_request = any(re.fullmatch(r"4\d\d", code) for code in codes) or codes & _NO_CONDITIONS
    return not is_of_the_request or bool(codes & _PASSING)


def is_past_the_end(error: Exception) -> bool:
    """Whether a range was asked for that begins behind the end of the object."""
    return bool(_codes(error) & _PAST_THE_END)


def is_failed_condition(error: Exception) -> bool:
    """Whether an object was not written or read because it is not, or no longer, as the request demands."""
    return bool(_codes(error) & _CONDITION_FAILED)


def knows_no_conditions(error: Exception) -> bool:
    """Whether the storage refuses conditions as such."""
    return bool(_codes(error) & _NO_CONDITIONS)


def not_found(url: str) -> FileNotFoundError:
    """The error of a file that is not there, with its URL."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)


def _codes(error: BaseException) -> set[str]:
    """What an error and its causes are called: classes, codes of S3, statuses of HTTP."""
    codes: set[str] = set()
    seen: BaseException | None = error
    while seen is not None:
        codes.add(type(seen).__name__)
        response: Any = getattr(seen, "response", None)
        if isinstance(response, dict):
            codes.add(str(response.get("Error", {}).get("Code")))
            codes.add(str(response.get("ResponseMetadata", {}).get("HTTPStatusCode")))
        codes |= {str(getattr(response, "status_code", None)), str(getattr(seen, "code", None))}
        seen = seen.__cause__
    return codes


def _credentials_fix(protocol: str) -> str:
    if protocol in S3:
        return (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role, on every node; "
            "FSSPEC_S3_ANON=true for a public bucket"
        )
    if protocol in ("gs", "gcs"):
        return (
            "set GOOGLE_APPLICATION_CREDENTIALS on every node, or run `gcloud auth application-default login`"
        )
    if protocol == "hf":
        return "set HF_TOKEN on every node to a token that may read the repository"
    return "give the storage's credentials as its own tools take them, on every node"
