"""What a terminal or a log cannot show is replaced, and ends nothing."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from acestep_ray.cli import main
from acestep_ray.terminal import replace_unencodable, show_summary

SCRIPT = """
import sys
from acestep_ray import cli
from acestep_ray.errors import InputError
def run(parsed):
    print("loss 1 → 2 · 日本 … né", flush=True)
    print("\\udce9", flush=True)
    for number in range(int(sys.argv[-1])):
        print("x" * 1000, flush=True)
    print("done", file=sys.stderr)
    open("ended", "w").close()
cli.run = run
sys.argv[1:] = ["doctor"]
sys.argv.append("{lines}")
cli.build_parser = lambda: type("P", (), {{"parse_args": lambda self, words: None}})()
cli.entry_point()
"""


def run(tmp_path, lines: int = 0, shell: str = "", **variables: str) -> subprocess.CompletedProcess[bytes]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(lines=lines), encoding="utf-8")
    command = [sys.executable, str(script)]
    if shell:
        command = ["bash", "-o", "pipefail", "-c", f"{sys.executable} {script} {shell}"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), **variables}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", rb"loss 1 -> 2 - ?? ... n?"),
        ("latin-1", b"loss 1 -> 2 \xb7 ?? ... n\xe9"),
        ("cp1252", b"loss 1 -> 2 \xb7 ?? \x85 n\xe9"),
        ("utf-8", "loss 1 → 2 · 日本 … né".encode()),
    ],
)
def test_what_an_encoding_has_not_is_replaced(encoding, shown, tmp_path):
    done = run(tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [shown, rb"\xe9"]


@pytest.mark.parametrize(
    "shell", [">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full", "| head -n 1", "2> /dev/full"]
)
def test_streams_that_are_closed_full_or_without_a_reader_end_nothing(shell, tmp_path):
    done = run(tmp_path, lines=300, shell=shell)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_help_errors_and_summaries_are_shown_in_any_encoding(encoding, monkeypatch):
    for arguments, code in ((["train", "--help"], 0), (["train", "--exp_name", "日本 →"], 2)):
        shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, shown)
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    replace_unencodable(stream)
    show_summary("loss → 日本", stream)
    assert stream.buffer.getvalue().decode(encoding) == "loss -> ??\n"
