"""Numbers for people have separators, and no exponent where a plain number is as short."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import acestep_ray
from acestep_ray.terminal.numbers import number_text
from acestep_ray.terminal.progress import Progress
from acestep_ray.training.settings import StepsDone
from acestep_ray.units import size_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2610.4, "2,610"),
        (2613.0, "2,610"),
        (999.6, "1,000"),
        (1e6, "1,000,000"),
        (123456.0, "123,000"),
        (60.44, "60.4"),
        (60.0, "60"),
        (1.0, "1"),
        (0.5, "0.5"),
        (0.0123, "0.0123"),
        (0.00036684, "0.000367"),
        (0.00001, "0.00001"),
        (3.2e-9, "3.2e-9"),
        (0.0, "0"),
        (-0.0, "0"),
        (-2610.4, "-2,610"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (1234567, "1,234,567"),
        (7, "7"),
    ],
)
def test_a_number_is_written_plainly(value, text):
    assert number_text(value) == text


def test_more_digits_are_kept_where_they_are_asked_for():
    assert number_text(11423.6, 4) == "11,420"
    assert number_text(0.00036684, 4) == "0.0003668"
    assert number_text(1.5, 6) == "1.5"


@pytest.mark.parametrize("power", range(-6, 13))
@pytest.mark.parametrize("mantissa", [1.0, 2.6104, 9.9949, 9.996])
def test_no_exponent_is_shown_from_a_millionth_to_a_billion(mantissa, power):
    value = mantissa * 10.0**power
    text = number_text(value)
    assert "e" not in text
    assert float(text.replace(",", "")) == pytest.approx(value, rel=5e-3)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (1_234_567, "1.23 MB"),
        (999_600_000, "1 GB"),
        (2.5e15, "2,500 TB"),
    ],
)
def test_bytes_have_the_unit_in_which_they_are_below_a_thousand(num_bytes, text):
    assert size_text(num_bytes) == text


def test_a_step_shows_its_speed_and_counts_with_separators():
    assert (
        str(StepsDone(2000, 2_000_000, 0.5, 2610.4))
        == "step 2,000/2,000,000 · loss 0.5000 · 2,610 × real time"
    )
    assert "0.0123 × real time" in str(StepsDone(1, 2, 0.5, 0.0123))


@pytest.mark.parametrize(
    ("seconds", "rate"), [(1.0, "2,500 songs/s"), (50.0, "50 songs/s"), (25e6, "10,000 s/song")]
)
def test_a_bars_rate_is_a_plain_number(capsys, seconds, rate):
    now = [0.0]
    with Progress("encoding", 2500, "songs", seconds_between_lines=0.0, clock=lambda: now[0]) as progress:
        progress.update(0)
        now[0] = seconds
        progress.update(2500)
    err = capsys.readouterr().err
    assert "2,500/2,500 songs" in err
    assert rate in err


def test_no_message_formats_a_number_with_an_exponent():
    """`g` and `e` write 2.6e+03: `number_text` is for people, and the few others are values to be typed again."""
    root = Path(acestep_ray.__file__).parent
    found = []
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FormattedValue) and node.format_spec is not None:
                spec = ast.unparse(node.format_spec)
                if re.search(r"[ge]'?$", spec.strip("f'\"")):
                    found.append(f"{file.relative_to(root)}: {ast.unparse(node.value)}")
    typed_again = {
        "evaluation/candidates.py",
        "tuning/distributions.py",
        "tuning/job.py",
        "cache/precompute.py",
    }
    short_waits = {"doctor/cluster.py", "doctor/job.py"}
    others = [
        one
        for one in found
        if one.partition(":")[0] not in typed_again | short_waits | {"terminal/numbers.py"}
    ]
    assert others == []
