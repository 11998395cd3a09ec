"""The search space: what is read, what is refused, and what a trial becomes."""

from __future__ import annotations

import math

import pytest
import torch

from acestep_ray.config import TrainConfig
from acestep_ray.errors import InputError
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.training.lora import add_lora
from acestep_ray.training.lora_config import DEFAULT_LORA
from acestep_ray.tuning.distributions import Choice, Log2Int, LogUniform, Uniform
from acestep_ray.tuning.space import (
    DIMENSIONS,
    ORIGINAL_TARGETS,
    TARGET_GROUPS,
    apply_params,
    default_params,
    read_distribution,
    read_space,
    target_modules,
)

CONFIG = TrainConfig(dataset_path="cache", checkpoint_dir="checkpoint")


def space_of(tmp_path, text: str, **flags: str):
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return read_space(str(path), flags)


def test_the_default_space_is_that_of_the_issue():
    space = read_space(None, {})
    assert list(space.dimensions) == list(DIMENSIONS)
    assert space.dimensions["rank"] == Log2Int(4, 256)
    assert space.dimensions["learning_rate"] == LogUniform(1e-5, 1e-3)
    assert space.dimensions["alpha"] == Choice("r", "2r", "rslora")


def test_a_file_names_distributions_lists_and_fixed_values(tmp_path):
    space = space_of(
        tmp_path,
        "rank: log2int(8, 32)\n"
        "alpha: 32\n"
        "learning_rate: loguniform(1e-4, 1e-2)\n"
        "dropout: uniform(0, 0.2)\n"
        "targets: [attention + speaker, feed_forward]\n",
    )
    assert space.dimensions == {
        "rank": Log2Int(8, 32),
        "alpha": Choice(32.0),
        "learning_rate": LogUniform(1e-4, 1e-2),
        "targets": Choice("attention+speaker", "feed_forward"),
        "dropout": Uniform(0.0, 0.2),
    }
    assert "log2int(8, 32)" in space.render()
    assert "ssl_coeff" not in space.render()


def test_what_is_shown_reads_back_as_the_same_space(tmp_path):
    space = read_space(None, {"learning_rate": "loguniform(1.23456789e-5, 1e-3)", "rank": "16"})
    text = "\n".join(f"{name}: {one}" for name, one in space.describe().items())
    assert space_of(tmp_path, text) == space


def test_a_flag_replaces_the_files_dimension(tmp_path):
    space = space_of(tmp_path, "rank: log2int(8, 32)\nlearning_rate: 1e-4\n", rank="choice(4, 12)")
    assert space.dimensions == {"rank": Choice(4, 12), "learning_rate": Choice(1e-4)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no dimensions"),
        ("rank: choice()", "`rank` is empty"),
        ("rank:", "`rank` is empty"),
        ("rank: []", "`rank` is empty"),
        ("ranks: log2int(4, 8)", "unknown dimension `ranks`(?s:.*)did you mean `rank`"),
        ("rank: choice(4, 8.5)", "`rank` '8.5' is not a whole number"),
        ("rank: [4, true]", "`rank` True is not a whole number"),
        ("rank: uniform(4, 8)", "`rank` cannot be drawn from `uniform`"),
        ("rank: log2int(4, 12)", "12 is no power of two"),
        ("rank: log2int(8, 4)", "8 is not below 4"),
        ("rank: log2int(8)", "a lowest and a highest value"),
        ("learning_rate: normal(0, 1)", "`learning_rate` cannot be drawn from `normal`"),
        ("learning_rate: loguniform(0, 1)", "`learning_rate` '0' is not a number above 0"),
        ("ssl_coeff: loguniform(0, 1)", "a logarithm needs numbers above 0"),
        ("dropout: choice(0, 1)", "`dropout` '1' is not a probability"),
        ("alpha: 3r", "`alpha` '3r' is not r, 2r, rslora"),
        ("targets: attention+mlp", "'attention.mlp' is not groups of modules"),
        ("rank: 16\nlearning_rate: 1e-4", "there is nothing to search"),
        ("- rank", "has no dimensions"),
        ("rank: [4", "cannot read the search space"),
    ],
)
def test_what_is_no_space_is_refused_with_its_place(tmp_path, text, said):
    with pytest.raises(InputError, match=said) as error:
        space_of(tmp_path, text)
    assert "space.yaml" in str(error.value)


def test_a_flag_that_is_no_distribution_is_named():
    with pytest.raises(InputError, match="--search_rank"):
        read_space(None, {"rank": "log2int(4, 100)"})


def test_draws_follow_their_counters_and_fill_the_space():
    space = read_space(None, {"dropout": "uniform(0, 0.1)"})
    drawn = [space.sample(7, number) for number in range(400)]
    assert drawn == [space.sample(7, number) for number in range(400)]
    assert drawn[0] != space.sample(8, 0)
    assert {params["rank"] for params in drawn} == {4, 8, 16, 32, 64, 128, 256}
    assert {params["alpha"] for params in drawn} == {"r", "2r", "rslora"}
    rates = [params["learning_rate"] for params in drawn]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    # Even on a logarithmic scale: half of them below the geometric middle.
    assert 0.4 < sum(rate < 1e-4 for rate in rates) / len(rates) < 0.6
    assert all(0 <= params["dropout"] <= 0.1 for params in drawn)


@pytest.mark.parametrize(
    ("distribution", "wanted", "nearest"),
    [
        (Log2Int(4, 256), 16, 16),
        (Log2Int(32, 64), 16, 32),
        (Choice(1, 32), 16, 1),
        (Choice("r", "2r"), "rslora", "r"),
        (Choice("r", 32.0), 30, 32.0),
        (LogUniform(1e-3, 1e-2), 1e-4, 1e-3),
        (Uniform(0.1, 0.2), 0.15, 0.15),
    ],
)
def test_the_nearest_value_is_the_wanted_one_where_it_is_there(distribution, wanted, nearest):
    assert distribution.nearest(wanted) == nearest


@pytest.mark.parametrize("text", ["log2int(4, 256)", "choice(8, 3)", "64"])
def test_optunas_values_come_back_as_ours(text):
    distribution = read_distribution("rank", text, "here")
    theirs = distribution.optuna()
    for value in distribution.ends():
        assert theirs._contains(theirs.to_internal_repr(distribution.to_optuna(value)))
        assert distribution.from_optuna(distribution.to_optuna(value)) == value


def test_params_become_settings_and_a_lora_configuration():
    params = {
        "rank": 64,
        "alpha": "2r",
        "learning_rate": 3e-4,
        "targets": "attention+speaker",
        "dropout": 0.05,
        "ssl_coeff": 0.1,
    }
    config, lora = apply_params(params, CONFIG, DEFAULT_LORA)
    assert (config.learning_rate, config.ssl_coeff) == (3e-4, 0.1)
    assert (lora["r"], lora["lora_alpha"], lora["use_rslora"], lora["lora_dropout"]) == (64, 128, False, 0.05)
    assert lora["target_modules"] == [*TARGET_GROUPS["attention"], *TARGET_GROUPS["speaker"]]
    assert DEFAULT_LORA["r"] == 16


@pytest.mark.parametrize(("rule", "alpha"), [("r", 64), ("2r", 128), (32.0, 32.0)])
def test_alpha_rules(rule, alpha):
    _, lora = apply_params({"rank": 64, "alpha": rule}, CONFIG, DEFAULT_LORA)
    assert lora["lora_alpha"] == alpha
    assert not lora["use_rslora"]


def test_rslora_is_as_strong_as_2r_at_rank_16():
    _, lora = apply_params({"rank": 16, "alpha": "rslora"}, CONFIG, DEFAULT_LORA)
    assert lora["use_rslora"]
    assert lora["lora_alpha"] / math.sqrt(lora["r"]) == 2


def test_what_is_not_searched_stays_as_it_is_configured():
    _, lora = apply_params({"learning_rate": 1e-3}, CONFIG, {**DEFAULT_LORA, "lora_alpha": 5})
    assert lora == {**DEFAULT_LORA, "lora_alpha": 5}


def test_the_settings_without_a_search_are_the_originals():
    found = default_params(CONFIG, DEFAULT_LORA)
    assert found == {
        "rank": 16,
        "alpha": "2r",
        "learning_rate": 1e-4,
        "targets": ORIGINAL_TARGETS,
        "dropout": 0.0,
        "ssl_coeff": 1.0,
    }


def test_groups_are_modules_of_the_transformer_and_the_original_targets_are_four_of_them(checkpoint):
    def trained(targets):
        with torch.device("meta"):
            model = ACEStepTransformer(checkpoint.transformer_config)
            return set(add_lora(model, {"r": 4, "target_modules": targets}))

    together = trained(target_modules(ORIGINAL_TARGETS.split("+")))
    assert together == trained(DEFAULT_LORA["target_modules"])
    parts = [trained(target_modules([group])) for group in TARGET_GROUPS]
    assert all(parts)
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert trained(target_modules(TARGET_GROUPS)) == set().union(*parts)


def test_extremes_hold_every_choice_and_both_ends_of_a_range():
    space = read_space(None, {"learning_rate": "uniform(1e-4, 1e-3)"})
    extremes = space.extremes()
    assert {params["rank"] for params in extremes} == {4, 256}
    assert {params["learning_rate"] for params in extremes} == {1e-4, 1e-3}
    assert {params["targets"] for params in extremes} == set(space.dimensions["targets"].values)
    assert max(params["ssl_coeff"] for params in extremes) == 1


def test_a_rank_that_no_layer_has_is_told_with_the_searchs_own_flag(tmp_path):
    from acestep_ray.config import TrainConfig
    from acestep_ray.models.checkpoint import CheckpointDir
    from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
    from acestep_ray.training.lora_config import DEFAULT_LORA
    from acestep_ray.tuning.job import check_space

    write_tiny_checkpoint(tmp_path / "tiny")
    space = read_space(None, {"rank": "choice(4, 256)"})
    base = TrainConfig(dataset_path="c", checkpoint_dir=str(tmp_path / "tiny"), lora_config_path="lora.json")
    with pytest.raises(InputError, match="rank 256 is larger") as told:
        check_space(space, base, dict(DEFAULT_LORA), CheckpointDir.open(tmp_path / "tiny"))
    assert "--search_rank" in told.value.fix
    assert "rank_pattern" not in told.value.fix
