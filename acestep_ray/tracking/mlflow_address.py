"""Which MLflow address the settings mean, and what is wrong with one that is none."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from acestep_ray.errors import InputError, without_password
from acestep_ray.hints import nearest
from acestep_ray.paths import expand_home, expand_home_in_uri
from acestep_ray.storage import is_url
from acestep_ray.tracking.local_database import absolute_sqlite_uri, sqlite_uri

OFF = "none"

# `user:password@`, or a parameter of a database's driver.
_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@|[?&][a-z_]*(password|passwd|token|secret)=", re.IGNORECASE)
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SCHEMES = ("http", "https", "file", *_DATABASES, "databricks", "databricks-uc", "uc")
_DATABASE_SUFFIXES = (".db", ".sqlite", ".sqlite3")
# localhost:5000, 10.0.0.1, [::1]:5000, mlflow.example.com/path
_HOST = re.compile(r"(\[[0-9a-f:]+\]|localhost|[\w-]+(\.[\w-]+)+|[\w-]+(?=:\d))(:\d+)?(/.*)?", re.IGNORECASE)


def mlflow_uri(tracking_uri: str | None, logger_dir: str | Path) -> str | None:
    """The MLflow address that the settings mean; None when MLflow is off or, by default, not installed.

    Raises InputError when an address is given and MLflow is not installed, for an address with a password in it or
    without its scheme, and for logs in object storage when none is given.
    """
    if tracking_uri == OFF:
        return None
    if tracking_uri is not None and _PASSWORD.search(tracking_uri):
        raise InputError(
            "a password does not belong into an address, which is shown and written down",
            where=f"--tracking_uri {without_password(tracking_uri).partition('?')[0]}",
            fix="give it in the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, "
            "PGPASSWORD for PostgreSQL",
        )
    if importlib.util.find_spec("mlflow") is None:
        if tracking_uri is None:
            return None
        raise InputError(
            "MLflow is not installed",
            where=f"--tracking_uri {tracking_uri}",
            fix="pip install mlflow, or `none`",
        )
    if tracking_uri is None and is_url(logger_dir):
        raise InputError(
            "MLflow's own database is a file, which cannot lie in object storage",
            where=f"--logger_dir {logger_dir}",
            fix="give --tracking_uri with the address of an MLflow server, or `none`",
        )
    if tracking_uri is None:
        return sqlite_uri(Path(expand_home(str(logger_dir))).resolve() / "mlflow.db")
    uri = expand_home_in_uri(tracking_uri)
    check_scheme(uri)
    return absolute_sqlite_uri(uri)


def check_scheme(uri: str) -> None:
    """Raise InputError for an address that MLflow would take for a folder, or for nothing."""
    where = f"--tracking_uri {without_password(uri)}"
    scheme, slashes, rest = uri.partition("://")
    if slashes:
        kind = scheme.lower().partition("+")[0]
        if kind not in (*_SCHEMES, *_plugins()):
            near = nearest(kind, _SCHEMES)
            raise InputError(
                f"MLflow has no addresses with {scheme}://",
                where=where,
                fix=f"did you mean {near}://{rest}?"
                if near
                else f"they begin with {', '.join(_SCHEMES[:6])}",
            )
        if kind == "sqlite" and not rest.startswith("/"):
            raise InputError(
                "the address of a SQLite file has three slashes before its path, four before an absolute one",
                where=where,
                fix=f"give --tracking_uri sqlite:///{rest}",
            )
        return
    if uri in _SCHEMES or uri.startswith("databricks"):
        return
    kind, _, rest = uri.partition(":")
    if rest and kind.lower() in _SCHEMES:  # http:/host, sqlite:mlflow.db
        slashes = "///" if kind.lower() in _DATABASES and not re.match(r"/*[^/]+:\d", rest) else "//"
        address = rest if rest.startswith("/") and slashes == "///" else rest.lstrip("/")
        raise InputError(
            "slashes are missing in the address",
            where=where,
            fix=f"give --tracking_uri {kind}:{slashes}{address}",
        )
    path = Path(uri)
    if uri.endswith(_DATABASE_SUFFIXES) or path.is_file():
        raise InputError(
            "the address of a SQLite file begins with sqlite:///",
            where=where,
            fix=f"give --tracking_uri sqlite:///{path.resolve()}",
        )
    if not path.is_dir() and not uri.startswith((".", "/", "~")) and _HOST.fullmatch(uri):
        raise InputError(
            "the address of a server begins with http:// or https://",
            where=where,
            fix=f"give --tracking_uri http://{uri}",
        )


def _plugins() -> set[str]:
    """Schemes of tracking stores that other packages bring."""
    return {entry.name for entry in importlib.metadata.entry_points(group="mlflow.tracking_store")}
