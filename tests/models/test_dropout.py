"""Counter-based dropout drops the right share, keeps the mean, and depends on nothing but its counters."""

from __future__ import annotations

import torch

from acestep_ray.models.dropout import counter_dropout


def test_share_mean_and_independence_of_layers_and_samples():
    index = torch.arange(200_000)
    x = torch.ones(3, 200_000)
    seeds = torch.tensor([1, 2, 1])
    first = counter_dropout(x, 0.1, seeds, 1, index)
    second = counter_dropout(x, 0.1, seeds, 2, index)
    dropped = (first == 0).float().mean(dim=1)
    # 0.1 ± 5 standard deviations of the share of 200,000 coin tosses.
    assert ((dropped - 0.1).abs() < 5 * (0.09 / 200_000) ** 0.5).all()
    torch.testing.assert_close(first.mean(dim=1), torch.ones(3), rtol=0.01, atol=0)
    assert torch.equal(first[0], first[2])
    both = ((first == 0) & (second == 0)).float().mean(dim=1)
    assert ((both - 0.01).abs() < 0.002).all()
    across = ((first[0] == 0) & (first[1] == 0)).float().mean()
    assert abs(across - 0.01) < 0.002
