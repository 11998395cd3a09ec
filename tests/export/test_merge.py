"""Merged checkpoints, LoRAs out of differences, and mixtures."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.models.model_loading_utils import load_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from acestep_ray import cli
from acestep_ray.config import ExportConfig, ExtractConfig, MergeConfig, MixConfig
from acestep_ray.errors import InputError
from acestep_ray.export import merge as merging
from acestep_ray.export.extract import REPORT, extract
from acestep_ray.export.job import export
from acestep_ray.export.lora import ADAPTER_NAME, merge_loras
from acestep_ray.export.low_rank import best_of_rank, reduced
from acestep_ray.export.merge import RECORD, merge
from acestep_ray.export.mix import mix
from acestep_ray.export.reading import LORA_FILE, LoraUpdate, open_lora
from acestep_ray.models.checkpoint import TRANSFORMER, CheckpointDir
from acestep_ray.models.transformer import is_unused_parameter
from tests.export.conftest import DORA, PATTERNS, RSLORA, largest_difference, velocity
from tests.loras import write_lora

BASE_FILE = f"{TRANSFORMER}/diffusion_pytorch_model.safetensors"


@pytest.fixture
def two_loras(tmp_path, trained):
    """Two LoRAs of different ranks that share some modules, and the models that they come from."""
    models = [
        trained(PATTERNS, seed=1),
        trained({**RSLORA, "target_modules": ["to_q", "genre_embedder"]}, seed=2),
    ]
    paths = []
    for name, model in zip(("first", "second"), models, strict=True):
        (tmp_path / name).mkdir()
        paths.append(write_lora(tmp_path / name, model, ADAPTER_NAME))
    return paths, models


def merged(checkpoint, paths, directory, **settings):
    config = MergeConfig(
        str(checkpoint.path), ",".join(map(str, paths)), str(directory), **{"dtype": "float32", **settings}
    )
    return merge(config)


def added_by(model):
    """What a model's LoRA layers add to each weight (out, in), as they were trained."""
    return {
        f"{name}.weight": layer.scaling[ADAPTER_NAME]
        * (layer.lora_B[ADAPTER_NAME].weight @ layer.lora_A[ADAPTER_NAME].weight).detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }


@pytest.mark.parametrize("lora", [PATTERNS, RSLORA, DORA])
def test_the_merged_checkpoint_gives_the_training_models_output(tmp_path, checkpoint, trained, lora):
    model = trained(lora)
    merged(checkpoint, [write_lora(tmp_path, model, ADAPTER_NAME)], tmp_path / "out")
    found = CheckpointDir.open(tmp_path / "out")
    assert largest_difference(velocity(found.load_transformer()), velocity(model)) < 1e-5


def test_the_merged_checkpoint_is_complete_and_all_else_is_as_it_was(tmp_path, checkpoint, trained):
    path = write_lora(tmp_path, trained({"r": 2, "target_modules": ["speaker_embedder"]}), ADAPTER_NAME)
    summary = merged(checkpoint, [path], tmp_path / "out")
    assert summary.changed == 1
    there = {p.relative_to(checkpoint.path): p for p in checkpoint.path.rglob("*") if p.is_file()}
    for name, source in there.items():
        if str(name) != BASE_FILE and not name.name.startswith("."):
            assert (tmp_path / "out" / name).read_bytes() == source.read_bytes(), name
    before, after = load_file(checkpoint.path / BASE_FILE), load_file(tmp_path / "out" / BASE_FILE)
    assert before.keys() == after.keys()
    assert any(is_unused_parameter(name) for name in after)
    assert [n for n in before if not torch.equal(before[n], after[n])] == ["speaker_embedder.weight"]
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["base"] == checkpoint.fingerprint("transformer")


def test_weights_in_bfloat16_are_in_shards_that_diffusers_understands(tmp_path, checkpoint, two_loras):
    paths, _ = two_loras
    summary = merged(
        checkpoint, paths, tmp_path / "out", dtype="bfloat16", max_shard_size="200KB", lora_weight="0.5,-0.25"
    )
    folder = tmp_path / "out" / TRANSFORMER
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert summary.files == len(files) > 3
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    shards = [load_state_dict(str(folder / name)) for name in files]
    for name, shard in zip(files, shards, strict=True):
        assert set(shard) == {key for key, place in index["weight_map"].items() if place == name}
        size = sum(tensor.nbytes for tensor in shard.values())
        assert size <= 200_000 or len(shard) == 1
    found = {key: tensor for shard in shards for key, tensor in shard.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    model = checkpoint.load_transformer()
    merge_loras(model, [(paths[0], 0.5), (paths[1], -0.25)])
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.to(torch.bfloat16)), name
    reloaded = CheckpointDir.open(tmp_path / "out").load_transformer(torch.bfloat16)
    assert reloaded.speaker_embedder.weight.dtype == torch.bfloat16


def test_strengths_scale_what_each_lora_adds_in_any_order(tmp_path, checkpoint, two_loras):
    paths, models = two_loras
    expected = dict(checkpoint.load_transformer().named_parameters())
    for strength, model in zip((0.5, -2.0), models, strict=True):
        for name, change in added_by(model).items():
            expected[name] = expected[name] + strength * change.view_as(expected[name])
    merged(checkpoint, paths, tmp_path / "a", lora_weight="0.5, -2")
    merged(checkpoint, paths[::-1], tmp_path / "b", lora_weight="-2,0.5")
    for folder in ("a", "b"):
        found = load_file(tmp_path / folder / BASE_FILE)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_a_dora_and_a_lora_change_the_weights_that_were_released(tmp_path, checkpoint, trained):
    (tmp_path / "dora").mkdir()
    dora = write_lora(tmp_path / "dora", trained(DORA), ADAPTER_NAME)
    lora = write_lora(tmp_path, trained(RSLORA, seed=3), ADAPTER_NAME)
    for name, order in (("a", [dora, lora]), ("b", [lora, dora])):
        merged(checkpoint, order, tmp_path / name)
    first, second = (load_file(tmp_path / name / BASE_FILE) for name in ("a", "b"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "a" / RECORD).read_text())["loras"][0]["weight"] == 1.0


def test_a_merge_that_fails_leaves_nothing(tmp_path, checkpoint, two_loras, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(merging, "merged_weight", fail)
    (tmp_path / "new").mkdir()
    with pytest.raises(OSError, match="disk is full"):
        merged(checkpoint, two_loras[0], tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_weight": "1"}, "1 weights for 2 LoRAs"),
        ({"lora_weight": "1,strong"}, "not a list of numbers"),
        ({"lora_weight": "1,nan"}, "not a list of numbers"),
        ({"dtype": "float16"}, "unknown dtype(?s:.*)float32 or bfloat16"),
        ({"max_shard_size": "large"}, "not a size(?s:.*)5GB"),
    ],
)
def test_settings_that_cannot_be_merged_with_are_refused(tmp_path, checkpoint, two_loras, settings, message):
    with pytest.raises(InputError, match=message):
        merged(checkpoint, two_loras[0], tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def fine_tuned(tmp_path, checkpoint, change):
    """A fine-tuned transformer's folder: the base's weights, some of them changed."""
    folder = tmp_path / "run" / TRANSFORMER
    folder.mkdir(parents=True)
    weights = load_file(checkpoint.path / BASE_FILE)
    change(weights)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_bytes((checkpoint.path / TRANSFORMER / "config.json").read_bytes())
    return folder


def extracted(checkpoint, finetuned, directory, rank, **settings):
    return extract(
        ExtractConfig(
            str(checkpoint.path), str(finetuned), str(directory), rank, **{"device": "cpu", **settings}
        )
    )


def test_the_difference_of_a_merged_model_is_its_lora_again(tmp_path, checkpoint, trained):
    model = trained(PATTERNS)
    merged(checkpoint, [write_lora(tmp_path, model, ADAPTER_NAME)], tmp_path / "merged")
    summary = extracted(checkpoint, tmp_path / "merged", tmp_path / "out", rank=4)
    assert summary.relative_error < 1e-5
    assert summary.left_out == {}
    again = checkpoint.load_transformer()
    merge_loras(again, [(tmp_path / "out", 1.0)])
    assert largest_difference(velocity(again), velocity(model)) < 1e-5


def test_the_error_of_an_extraction_is_what_no_lora_of_its_rank_can_lower(tmp_path, checkpoint):
    names = ["genre_embedder", "transformer_blocks.0.ff.inverted_conv.conv", "transformer_blocks.1.attn.to_k"]

    def change(weights):
        generator = torch.Generator().manual_seed(3)
        for name in names:
            weight = weights[f"{name}.weight"]
            weights[f"{name}.weight"] = weight + 0.1 * torch.randn(weight.shape, generator=generator)

    summary = extracted(checkpoint, fine_tuned(tmp_path, checkpoint, change).parent, tmp_path / "out", rank=5)
    base, tuned = (load_file(path) for path in (checkpoint.path / BASE_FILE, tmp_path / "run" / BASE_FILE))
    lora = open_lora(tmp_path / "out" / LORA_FILE)
    assert list(lora.updates) == sorted(names)
    tails = totals = 0.0
    for name in names:
        difference = (tuned[f"{name}.weight"] - base[f"{name}.weight"]).flatten(1).double()
        values = torch.linalg.svdvals(difference)
        tail = values[5:].square().sum().sqrt()
        error = (difference - (lora.updates[name].b @ lora.updates[name].a)).norm()
        assert error == pytest.approx(tail.item(), rel=1e-4)
        assert summary.errors[name].error == pytest.approx(tail.item(), rel=1e-4)
        assert summary.errors[name].relative == pytest.approx((tail / values.norm()).item(), rel=1e-4)
        tails, totals = tails + tail**2, totals + values.square().sum()
    assert summary.relative_error == pytest.approx((tails / totals).sqrt().item(), rel=1e-4)
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["relative_error"] == summary.relative_error
    assert report["modules"][names[0]]["relative"] == summary.errors[names[0]].relative
    assert names[0] in summary.render()


def test_what_no_lora_can_hold_is_named_and_counts_as_error(tmp_path, checkpoint):
    def change(weights):
        weights["speaker_embedder.weight"] += torch.ones(64, 1) @ torch.ones(1, 512) * 0.01  # of rank 1
        weights["speaker_embedder.bias"] += 0.5
        weights["lyric_embs.weight"][3] += 0.1
        weights["projectors.0.0.weight"] += 1.0  # the music does not depend on it
        weights["transformer_blocks.0.cross_attn.add_q_proj.weight"] += 1.0

    summary = extracted(checkpoint, fine_tuned(tmp_path, checkpoint, change), tmp_path / "out", rank=1)
    assert list(summary.errors) == ["speaker_embedder"]
    assert set(summary.left_out) == {"speaker_embedder.bias", "lyric_embs.weight"}
    left = 0.5 * 8.0, 0.1 * 32**0.5
    whole = (0.01 * (64 * 512) ** 0.5, *left)
    share = (sum(x**2 for x in left) / sum(x**2 for x in whole)) ** 0.5
    assert summary.relative_error == pytest.approx(share, rel=1e-3)
    assert "2 changes of norm" in summary.render()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: None, "nothing has changed"),
        (lambda weights: weights.pop("genre_embedder.weight"), "`genre_embedder.weight` is .*missing"),
        (
            lambda weights: weights.update({"genre_embedder.weight": torch.zeros(64, 31)}),
            r"`genre_embedder.weight` is \(64, 32\) in the base, \(64, 31\)",
        ),
        (lambda weights: weights["genre_embedder.weight"].fill_(float("nan")), "has NaN or infinite values"),
    ],
)
def test_a_difference_that_is_none_is_refused(tmp_path, checkpoint, change, message):
    with pytest.raises(InputError, match=message):
        extracted(checkpoint, fine_tuned(tmp_path, checkpoint, change), tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_extraction_from_no_transformer_is_refused(tmp_path, checkpoint):
    with pytest.raises(InputError, match="no transformer here: --finetuned_path"):
        extracted(checkpoint, tmp_path, tmp_path / "out", rank=2)
    with pytest.raises(InputError, match="at least 1: --rank 0"):
        extracted(checkpoint, tmp_path, tmp_path / "out", rank=0)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (7, 7), (600, 40)])
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_the_best_lora_of_a_rank_is_that_of_the_singular_values(shape, rank):
    difference = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    update, error = best_of_rank(difference, rank)
    u, s, v = torch.linalg.svd(difference.double(), full_matrices=False)
    expected = u[:, :rank] * s[:rank] @ v[:rank]
    torch.testing.assert_close((update.b @ update.a).double(), expected, rtol=1e-4, atol=1e-5)
    assert error.error == pytest.approx(s[rank:].norm().item(), abs=1e-6)
    assert update.rank == error.rank == min(rank, *shape)


@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])  # from pure noise, the hardest, to what training makes
def test_of_a_large_change_the_error_is_within_a_thousandth_of_the_least(decay):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(700, 900, dtype=torch.float64, generator=generator)
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    s = s * torch.arange(1, 701) ** -decay
    for difference in (u * s @ v, (u * s @ v).T):
        update, error = best_of_rank(difference.float(), 16)
        least = s[16:].norm().item()
        assert least * (1 - 1e-6) <= error.error <= 1.001 * least
        left = (difference - update.b.double() @ update.a.double()).norm().item()
        assert error.error == pytest.approx(left, rel=1e-4)


def test_a_change_of_lower_rank_than_asked_for_stays_finite():
    difference = torch.ones(6, 1) @ torch.ones(1, 4)
    update, error = best_of_rank(difference, 3)
    assert update.a.isfinite().all()
    torch.testing.assert_close(update.b @ update.a, difference)
    assert error.relative < 1e-6


def test_a_lora_is_reduced_without_its_product():
    generator = torch.Generator().manual_seed(0)
    update = LoraUpdate(
        torch.randn(9, 30, generator=generator), torch.randn(20, 9, generator=generator), None
    )
    smaller, error = reduced(update, 4)
    direct, expected = best_of_rank(update.b @ update.a, 4)
    torch.testing.assert_close(smaller.b @ smaller.a, direct.b @ direct.a, rtol=1e-4, atol=1e-4)
    assert error.error == pytest.approx(expected.error, rel=1e-5)
    assert update.norm() == pytest.approx((update.b @ update.a).norm().item(), rel=1e-5)


def mixed(paths, directory, **settings):
    return mix(MixConfig(",".join(map(str, paths)), str(directory), **settings))


def test_a_mixture_plays_what_its_parts_play_together(tmp_path, checkpoint, two_loras):
    paths, _ = two_loras
    mixed(paths, tmp_path / "out", lora_weight="0.7,-0.4")
    together, alone = checkpoint.load_transformer(), checkpoint.load_transformer()
    merge_loras(together, [(paths[0], 0.7), (paths[1], -0.4)])
    merge_loras(alone, [(tmp_path / "out", 1.0)])
    assert largest_difference(velocity(alone), velocity(together)) < 1e-5
    ranks = {name: update.rank for name, update in open_lora(tmp_path / "out" / LORA_FILE).updates.items()}
    assert ranks["transformer_blocks.0.attn.to_q"] == 4 + 8
    assert ranks["genre_embedder"] == 8


def test_a_mixture_of_smaller_rank_tells_its_error(tmp_path, two_loras):
    paths, _ = two_loras
    exact = mixed(paths, tmp_path / "exact")
    assert exact.relative_error == 0
    summary = mixed(paths, tmp_path / "small", rank=5)
    whole, small = (open_lora(tmp_path / name / LORA_FILE).updates for name in ("exact", "small"))
    assert max(update.rank for update in small.values()) == 5
    errors = [((whole[n].b @ whole[n].a) - (small[n].b @ small[n].a)).norm().item() ** 2 for n in whole]
    norms = [update.norm() ** 2 for update in whole.values()]
    assert summary.relative_error == pytest.approx((sum(errors) / sum(norms)) ** 0.5, rel=1e-3)
    assert f"{summary.relative_error:.4f} of the sum" in summary.render()


def test_what_does_not_add_up_is_not_mixed(tmp_path, trained, two_loras):
    (first, _), _ = two_loras
    dora = write_lora(tmp_path, trained(DORA), ADAPTER_NAME)
    with pytest.raises(InputError, match=r"a DoRA cannot be mixed(?s:.*)export extract"):
        mixed([first, dora], tmp_path / "out")
    other = tmp_path / "other.safetensors"
    tensors = {
        "genre_embedder.lora_A.weight": torch.ones(2, 9),
        "genre_embedder.lora_B.weight": torch.ones(5, 2),
    }
    save_file(tensors, other)
    with pytest.raises(InputError, match=r"`genre_embedder` is \(64, 32\) in one LoRA and \(5, 9\)"):
        mixed([two_loras[0][1], other], tmp_path / "out")
    with pytest.raises(InputError, match="no LoRA is given"):
        mixed([], tmp_path / "out")


def test_the_command_merges_extracts_and_mixes(tmp_path, checkpoint, two_loras, capsys):
    (first, second), _ = two_loras
    base = ["--checkpoint_dir", str(checkpoint.path)]
    both = ["--lora_path", f"{first},{second}", "--lora_weight", "1,0.5"]
    assert cli.main(["export", "merge", *base, *both, "--output_dir", str(tmp_path / "merged")]) == 0
    assert "strength 0.5" in capsys.readouterr().out
    tuned = ["--finetuned_path", str(tmp_path / "merged"), "--rank", "12", "--device", "cpu"]
    assert cli.main(["export", "extract", *base, *tuned, "--output_dir", str(tmp_path / "lora")]) == 0
    assert "in all   0.0000" in capsys.readouterr().out
    assert cli.main(["export", "mix", *both, "--output_dir", str(tmp_path / "mix"), "--rank", "2"]) == 0
    assert "rank     2" in capsys.readouterr().out
    assert cli.main(["export", "merge", *base, *both, "--output_dir", str(tmp_path / "merged")]) == 2
    assert "something here" in capsys.readouterr().err


def test_the_whole_transformer_streams_one_weight_at_a_time(tmp_path, checkpoint, two_loras, monkeypatch):
    alive = []
    real = merging.merged_weight

    def watched(weight, changes):
        alive.append(weight.numel())
        return real(weight, changes)

    monkeypatch.setattr(merging, "merged_weight", watched)
    monkeypatch.setattr(CheckpointDir, "load_transformer", None)  # no model is built
    merged(checkpoint, two_loras[0], tmp_path / "out")
    assert len(alive) == len(
        set(open_lora(two_loras[0][0]).updates) | set(open_lora(two_loras[0][1]).updates)
    )


def test_the_file_that_is_streamed_is_read_by_safetensors_with_its_metadata(tmp_path, checkpoint, two_loras):
    merged(checkpoint, two_loras[0], tmp_path / "out", dtype="bfloat16")
    with safe_open(tmp_path / "out" / BASE_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_exporting_checks_a_lora_against_a_base_that_is_given(tmp_path, checkpoint):
    path = tmp_path / "other.safetensors"
    tensors = {
        "genre_embedder.lora_A.weight": torch.ones(2, 9),
        "genre_embedder.lora_B.weight": torch.ones(5, 2),
    }
    save_file(tensors, path)
    config = ExportConfig(str(path), str(tmp_path / "out"), checkpoint_dir=str(checkpoint.path))
    with pytest.raises(
        InputError, match=r"another model(?s:.*)`genre_embedder` is \(64, 32\) in the model, and \(5, 9\)"
    ):
        export(config)
