"""What a terminal obeys does not reach it from names, keys, texts and messages of others."""

from __future__ import annotations

import io
import os
import sys

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from acestep_ray.terminal import (
    Progress,
    column_table,
    fact_table,
    show_error,
    show_line,
    show_summary,
    visible,
    visible_line,
)
from acestep_ray.terminal.stderr_filter import LineFilter
from tests.security.bounded import ROOT
from tests.terminal.screen import on_terminal

EVIL = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\u202ee\u200bf\x7fg\u2066h\rerror: i\u2028j"
OBEYED = "\x1b\x07\x9b\u202e\u200b\x7f\u2066\r\u2028"


@pytest.mark.parametrize(
    "character", [*map(chr, [*range(9), *range(11, 32), *range(127, 160)]), *"\u061c\u200f\ufeff"]
)
def test_each_is_shown_as_its_code(character):
    assert character not in visible(f"a{character}b")
    assert visible_line(f"a{character}b").isascii()
    assert visible("a\n\tb — é 日本 🎵") == "a\n\tb — é 日本 🎵"
    assert visible_line("a\nb\tc") == r"a\nb\tc"


@pytest.mark.parametrize(
    "show", [show_summary, show_line, lambda text, stream: show_error("error", text, stream)]
)
def test_summaries_lines_and_errors(show):
    stream = io.StringIO()
    show(f"{EVIL} [bold]x[/bold] [link=http://e]", stream)
    assert not set(OBEYED) & set(stream.getvalue())
    assert "[bold]x[/bold] [link=http://e]" in stream.getvalue()


def test_a_line_in_a_message_does_not_look_like_a_message():
    stream = io.StringIO()
    show_error("error", "no such file: a\nerror: forged\n  → ours", stream)
    assert stream.getvalue() == "error: no such file: a\n  error: forged\n  → ours\n"


def test_tables():
    table = fact_table([(EVIL, EVIL), ("name", "a\nb")]) + column_table([EVIL], [["a\nb"]])
    assert not set(OBEYED) & set(table)
    assert r"a\nb" in table


def test_progress_bars_and_what_is_printed_above_them():
    stream = io.StringIO()
    bar = Progress(EVIL, 2, "songs", stream=stream, seconds_between_lines=0)
    bar.start()
    bar.say(EVIL)
    bar.update(1, EVIL)
    bar.update(2, EVIL)
    assert not set(OBEYED) & set(stream.getvalue())


def test_the_filter_of_standard_error():
    passed = []
    lines = LineFilter(passed.append)
    lines.feed(EVIL.replace("\r", "").encode() + b"\n\x1b[31mred\x1b[0m\n")
    lines.flush()
    shown = b"".join(passed)
    assert b"\x1b[2J" in shown or b"\\x1b[2J" in shown
    assert b"\\x1b[2J" in shown
    assert b"\x1b]" not in shown
    assert "\u202e".encode() not in shown
    assert b"\x1b[31mred\x1b[0m\n" in shown


def on_pty(arguments):
    """What a command writes to a terminal, all of it."""
    command = [sys.executable, "-m", "acestep_ray", *map(str, arguments)]
    return on_terminal(command, columns=200, PYTHONPATH=str(ROOT)).text


def assert_harmless(shown):
    assert "\x1b[2J" not in shown
    assert "\x1b]" not in shown
    for character in "\x07\x9b\u202e\u200b\x7f\u2066\u2028":
        assert character not in shown, ascii(shown)
    assert "\rerror: i" not in shown
    assert "\nerror: forged" not in shown
    assert r"\x1b[2J" in shown


NAME = EVIL.replace("/", "") + "\nerror: forged"


def test_prepare_on_a_terminal(tmp_path):
    songs = tmp_path / "songs"
    songs.mkdir()
    soundfile.write(songs / "a.wav", np.zeros(4410), 44_100)
    (songs / f"{NAME}.lrc").write_text("la")
    (songs / "a.json").write_text('{"caption": "x", "bpm": "' + r"\u001b[2J\u009b \u202e" + '"}')
    assert_harmless(on_pty(["prepare", "--data_dir", songs, "--output_dir", tmp_path / "set"]))
    (songs / f"{NAME}_prompt.txt").mkdir()
    (songs / f"{NAME}.wav").write_bytes(b"")
    os.mkfifo(songs / f"{NAME}_lyrics.txt")
    assert_harmless(on_pty(["prepare", "--data_dir", songs, "--output_dir", tmp_path / "set"]))


def test_info_on_a_terminal(tmp_path):
    tensors = {
        f"transformer.{EVIL}.lora_A.weight": torch.zeros(2, 4),
        f"transformer.{EVIL}.lora_B.weight": torch.zeros(4, 2),
    }
    save_file(tensors, tmp_path / "lora.safetensors", metadata={NAME: NAME})
    shown = on_pty(["info", tmp_path / "lora.safetensors"])
    assert_harmless(shown)


def test_the_parser_on_a_terminal(tmp_path):
    assert_harmless(on_pty(["prepare", "--data_dir", NAME, "--output_dir", "x"]))
    assert_harmless(on_pty(["info", NAME]))


def test_no_module_writes_csv():
    """Who adds one neutralises cells that a spreadsheet would compute: those that begin with =, +, -, @, tab or CR."""
    for path in (ROOT / "acestep_ray").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for call in ("csv.writer", "DictWriter", ".to_csv(", "write_csv("):
            assert call not in source, path
