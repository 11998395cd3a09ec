"""Pictures and tables of an evaluation, in the cases that a small one does not show."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq

from acestep_ray.evaluation.frechet import FrechetScore, score_frechet
from acestep_ray.evaluation.report import draw_distances, overview, write_page, write_tables
from acestep_ray.evaluation.scores import ModelScore, Yardsticks, score_rows
from tests.evaluation.test_frechet import SHIFT, songs

NOTHING = Yardsticks({}, {}, {}, {}, {})


def model(label: str, **measured) -> ModelScore:
    return ModelScore(label, "base", label, 1.0, **measured)


def test_an_interval_below_fad_infinity_is_drawn_as_it_is():
    score = FrechetScore(9.0, 5.0, 1.0, 3.0, 0.9, [(0.1, 6.0), (0.2, 7.0), (0.4, 9.0)])
    (axes,) = draw_distances([model("a", frechet={"mert": score})], "mert").axes
    (interval,) = (line for line in axes.lines if line.get_marker() == "_")
    assert list(interval.get_ydata()) == [1.0, 3.0]


def test_fewer_windows_than_dimensions_can_be_drawn():
    random = np.random.default_rng(0)
    wide = [
        np.pad(song, ((0, 0), (0, 200))) + random.standard_normal((6, 216))
        for song in songs(random, 10, SHIFT)
    ]
    score = score_frechet(wide[:5], wide[5:])
    assert draw_distances([model("a", frechet={"mert": score})], "mert").axes


def test_what_one_model_lacks_is_empty_and_the_column_stays():
    with_interval = FrechetScore(2.0, 1.5, 1.0, 1.75, 0.9, [(0.1, 1.0), (0.2, 2.0)])
    without = FrechetScore(3.0, None, None, None, None, [])
    scores = [
        model("a", frechet={"mert": with_interval}, losses=[0.5] * 8),
        model("b", frechet={"mert": without}),
        model("c"),
    ]
    assert overview(score_rows(scores), ["mert"]) == (
        ["model", "loss", "FAD∞ mert"],
        [["a", 0.5, "1.5 (1 to 1.75)"], ["b", None, "3, no FAD∞"], ["c", None, None]],
    )


def test_a_loss_that_is_no_number_is_null_and_breaks_nothing(tmp_path):
    scores = [model("a", losses=[float("nan")] * 8), model("b", losses=[0.5] * 8)]
    write_tables(tmp_path, scores, NOTHING, {"seed": 0}, ["a note"])
    found = json.loads((tmp_path / "scores.json").read_text(), parse_constant=lambda name: 1 / 0)
    assert found["models"][0]["loss_by_noise_level"] == [None] * 8
    rows = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert [row["loss/validation"] for row in rows] == [None, 0.5]
    write_page(tmp_path / "index.html", "x", scores, NOTHING, {}, ["warning: <b>not</b> HTML"])
    assert "warning: &lt;b&gt;not" in (tmp_path / "index.html").read_text()
