"""What is no LoRA of ACE-Step v1 is refused in one message; `info` tells what a LoRA holds."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from acestep_ray import cli
from acestep_ray.errors import InputError
from acestep_ray.export.info import info
from acestep_ray.export.lora import ADAPTER_NAME
from acestep_ray.export.names import flattened, is_module, unflattened
from acestep_ray.export.reading import LORA_FILE, METADATA_KEY, PEFT_FILE, open_lora
from acestep_ray.export.source import open_source
from tests.export.conftest import DORA, PATTERNS, RSLORA
from tests.loras import write_lora

MODULE = "transformer_blocks.0.attn.to_q"


def pair(module=MODULE, rank=2, width=64):
    return {
        f"{module}.lora_A.weight": torch.ones(rank, width),
        f"{module}.lora_B.weight": torch.ones(width, rank),
    }


def saved(path, tensors, metadata=None):
    save_file(tensors, path, metadata)
    return path


def refused(path):
    """The one message for this path."""
    with pytest.raises(InputError) as told:
        open_source(path, where="--input_path")
    return str(told.value)


def test_an_empty_file_is_told(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.touch()
    assert refused(path).startswith(f"the LoRA file is empty: {path}")


@pytest.mark.parametrize("size", [3, 20, 300, -1])
def test_a_truncated_file_is_told(tmp_path, size):
    path = saved(tmp_path / "lora.safetensors", pair())
    path.write_bytes(path.read_bytes()[:size])
    assert "cut short or damaged" in refused(path)
    assert "copy or download it again" in refused(path)


def test_a_file_of_another_kind_is_told(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_text("<!DOCTYPE html><html>Not Found</html>")
    assert "this is a web page, not the file" in refused(path)
    path.write_text('{"error": "Repository not found"}')
    assert "this is a server's error message, not the file" in refused(path)
    path.write_text("just a text that is no LoRA")
    assert "not a safetensors file" in refused(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:…\nsize 100\n")
    assert "git lfs pull" in refused(path)


@pytest.mark.parametrize("name", ["lora.pt", "lora.bin", "lora.ckpt", "lora.safetensors"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_pickle_is_not_opened_whatever_its_name(tmp_path, name, kind, monkeypatch):
    path = tmp_path / name
    if kind == "pickle":
        path.write_bytes(pickle.dumps(pair()))
    else:
        torch.save(pair(), path, _use_new_zipfile_serialization=kind == "zip")
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(pickle, "load", None)
    told = refused(path)
    assert "a pickle is not opened" in told
    assert "weights_only=True" in told
    if name != "lora.safetensors":
        assert "a pickle is not opened" in refused(tmp_path)  # the directory that holds it


def test_a_header_of_any_length_is_no_pickle(tmp_path):
    first_bytes = set()
    for length in range(0, 300, 4):
        path = saved(tmp_path / "lora.safetensors", pair(), {"note": "x" * length})
        first_bytes.add(path.read_bytes()[:1])
        assert list(open_lora(path).updates) == [MODULE]
    assert b"\x80" in first_bytes  # as a pickle begins


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "alpha"])
def test_weights_that_are_not_finite_are_named(tmp_path, part, value):
    tensors = {**pair("speaker_embedder"), **pair(), f"{MODULE}.alpha": torch.tensor(2.0)}
    tensors[f"{MODULE}.{part}"].flatten()[0] = value
    told = refused(saved(tmp_path / "lora.safetensors", tensors))
    assert f"NaN or infinite weights in `{MODULE}`, of 2 modules" in told


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lora_C.weight", "docs/export.md"),
        ("lokr_w1", "LoKr"),
        ("hada_w1_a", "LoHa"),
        ("oft_blocks", "OFT"),
        ("diff", "whole differences"),
        ("lora_B.bias", "biases"),
        ("lora_A.lora_adapter.weight", LORA_FILE),
    ],
)
def test_unknown_keys_are_named_with_what_they_seem_to_be(tmp_path, key, hint):
    tensors = {**pair(), f"{MODULE}.{key}": torch.ones(2, 2)}
    told = refused(saved(tmp_path / "lora.safetensors", tensors))
    assert f"`{MODULE}.{key}` among its 3 keys" in told
    assert hint in told


def test_a_file_without_tensors_is_told(tmp_path):
    assert "holds no tensors" in refused(saved(tmp_path / "lora.safetensors", {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_B.weight": torch.ones(64, 3)}, "same rank: A is (2, 64), B is (64, 3)"),
        ({"lora_B.weight": torch.ones(64)}, "same rank"),
        ({"alpha": torch.ones(2)}, "alpha` is not one number"),
        ({"lora_down.weight": torch.ones(2, 64)}, "has lora_A twice"),
        ({"dora_scale": torch.ones(1, 64)}, "DoRA in kohya's form over columns"),
    ],
)
def test_matrices_that_are_no_pair_are_told(tmp_path, changes, message):
    tensors = {**pair(), **{f"{MODULE}.{name}": value for name, value in changes.items()}}
    assert message in refused(saved(tmp_path / "lora.safetensors", tensors))


@pytest.mark.parametrize(
    "module",
    [
        "transformer.single_transformer_blocks.0.attn.to_q",  # an image model
        "diffusion_model.decoder.layers.3.self_attn.q_proj",  # ACE-Step 1.5
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
    ],
)
def test_a_lora_of_another_model_is_told_with_names_and_shapes(tmp_path, module):
    told = refused(saved(tmp_path / "lora.safetensors", {**pair(module, width=48), **pair()}))
    assert "not one of ACE-Step v1: 1 of its 2 modules are unknown" in told
    assert (
        module.removeprefix("transformer.").removeprefix("diffusion_model.").removeprefix("lora_unet_")
        in told
    )
    assert "48 × 48" in told


@pytest.mark.parametrize(
    ("module", "model"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q", "Flux"),
        ("base_model.model.layers.3.self_attn.q_proj", "ACE-Step 1.5"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "Stable Diffusion or SDXL"),
    ],
)
def test_the_other_model_is_named_where_its_modules_are_known(tmp_path, module, model):
    told = refused(saved(tmp_path / "lora.safetensors", pair(module)))
    assert f"these are modules of {model}" in told


def test_a_whole_model_is_told_from_a_lora(tmp_path):
    tensors = {f"{MODULE}.weight": torch.ones(64, 64), f"{MODULE}.bias": torch.ones(64)}
    told = refused(saved(tmp_path / "a.safetensors", tensors))
    assert "this is a model's weights, not a LoRA: its 2 keys are" in told
    assert "export extract --finetuned_path" in told
    told = refused(saved(tmp_path / "b.safetensors", {"unet.conv_in.weight": torch.ones(4, 4)}))
    assert "this is a model's weights, not a LoRA" in told
    assert "extract" not in told


def test_a_peft_adapter_of_another_type_is_told(tmp_path):
    path = saved(tmp_path / PEFT_FILE, pair(f"base_model.model.{MODULE}"))
    path.with_name("adapter_config.json").write_text('{"peft_type": "VERA", "r": 2}')
    assert "the adapter is of PEFT's type VERA, not a LoRA" in refused(path)


def test_a_directory_with_several_files_asks_for_one(tmp_path):
    saved(tmp_path / "a.safetensors", pair())
    assert list(open_source(tmp_path, where="info").loras[ADAPTER_NAME].updates) == [MODULE]
    saved(tmp_path / "b.safetensors", pair())
    assert "give one: a.safetensors, b.safetensors" in refused(tmp_path)
    assert "nothing here: --input_path" in refused(tmp_path / "nowhere")


def test_a_peft_file_without_its_configuration_is_told(tmp_path):
    path = saved(tmp_path / PEFT_FILE, pair(f"base_model.model.{MODULE}"))
    assert "adapter_config.json, which says how strong it is" in refused(path)


def test_every_module_that_can_have_a_lora_has_its_name_back(checkpoint):
    model = checkpoint.load_transformer()
    names = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    assert len(names) > 50
    assert all(is_module(name) for name in names)
    assert [unflattened(flattened(name)) for name in names] == names
    assert len({flattened(name) for name in names}) == len(names)


def test_info_tells_rank_alpha_targets_size_and_norms(tmp_path, trained, capsys):
    model = trained(PATTERNS)
    path = write_lora(tmp_path, model, ADAPTER_NAME)
    assert cli.main(["info", str(path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    layer = model.get_submodule(MODULE)
    a, b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
    assert figures["modules"][MODULE] == {
        "rank": 4,
        "alpha": 4.0,
        "out": 64,
        "in": 64,
        "norm": pytest.approx((10 / 4 * b @ a).norm().item(), rel=1e-5),
    }
    assert figures["ranks"] == [2, 3, 4]
    assert figures["bytes"] == path.stat().st_size
    assert figures["targets"]["to_q"] == 8
    assert figures["targets"]["to_out.0"] == 8
    assert figures["scale_from"] == "metadata"
    assert figures["metadata"][METADATA_KEY]["r"] == 4
    assert figures["dora"] is False
    assert cli.main(["info", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "rank      4 (" in table
    assert "another strength" not in table
    row = next(line for line in table.splitlines() if line.startswith("  transformer_blocks.0 "))
    assert f"{figures['modules'][MODULE]['norm']:.4g}" in row


def test_info_warns_of_a_strength_that_not_all_programs_know(tmp_path):
    metadata = {METADATA_KEY: json.dumps({"r": 2, "lora_alpha": 8})}
    told = info(saved(tmp_path / "a.safetensors", pair(), metadata)).render()
    assert (
        "8 (from metadata); programs that read no metadata, such as ComfyUI, play it at another strength"
        in told
    )
    told = info(saved(tmp_path / "b.safetensors", {**pair(), f"{MODULE}.alpha": torch.tensor(1.0)})).render()
    assert (
        "1 (from alpha); programs that read no `.alpha` play it at another strength, 1 instead of 0.5" in told
    )
    told = info(saved(tmp_path / "c.safetensors", pair())).render()
    assert "says nothing of its strength" in told


def test_info_of_a_run_shows_what_it_was_trained_on(tmp_path, trained, write_run, capsys):
    from acestep_ray.config import ExportConfig
    from acestep_ray.export.job import export

    run = write_run({5: trained(RSLORA)}, RSLORA)
    directory = export(ExportConfig(str(run), str(tmp_path / "out"), format="comfyui")).directory
    assert cli.main(["info", str(directory)]) == 0
    told = capsys.readouterr().out
    assert "trained   name: my_run" in told
    assert "trained   step: 5" in told
    assert "keys such as diffusion_model." in told
    assert cli.main(["info", str(run)]) == 0
    assert "step=5" in capsys.readouterr().out


def test_info_of_a_dora_says_so(tmp_path, trained):
    path = write_lora(tmp_path, trained(DORA), ADAPTER_NAME)
    assert "kind      DoRA" in info(str(path)).render()


def test_what_cannot_be_read_is_a_mistake_of_the_input_for_every_command(tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    path.touch()
    for command in (
        ["info", str(path)],
        ["export", "--input_path", str(path), "--output_dir", str(tmp_path / "out")],
        ["export", "mix", "--lora_path", str(path), "--output_dir", str(tmp_path / "out")],
    ):
        assert cli.main(command) == 2
        assert "the LoRA file is empty" in capsys.readouterr().err
