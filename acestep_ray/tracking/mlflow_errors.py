"""Why MLflow does not take a run: the cause behind its exceptions, and what to do about it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from acestep_ray.errors import without_password
from acestep_ray.foreign_files import seems_to_be
from acestep_ray.tracking.local_database import database_of

_CREDENTIALS_FIX = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, on every node"
)
_WITHOUT = "or train without it: --tracking_uri none"
_UNAVAILABLE = (408, 429, 500, 502, 503, 504)


class NoServerError(Exception):
    """Something answers as MLflow would not."""


class Cause(NamedTuple):
    """A cause and its remedy."""

    what: str
    fix: str
    lasts: bool = True
    """Whether it remains until somebody acts; a server or a lock may be back in a minute."""


def explain(error: BaseException, uri: str) -> Cause:
    """The cause of an error of MLflow's client at `uri`."""
    chain = list(_chain(error))
    text = " | ".join(f"{type(one).__name__}: {one}" for one in chain)
    for find in (_of_database, _of_server, _of_address):
        if cause := find(text, uri, chain):
            return cause
    return Cause(reason_of(error), f"look for the reason in MLflow's log, {_WITHOUT}", lasts=False)


def is_refused(error: BaseException) -> bool:
    """Whether MLflow's server does not take the credentials, or they give no right to what was asked for."""
    return _status(error) in (401, 403) and "Invalid Host header" not in str(error)


def reason_of(error: BaseException) -> str:
    """What an error began with, in a line: MLflow's own wraps it in several."""
    if is_refused(error):
        return f"it refuses the credentials: {_CREDENTIALS_FIX}"
    if found := re.search(r"The run (\w+) must be in (?:the )?'active' (?:state|lifecycle)", str(error)):
        return f"the run was deleted; `mlflow runs restore --run-id {found[1]}` brings it back"
    *_, first = _chain(error)
    lines = str(first).strip().splitlines()
    return without_password(f"{type(first).__name__}: {lines[0]}" if lines else type(first).__name__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, the cause's cause, and so on."""
    while True:
        yield error
        inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if inner is None:
            return
        error = inner


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of MLflow's client stands for."""
    if found := re.search(r"error code (\d{3}) != 200|too many (\d{3}) error responses", str(error)):
        return int(found[1] or found[2])
    status: Callable[[], int | None] = getattr(error, "get_http_status_code", lambda: None)
    return status()


def _of_database(text: str, uri: str, chain: list[BaseException]) -> Cause | None:
    """Of a database that is another version's, another program's, damaged, locked, or out of reach."""
    if found := re.search(r"out-of-date database schema \(found version (\w+), but expected (\w+)\)", text):
        return _of_schema(found[1], found[2], uri)
    if "Can't locate revision" in text:
        return _newer("", uri)
    path = database_of(uri)
    moved = f"move it away: a new one is made; {_WITHOUT}"
    if "is not a database" in text:
        found_kind = None if path is None else seems_to_be(path)
        if found_kind is not None:
            return Cause(f"the file is {found_kind.what}", f"{found_kind.fix}; {_WITHOUT}")
        return Cause(
            "the file is no SQLite database",
            f"give another file with --tracking_uri sqlite:////PATH/mlflow.db, or {moved}",
        )
    if "malformed" in text or "disk I/O error" in text:
        name = shlex.quote(str(path)) if path else "DATABASE"
        return Cause(
            "the database is damaged",
            f"bring it back from a copy; `sqlite3 {name} .recover | sqlite3 mended.db` rescues what it can; or {moved}",
        )
    if "database is locked" in text:
        where = f", which `fuser {shlex.quote(str(path))}` lists" if path else ""
        return Cause(
            "another process has locked the database",
            f"wait for it, or end it{where}; on a disk of the network use an MLflow server",
            lasts=False,
        )
    if "readonly database" in text or "unable to open database file" in text:
        folder = path is not None and path.is_dir()
        return Cause(
            "it is a folder, not a database" if folder else "the database cannot be opened for writing",
            f"give the file: --tracking_uri sqlite:///{path}/mlflow.db"
            if folder
            else f"look at the permissions of the file and of its folder, {_WITHOUT}",
        )
    if "database or disk is full" in text:
        return Cause("the disk of the database is full", "make room there", lasts=False)
    missing = re.search(r"No module named '(psycopg\d?|MySQLdb|pymysql|pyodbc)", text)
    if missing:
        package = {"MySQLdb": "mysqlclient", "psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary"}
        return Cause(
            f"the driver of this database is not installed ({missing[1]})",
            f"pip install '{package.get(missing[1], missing[1])}', on every node",
        )
    return None


def _of_schema(found: str, expected: str, uri: str) -> Cause | None:
    """Of a database whose tables are another MLflow version's; those that this one knows are older."""
    from mlflow.store import db_migrations

    versions = Path(db_migrations.__path__[0]) / "versions"
    if not any(versions.glob(f"{found}_*.py")):
        return _newer(f" (its schema {found} is unknown here)", uri)
    return Cause(
        f"its database is an older MLflow version's (schema {found}, this version has {expected})",
        f"copy the database, then bring it up to date: mlflow db upgrade {shlex.quote(without_password(uri))}",
    )


def _newer(detail: str, uri: str) -> Cause:
    from mlflow.version import VERSION

    return Cause(
        f"its database is a newer MLflow version's than {VERSION}{detail}",
        "pip install --upgrade mlflow, or give another database with --tracking_uri",
    )


def _of_server(text: str, uri: str, chain: list[BaseException]) -> Cause | None:
    """Of a server that answers, and not as MLflow does."""
    if "Invalid Host header" in text:
        host = urlsplit(uri).netloc.rpartition("@")[2]
        return Cause(
            "its server does not know itself by this name",
            f"start it with `mlflow server --allowed-hosts {host} …`, or give the name that it allows",
            lasts=False,
        )
    if any(map(is_refused, chain)):
        return Cause(
            reason_of(next(filter(is_refused, chain))), f"{_CREDENTIALS_FIX}; {_WITHOUT}", lasts=False
        )
    if not uri.startswith("http"):
        return None
    status = next((code for code in map(_status, chain) if code), None)
    answered = (
        "error code" in text or "error responses" in text or "valid JSON" in text or "RestException" in text
    )
    if status in _UNAVAILABLE and ("error responses" in text or "error code" in text):
        return Cause(
            f"its server fails with {status}",
            f"look at the server's log, and start again; {_WITHOUT}",
            lasts=False,
        )
    is_other = status in (301, 302, 303, 307, 308, 404, 405) or "not in a valid JSON format" in text
    if isinstance(chain[0], NoServerError):
        answered = is_other = True
    if answered and (is_other or "Response: {" in text):
        parts = urlsplit(uri)
        base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        is_page = bool(parts.fragment) or "/experiments" in parts.path
        told = f"answers with {status}" if status and "error code" in text else "answers with something else"
        return Cause(
            f"this is not the address of an MLflow server: what is there {told}",
            f"give the address without the path of a page: --tracking_uri {base}"
            if is_page
            else "give the address that MLflow's page has in a browser, up to the `#`; behind a login, that "
            f"of the server itself; {_WITHOUT}",
            lasts=False,
        )
    return None


def _of_address(text: str, uri: str, chain: list[BaseException]) -> Cause | None:
    """Of an address where nothing answers."""
    host = urlsplit(uri).netloc.rpartition("@")[2] if "://" in uri else uri
    if "filesystem tracking backend" in text:
        return Cause(
            "this MLflow version keeps no runs in a folder",
            "give a database, --tracking_uri sqlite:////PATH/mlflow.db (`mlflow migrate-filestore` brings "
            "the runs over), or set MLFLOW_ALLOW_FILE_STORE=true",
        )
    if "SSLError" in text or "CERTIFICATE" in text:
        plain = "WRONG_VERSION_NUMBER" in text.upper().replace(" ", "_")
        return Cause(
            "the server speaks no TLS" if plain else "the server's certificate is not trusted",
            f"give --tracking_uri http://{host}"
            if plain
            else "name its certificate with MLFLOW_TRACKING_SERVER_CERT_PATH, on every node",
        )
    if "NameResolutionError" in text or "gaierror" in text:
        return Cause(
            f"the host {urlsplit(uri).hostname} is not known", f"correct the address, {_WITHOUT}", lasts=False
        )
    if "Connection refused" in text:
        return Cause(
            f"{reason_of(chain[0])}: no server listens at {host}",
            f"start it (`mlflow server --port {urlsplit(uri).port or 5000}`), or correct the address, {_WITHOUT}",
            lasts=False,
        )
    if re.search("Timeout|timed out|unreachable|No route", text):
        return Cause(
            f"{host} does not answer",
            f"start the server, or look at the network between; {_WITHOUT}",
            lasts=False,
        )
    if re.search(r"RemoteDisconnected|ConnectionReset|BadStatusLine|ProtocolError", text):
        return Cause(
            f"{host} ends the connection",
            f"is it https:// in place of http://? Correct the address, {_WITHOUT}",
            lasts=False,
        )
    return None
