"""A server of Google's storage for tests: an emulator, in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from tests.s3 import forget_clients

BUCKET = "bucket"


@contextmanager
def gcs_server() -> Iterator[str]:
    """The URL of a bucket; clients find it by the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.gcs", str(port)]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, **quiet)
    before = os.environ.get("STORAGE_EMULATOR_HOST")
    try:
        _wait_for(port, server)
        os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{port}"
        forget_clients()
        yield f"gs://{BUCKET}"
    finally:
        server.kill()
        server.wait()
        if before is None:
            os.environ.pop("STORAGE_EMULATOR_HOST", None)
        else:
            os.environ["STORAGE_EMULATOR_HOST"] = before
        forget_clients()


def _wait_for(port: int, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert server.poll() is None, "the server of Google's storage has ended"
        assert time.monotonic() < deadline, "the server of Google's storage does not answer"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)


def serve(port: int) -> None:
    """The emulator with the condition that it lacks: `ifGenerationMatch=0`, an object must not be there yet."""
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    insert = objects.insert

    def insert_if_new(request: Any, response: Any, storage: Any, *args: Any, **options: Any) -> None:
        if request.query.get("ifGenerationMatch") == ["0"]:
            name = request.query["name"][0] if "name" in request.query else request.data["meta"]["name"]
            try:
                storage.get_file_obj(request.params["bucket_name"], name)
            except NotFound:
                pass
            else:
                response.status = HTTPStatus.PRECONDITION_FAILED
                response.json({"error": {"code": 412, "message": "conditionNotMet"}})
                return
        insert(request, response, storage, *args, **options)

    objects.insert = insert_if_new
    from gcp_storage_emulator.server import create_server  # takes the handlers as it is imported

    create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).run()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
