"""What keeps Ray from starting or joining, as a mistake of the environment with its remedy."""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from acestep_ray.errors import InputError, without_password

_CONNECT_SECONDS = 3.0
_ATTEMPTS = 3
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KEYWORDS = ("auto", "local")
_HOST_PORT = "give HOST:PORT of the cluster's head, 6379 by default, or unset $RAY_ADDRESS"


def check_address(address: str, *, own_address: Callable[[], str] | None = None) -> None:
    """Raise InputError for a $RAY_ADDRESS that is none of a cluster, or where nothing listens.

    Ray itself asks such an address for minutes. `own_address` returns this machine's address in the cluster, which a
    head may listen on in place of the loopback one.
    """
    where = f"{without_password(address)} (from $RAY_ADDRESS)"
    if address in _KEYWORDS:
        return
    scheme = address.partition("://")[0].lower() if "://" in address else ""
    if scheme in ("http", "https"):
        named = _host_and_port(address.partition("://")[2].partition("/")[0], 8265)[0] or "HOST"
        raise InputError(
            "this is the address of Ray's dashboard, which only `ray job submit` takes",
            where=where,
            fix=f"give the cluster's own, such as {named}:6379, or submit the command as a job: "
            "`ray job submit --address http://… -- acestep-ray …`",
        )
    if scheme == "ray":
        raise InputError(
            "jobs do not run through Ray Client",
            where=where,
            fix="give HOST:6379 on a machine of the cluster, or submit the command with `ray job submit`",
        )
    host, port = _host_and_port(address, None)
    if scheme or not host or port is None:
        raise InputError("this is no address of a Ray cluster", where=where, fix=_HOST_PORT)
    failure = _connection_failure(host, port)
    if failure is not None and host in _LOOPBACK and own_address is not None:
        failure = _connection_failure(own_address(), port)
    if failure is not None:
        raise no_cluster(address, failure)


def no_cluster(address: str, reason: str = "") -> InputError:
    """The error for a cluster that does not answer."""
    return InputError(
        f"no Ray cluster answers{f' ({reason})' if reason else ''}",
        where=f"{without_password(address)} (from $RAY_ADDRESS)",
        fix="start it, or unset $RAY_ADDRESS",
    )


def explain_start(error: BaseException, address: str | None) -> InputError:
    """What `ray.init` has raised, as a mistake of the environment with its remedy; `address` is $RAY_ADDRESS."""
    reason = _reason(error)
    text = str(error).lower()
    place = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if "af_unix path length" in text or "validate_socket_filename" in text:
        return InputError(
            "the temporary folder's path is too long for Ray's sockets",
            where=f"{place} (from ${'RAY_TMPDIR' if os.environ.get('RAY_TMPDIR') else 'TMPDIR'})",
            fix="set RAY_TMPDIR to a short path on a disk of this machine, such as /tmp",
        )
    if "version mismatch" in text:
        return InputError(
            f"this environment is not the cluster's ({reason})",
            where=_where(address),
            fix="use the cluster's versions of Ray and Python here, or submit the command with `ray job submit`",
        )
    if any(word in text for word in ("unauthenticated", "authentication", "auth token", "invalidauthtoken")):
        return InputError(
            f"the cluster does not take this token ({reason})",
            where=_where(address),
            fix="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token, "
            "or RAY_AUTH_MODE=disabled for a cluster without one",
        )
    if "/dev/shm" in text or "object store" in text or "object_store_memory" in text or "plasma" in text:
        return InputError(
            f"Ray gets no shared memory for its object store ({reason})",
            where="/dev/shm",
            fix="make it larger and writable (`docker run --shm-size=8g`, a memory volume in Kubernetes)",
        )
    if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
        return _port_taken(reason)
    if "address already in use" in text or "port conflict" in text or "failed to bind" in text:
        return _port_taken(reason)
    if isinstance(error, ConnectionError) and address:
        return no_cluster(address)
    if isinstance(error, OSError) and error.errno is not None:
        return InputError(
            f"Ray cannot use its temporary folder ({reason})",
            where=os.fspath(error.filename) if isinstance(error.filename, str) else place,
            fix="set RAY_TMPDIR to a folder of yours on a disk with room, or make room",
        )
    return InputError(
        f"Ray does not {'join the cluster' if address else 'start'} ({reason})",
        where=_where(address),
        fix="run `acestep-ray doctor`; -v shows what Ray logs, --debug the traceback",
    )


def _port_taken(reason: str) -> InputError:
    return InputError(
        f"a port that Ray wants is taken ({reason})",
        where="this machine",
        fix="end the other program, or unset the variables and flags that name this port",
    )


def _where(address: str | None) -> str:
    return f"{without_password(address)} (from $RAY_ADDRESS)" if address else "this machine"


def _reason(error: BaseException) -> str:
    """The first lines of an error's message, in one."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return without_password(re.sub(r"\s+", " ", " ".join(lines[:4]))[:300] or type(error).__name__)


def _host_and_port(address: str, default: int | None) -> tuple[str | None, int | None]:
    try:
        parts = urlsplit(f"//{address}")
        return parts.hostname, parts.port or default
    except ValueError:
        return None, None


def _connection_failure(host: str, port: int) -> str | None:
    """Why nothing listens there; None where something does."""
    failure = None
    for attempt in range(_ATTEMPTS):
        try:
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
            return None
        except (OSError, UnicodeError) as error:
            failure = getattr(error, "strerror", None) or str(error)
            if not isinstance(error, ConnectionRefusedError) or attempt == _ATTEMPTS - 1:
                break
            time.sleep(1.0)  # a head that is being started
    return failure
