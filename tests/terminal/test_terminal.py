"""What a user sees of a command on a terminal, and what a pipe gets of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.terminal.screen import on_terminal

PREPARE = ["prepare", "--data_dir", "songs", "--output_dir", "dataset"]


def command(kind: str, *switches: str) -> list[str]:
    return [sys.executable, "-m", "tests.terminal.commands", kind, *switches, *PREPARE]


def piped(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, capture_output=True, text=True, timeout=120, env={**os.environ, **variables}, check=False
    )


def test_a_terminal_gets_a_bar_and_colours():
    shown = on_terminal(command("long"))
    assert shown.code == 0
    assert "━" in shown.text
    assert re.search(r"15/15 songs · 0 rejected · [\d.]+ songs/s · took 0:0\d", shown.text)
    assert re.search(r"\d+/15 songs · 0 rejected · [\d.]+ songs/s · 0:0\d left", shown.text)
    assert "\r\x1b[2Ka line of the job\r\n" in shown.text  # above the bar, that is drawn again
    assert "\x1b[36msongs\x1b[0m" in shown.text
    assert "\x1b[33mwarning\x1b[0m" in shown.text


def test_colours_can_be_turned_off():
    shown = on_terminal(command("long"), NO_COLOR="1")
    assert "━" in shown.text
    assert not re.search(r"\x1b\[[\d;]*3\d", shown.text)


def test_a_pipe_gets_neither_bar_nor_colours():
    done = piped(command("long"), FORCE_COLOR="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["a line of the job", "songs    3", "warning  one is short"]


def test_an_interrupt_leaves_the_terminal_as_it_was():
    shown = on_terminal(command("endless"), interrupt_at="1/15")
    assert shown.code == 130
    assert shown.text.rstrip().endswith("interrupted")
    assert (
        shown.text.count("\x1b[?25l") == shown.text.count("\x1b[?25h") == 1
    )  # the cursor is hidden, and back
    assert shown.text.index("\x1b[?25h") < shown.text.index("interrupted")


def test_a_mistake_is_a_message_and_a_traceback_is_for_who_asks():
    plain, debugged = piped(command("mistaken")), piped(command("mistaken", "--debug"))
    assert plain.returncode == debugged.returncode == 2
    assert plain.stderr == "error: there are no songs: songs\n  → give a folder of songs\n"
    assert debugged.stderr.startswith("Traceback (most recent call last):")
    assert debugged.stderr.endswith(plain.stderr)
    assert "\x1b[1;31merror:\x1b[0m there are no songs" in on_terminal(command("mistaken")).text


@pytest.mark.ray
@pytest.mark.faults
def test_what_ray_and_its_workers_say_is_held_back_unless_asked_for():
    with ThreadPoolExecutor() as pool:
        quiet, verbose = pool.map(piped, (command("ray"), command("ray", "-v")))
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert quiet.stdout.splitlines() == ["songs    3", "warning  one is short"]
    assert verbose.returncode == 0
    assert "Started a local Ray instance" in verbose.stderr
    assert "printed by a worker" in verbose.stdout
    assert "\x1b" not in verbose.stdout


def test_help_is_as_wide_as_the_terminal():
    for columns in (72, 100):
        shown = on_terminal([sys.executable, "-m", "acestep_ray", "train", "--help"], columns=columns)
        lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in shown.text.splitlines()]
        assert columns - 15 < max(map(len, lines)) <= columns
        assert "\x1b[36m--learning_rate X\x1b[0m" in shown.text
