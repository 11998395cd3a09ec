"""MLflow's SQLite database on a disk: its URI, its first tables, and artifact paths that follow a moved folder."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from acestep_ray.paths import escape_path, file_uri, path_of_file_uri, shell_command
from acestep_ray.storage import is_url

SQLITE = "sqlite:///"
ARTIFACTS = "mlruns"
"""Folder beside the database that holds the artifacts, a folder an experiment."""
_CREATE_SECONDS = 120.0
_BUSY_SECONDS = 10.0


def sqlite_uri(database: Path) -> str:
    """The URI of a database file, in the form that the installed SQLAlchemy reads."""
    path = str(database)
    if not {"%", "?"} & set(path):
        return SQLITE + path
    from sqlalchemy.engine import make_url

    if make_url(f"{SQLITE}/%25").database == "/%":  # from 2.1 on
        return SQLITE + escape_path(path)
    return f"{SQLITE}file:{file_uri(path).removeprefix('file://')}?uri=true" if "?" in path else SQLITE + path


def database_of(uri: str) -> Path | None:
    """The file of a SQLite database's URI; None for any other tracking address, and for a database in memory."""
    if not uri.startswith(SQLITE):
        return None
    path = uri.removeprefix(SQLITE).partition("?")[0]
    if "%" in path:
        from sqlalchemy.engine import make_url

        path = make_url(uri).database or ""
    if path.startswith("file:"):
        path = path_of_file_uri(f"file://{path.removeprefix('file:')}")
    return None if path in ("", ":memory:") else Path(path)


def absolute_sqlite_uri(uri: str) -> str:
    """The URI with an absolute path: workers have another working directory. Other addresses are unchanged."""
    database = database_of(uri)
    if database is None or database.is_absolute():
        return uri
    return sqlite_uri(database.absolute()) + "".join(uri.partition("?")[1:])


def mlflow_command(uri: str) -> str:
    """The command that shows the runs of a tracking address in a browser."""
    return shell_command("mlflow", "ui", "--backend-store-uri", uri)


def artifact_location(database: Path, experiment: str) -> str:
    """Where artifacts of an experiment go: a folder beside the database, as MLflow reads it."""
    folder = str(database.resolve().parent / ARTIFACTS / experiment)
    return file_uri(folder) if {"%", "?", "#"} & set(folder) else folder


@contextlib.contextmanager
def ready_database(uri: str, run_id: str | None = None) -> Iterator[None]:
    """Open MLflow's database one process at a time: two that create its tables at once fail.

    Artifact paths in a database that was moved or copied with its folder are made to follow, also that of `run_id`.
    """
    database = database_of(uri)
    if database is None:
        yield
        return
    with contextlib.ExitStack() as held:
        # Without a lock, as where the folder takes no files, MLflow says what is wrong.
        with contextlib.suppress(OSError, Timeout, NotImplementedError):
            database.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{database}.lock", timeout=_CREATE_SECONDS)
            held.enter_context(lock)
        with contextlib.suppress(sqlite3.Error):
            relocate_artifacts(database, run_id)
        yield


def relocate_artifacts(database: Path, run_id: str | None = None) -> None:
    """Let artifact paths that this program wrote name the folder beside the database, where that was moved.

    Paths of earlier runs stay where only the old folder has their files; that of `run_id`, which is to be continued,
    never does. Raises sqlite3.Error for a file that is no database of MLflow.
    """
    if not database.is_file():
        return
    with contextlib.closing(_connect(database)) as connection, connection:
        experiments = connection.execute("SELECT experiment_id, name, artifact_location FROM experiments")
        for experiment_id, name, location in experiments.fetchall():
            new = artifact_location(database, name)
            old_folder, new_folder = _local_path(location), _local_path(new)
            if old_folder is None or new_folder is None or old_folder == new_folder:
                continue
            if old_folder.parts[-2:] != (ARTIFACTS, name):
                continue  # chosen by somebody, not written by this program
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (new, experiment_id)
            )
            runs = connection.execute(
                "SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?", (experiment_id,)
            )
            for run, uri in runs.fetchall():
                folder = _local_path(uri)
                if folder is None or not folder.is_relative_to(old_folder):
                    continue
                below = folder.relative_to(old_folder)
                if run != run_id and folder.exists() and not (new_folder / below).exists():
                    continue
                connection.execute(
                    "UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (f"{new}/{below.as_posix()}", run)
                )


def knows_run(uri: str, run_id: str) -> bool:
    """Whether a SQLite database that is there has this run."""
    database = database_of(uri)
    if database is None or not database.is_file():
        return False
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_connect(database)) as connection:
        return bool(
            connection.execute("SELECT count(*) FROM runs WHERE run_uuid = ?", (run_id,)).fetchone()[0]
        )
    return False


def same_run(noted_uri: str | None, run_id: str | None, uri: str) -> str | None:
    """`run_id` where the tracking address `uri` has this run, which was noted with `noted_uri`; else None.

    A database that was moved has another address and the same runs.
    """
    if run_id is None or noted_uri is None or noted_uri == uri:
        return run_id if noted_uri == uri else None
    is_moved = database_of(noted_uri) is not None and knows_run(uri, run_id)
    return run_id if is_moved else None


def make_parent_folder(uri: str) -> None:
    """Make the folder of a database; MLflow's own function takes escapes in the URI for characters of its name."""
    database = database_of(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)


def _connect(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(database, timeout=_BUSY_SECONDS)


def _local_path(location: str | None) -> Path | None:
    """The folder of an artifact location on a disk; None for a URL of storage."""
    if not location:
        return None
    if location.startswith("file://"):
        return Path(path_of_file_uri(location))
    return None if is_url(location) else Path(location)
