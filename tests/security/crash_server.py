"""Runs commands in processes that end, or stand still, before the n-th change of the file system.

The imports take seconds, so one process has done them and forks for each command. Requests and answers are lines of
JSON on its standard input and output.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.copyfile"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Moments:
    """Counts changes of the file system, and sends this process a signal before one of them."""

    def __init__(self, at: int | None, number: int):
        self.at, self.number, self.count = at, number, 0

    def __call__(self, event: str, arguments: tuple) -> None:
        if event in CHANGES or (event == "open" and arguments[2] is not None and arguments[2] & WRITES):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), self.number)


def run(arguments, at=None, then="SIGKILL", file_bytes=None) -> dict:
    """Run a command; returns its exit code or, negative, the signal that it ended by or stands still for."""
    ours, its = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(its, 1)
        os.dup2(its, 2)
        os.close(ours)
        _be_the_command(arguments, Moments(at, getattr(signal, then)), file_bytes)
    os.close(its)
    if then == "SIGSTOP":
        _, status = os.waitpid(child, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return {"pid": child, "code": -os.WSTOPSIG(status), "text": "", "count": 0}
        return {"pid": child, "code": os.waitstatus_to_exitcode(status), "text": "", "count": 0}
    with os.fdopen(ours, "rb") as output:
        text = output.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text, _, count = text.partition("\nchanges: ")
    return {"pid": child, "code": code, "text": text, "count": int(count or 0)}


def _be_the_command(arguments: list[str], moments: Moments, file_bytes: int | None) -> None:
    code = 70
    try:
        from acestep_ray import cli

        # Whatever goes wrong here, no test waits for it.
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        sys.addaudithook(moments)
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code
    except BaseException:
        traceback.print_exc()
    print(f"\nchanges: {moments.count}", flush=True)
    os._exit(code)


def main() -> None:
    """Answer requests until the input ends."""
    import datasets  # noqa: F401
    import torch

    import acestep_ray.cache.prune
    import acestep_ray.data.prepare
    import acestep_ray.export.merge
    import acestep_ray.reporting.job  # noqa: F401

    torch.set_num_threads(1)
    with os.fdopen(os.dup(1), "w") as answers:
        for line in sys.stdin:
            request = json.loads(line)
            if "wait" in request:
                answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
            else:
                answer = run(**request)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
