"""Ray's line about actors' arguments does not reach standard error; everything else does, whole and at once."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from acestep_ray.terminal.stderr_filter import LineFilter

NOISE = (
    b"[2026-12-01 04:29:39,493 E 3216 3216] core_worker.cc:2465: Actor with class name: "
    b"'MapWorker(MapBatches(_Encode))' and ID: '5bf26ef1367c97767615002f01000000' has constructor arguments in the "
    b"object store and max_restarts > 0. If the arguments in the object store go out of scope or are lost, the actor "
    b"restart will fail. See https://github.com/ray-project/ray/issues/53727 for more details.\n"
)
OTHERS = (
    b"[2026-12-01 04:29:39,493 E 3216 3216] core_worker.cc:99: The node was lost.\n",
    b"[2026-12-01 04:29:39,493 C 3216 3216] check.cc:12: Check failed: a == b\n*** StackTrace Information ***\n",
    b'Traceback (most recent call last):\n  File "a.py"\nValueError: max_restarts > 0\n',
    b"progress 1\rprogress 2\r",
    b"[1/3] no newline",
    b"\xff\xfe not UTF-8\n\n\n",
    b"\x1b[31mred\x1b[0m\n",
)


def filtered(*writes: bytes) -> bytes:
    out: list[bytes] = []
    lines = LineFilter(out.append)
    for content in writes:
        lines.feed(content)
    lines.flush()
    return b"".join(out)


def test_the_line_is_left_out_wherever_it_stands_and_however_it_is_cut():
    text = b"before\n" + NOISE + b"between\n" + NOISE + NOISE + b"after\n"
    assert filtered(text) == b"before\nbetween\nafter\n"
    assert filtered(*(text[i : i + 7] for i in range(0, len(text), 7))) == b"before\nbetween\nafter\n"
    assert filtered(b"\x1b[31m" + NOISE.rstrip() + b"\r\n") == b""


@pytest.mark.parametrize("other", OTHERS)
def test_other_lines_are_passed_on_byte_for_byte(other):
    assert filtered(other) == other
    assert filtered(NOISE, other, NOISE) == other + (NOISE if not other.endswith((b"\n", b"\r")) else b"")
    assert filtered(*(other[i : i + 1] for i in range(len(other)))) == other


def test_what_cannot_become_the_line_does_not_wait_for_its_end():
    out: list[bytes] = []
    lines = LineFilter(out.append)
    lines.feed(b"loading 3 %")
    assert out == [b"loading 3 %"]
    lines.feed(b" [2026")  # not at the start of a line
    assert b"".join(out) == b"loading 3 % [2026"


DRIVER = """
import os, sys, time
from acestep_ray.terminal.driver_stderr import filter_stderr
NOISE = {noise!r}
filter_stderr()
filter_stderr()
"""


def start(code: str, stderr=subprocess.PIPE) -> subprocess.Popen:
    # Below a command in the background, Ctrl-C is ignored from the start.
    ctrl_c = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen(
        [sys.executable, "-c", ctrl_c + DRIVER.format(noise=NOISE) + code],
        stderr=stderr,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def told(code: str) -> tuple[int, bytes]:
    process = start(code)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


def test_python_and_c_code_both_reach_standard_error_and_the_line_does_not():
    code, err = told(
        """
os.write(2, b"from C\\n"); os.write(2, NOISE); os.write(2, b"more from C, no end")
print("from Python", file=sys.stderr)
"""
    )
    assert code == 0
    assert sorted(err.replace(b"no end", b"no end\n").split(b"\n")) == sorted(
        [b"from C", b"more from C, no end", b"from Python", b""]
    )


def test_a_traceback_and_its_exit_code_are_as_without():
    code, err = told("raise ValueError('told')")
    assert code == 1
    assert err.startswith(b"Traceback")
    assert err.endswith(b"ValueError: told\n")


def test_what_a_crash_writes_arrives():
    code, err = told(
        """
import faulthandler; faulthandler.enable()
os.write(2, b"last words of C++\\n")
os.abort()
"""
    )
    assert code == -signal.SIGABRT
    assert b"last words of C++\n" in err
    assert b"Fatal Python error: Aborted" in err


def test_ctrl_c_reaches_the_driver_alone():
    process = start("os.write(2, b'ready\\n'); time.sleep(60)")
    assert process.stderr.readline() == b"ready\n"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert err.endswith(b"KeyboardInterrupt\n")


def test_a_process_that_is_left_behind_does_not_keep_standard_error_open():
    began = time.monotonic()
    code, err = told(
        "import subprocess; subprocess.Popen(['sleep', '20'], stdout=subprocess.DEVNULL); os.write(2, b'end')"
    )
    assert (code, err) == (0, b"end")
    assert time.monotonic() - began < 15


def test_a_terminal_stays_one_for_pythons_stream():
    ours, theirs = pty.openpty()
    process = start(
        "print(sys.stderr.isatty(), sys.stderr.encoding); os.write(2, NOISE + b'shown\\n')", stderr=theirs
    )
    os.close(theirs)
    out, _ = process.communicate(timeout=30)
    assert out.split()[0] == b"True"
    assert os.read(ours, 1000) == b"shown\r\n"
    os.close(ours)


def test_a_stream_that_is_not_file_descriptor_2_is_left_alone():
    code, err = told("pass")
    assert (code, err) == (0, b"")
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "import io, sys; sys.stderr = io.StringIO()\n"
            "from acestep_ray.terminal.driver_stderr import filter_stderr\nfilter_stderr()\n"
            "print(type(sys.stderr).__name__)",
        ],
        capture_output=True,
        timeout=30,
    )
    assert run.stdout == b"StringIO\n"
