"""MLflow's own server for tests: in processes of its own, with SQLite, its artifact proxy and its passwords."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER, PASSWORD = "admin", "a password of its own"


class MLflowServer:
    """A server on a port of this machine; what it has stored outlives its processes."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._process: subprocess.Popen | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        folder = self._folder
        places = [
            "--backend-store-uri",
            f"sqlite:///{folder}/runs.db",
            "--artifacts-destination",
            f"{folder}/files",
        ]
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
        command += ["--port", str(self._port), "--workers", "1", *places]
        environment = {
            **os.environ,
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its jobs take several processes
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with open(folder / "server.log", "ab") as output:
            self._process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + 200
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"MLflow's server did not start:\n{(folder / 'server.log').read_text()}")
            time.sleep(0.1)

    def signal(self, number: int) -> None:
        """Give its processes a signal."""
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End its processes at once."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MLflowServer]:
    server = MLflowServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()
