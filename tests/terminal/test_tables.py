"""Summaries as small tables."""

from __future__ import annotations

from acestep_ray.terminal import column_table, fact_table


def test_values_stand_below_one_another_and_go_on_there():
    assert fact_table(
        [("steps", 30), ("held out", "0.5 → 0.4\nof 3 songs"), ("", "and more")]
    ).splitlines() == [
        "steps     30",
        "held out  0.5 → 0.4",
        "          of 3 songs",
        "          and more",
    ]


def test_numbers_stand_on_the_right_of_their_column():
    assert column_table(["trial", "rank", "loss"], [["a", "8", "0.51"], ["bb", "128", "–"]]).splitlines() == [
        "trial  rank  loss",
        "a         8  0.51",
        "bb      128     –",
    ]


def test_a_table_may_have_no_rows():
    assert column_table(["trial", "rank"], []) == "trial  rank"
