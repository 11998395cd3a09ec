from __future__ import annotations

import json

import numpy as np
import pytest

from acestep_ray.cache.schema import hash_of, quantise_directions, write_json, written_whole


def test_quantised_directions_point_where_the_features_did():
    features = np.random.default_rng(0).standard_normal((200, 768))
    features *= np.logspace(-20, 20, 200)[:, None]  # only the direction counts
    restored = quantise_directions(features.astype(np.float32)).astype(np.float64)
    cosine = (
        (restored * features).sum(1) / np.linalg.norm(restored, axis=1) / np.linalg.norm(features, axis=1)
    )
    assert cosine.min() > 0.999


def test_quantised_frames_use_the_whole_range_and_zeros_stay_zeros():
    with np.errstate(invalid="raise"):
        quantised = quantise_directions(np.array([[0.0, 0.0], [0.5, -1e-30], [-3.0, 1.5]]))
    assert quantised.dtype == np.int8
    assert quantised.tolist() == [[0, 0], [127, 0], [-127, 64]]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "manifest.json"
    write_json(file, {"a": 1})

    def write_half() -> None:
        with written_whole(file) as unfinished:
            unfinished.write_text("half of")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert json.loads(file.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


def test_hash_depends_on_values_and_not_on_the_order_of_keys():
    assert hash_of({"a": 1, "b": [2.5]}) == hash_of({"b": [2.5], "a": 1})
    assert hash_of(["ab", "c"]) != hash_of(["a", "bc"])
