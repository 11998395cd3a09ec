"""Counter-based dropout drops the right share, keeps the mean, and depends on nothing but its counters."""

from __future__ import annotations

import pytest
import torch

from acestep_ray.models.dropout import counter_dropout

P = 0.1


def masks(shape, seeds, layer=1, rows=None):
    rows = torch.arange(shape[-2]) if rows is None else rows
    return counter_dropout(torch.ones(len(seeds), *shape), P, torch.tensor(seeds), layer, rows) == 0


@pytest.mark.parametrize("shape", [(400, 500), (4, 200, 250)])
def test_the_right_share_is_dropped_and_the_mean_is_kept(shape):
    dropped = masks(shape, [1, 2]).float().flatten(1).mean(dim=1)
    # Five standard deviations of the share of 200,000 coin tosses.
    assert ((dropped - P).abs() < 5 * (P * (1 - P) / 200_000) ** 0.5).all()
    kept = counter_dropout(torch.ones(1, *shape), P, torch.tensor([1]), 1, torch.arange(shape[-2]))
    assert kept.mean() == pytest.approx(1.0, abs=0.005)


def test_samples_layers_rows_columns_and_heads_are_dropped_independently():
    mask = masks((4, 200, 250), [1, 2])
    pairs = {
        "samples": (mask[0], mask[1]),
        "layers": (mask[0], masks((4, 200, 250), [1], layer=2)[0]),
        "heads": (mask[0, 0], mask[0, 1]),
        "rows": (mask[..., :-1, :], mask[..., 1:, :]),
        "columns": (mask[..., :-1], mask[..., 1:]),
        "a square's diagonal": (
            mask[..., :-1, :-1] & mask[..., 1:, 1:],
            mask[..., :-1, 1:] & mask[..., 1:, :-1],
        ),
    }
    for name, (one, other) in pairs.items():
        both, expected = (one & other).float().mean(), one.float().mean() * other.float().mean()
        assert both == pytest.approx(float(expected), abs=0.003), name


def test_a_mask_depends_on_its_own_seed_and_rows_alone():
    assert torch.equal(masks((40, 50), [7, 8])[1], masks((40, 50), [8])[0])
    assert torch.equal(masks((40, 50), [7])[0, :10], masks((10, 50), [7])[0])
    assert torch.equal(masks((40, 50), [7])[0, 30:], masks((10, 50), [7], rows=torch.arange(30, 40))[0])
