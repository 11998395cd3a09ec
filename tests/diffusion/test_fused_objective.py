"""The SSL loss in one pass over the features gives the numbers of the plain function."""

from __future__ import annotations

from tests.interpreted import run_interpreted

# Rows of a gradient that end in the same bits or the next ones.
BOUNDS = {"of float32": 1e-6, "of float16": 2e-3, "of bfloat16": 1e-2}


def test_the_fused_ssl_loss_and_its_gradient_are_those_of_the_plain_one():
    errors = run_interpreted("tests.diffusion.fused_objective_cases")
    assert len(errors) == 25
    past_the_end = {name for name, error in errors.items() if "past the end" in name and error != 0}
    assert not past_the_end
    wrong = {
        name: error
        for name, error in errors.items()
        if not error < next(bound for dtype, bound in BOUNDS.items() if name.endswith(dtype))
    }
    assert not wrong
