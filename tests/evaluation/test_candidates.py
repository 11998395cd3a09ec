"""What `--models` may name, and what is said of what it may not."""

from __future__ import annotations

import pickle
import re
import shutil
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file, save_file

from acestep_ray.errors import InputError
from acestep_ray.evaluation.candidates import find_candidates
from acestep_ray.export.lora import merge_loras
from acestep_ray.export.reading import LORA_FILE
from acestep_ray.export.transformer import export_transformer
from acestep_ray.training.lora_config import DEFAULT_LORA
from tests.export.conftest import PATTERNS
from tests.loras import write_lora

ADAPTER = "lora_adapter"


@pytest.fixture
def lora(tmp_path, trained):
    """A LoRA's file."""
    (tmp_path / "my_lora").mkdir()
    return write_lora(tmp_path / "my_lora", trained(DEFAULT_LORA), ADAPTER)


def find(settings, base, models, **changes):
    return find_candidates(settings(models=models, dataset_path="cache", **changes), base, ExitStack())


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same(found, expected) -> None:
    found, expected = weights(found), weights(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)


def load(candidate, checkpoint):
    return candidate.load(checkpoint, torch.device("cpu"))


def test_the_base_is_the_base(settings, checkpoint):
    (base,) = find(settings, checkpoint, "base")
    assert (base.label, base.kind, base.experiment) == ("base", "base", None)
    model = load(base, checkpoint)
    assert_same(model, checkpoint.load_transformer())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("given", "strength"), [(None, 1.0), ("1,0.5", 0.5), ("1,-1", -1.0)])
def test_a_lora_has_its_strength(settings, checkpoint, lora, given, strength):
    base, found = find(settings, checkpoint, f"base, {lora.parent}", lora_weight=given)
    expected = checkpoint.load_transformer()
    merge_loras(expected, [(lora, strength)])
    assert (found.kind, found.strength, base.strength) == ("LoRA", strength, 1.0)
    assert_same(load(found, checkpoint), expected)


def test_an_experiment_is_its_last_checkpoint_or_the_one_that_is_chosen(
    settings, checkpoint, trained, write_run
):
    models = {10: trained(DEFAULT_LORA, 1), 20: trained(DEFAULT_LORA, 2), 30: trained(DEFAULT_LORA, 3)}
    run = write_run(models, DEFAULT_LORA)
    steps = {}
    for name, models_flag, chosen in (
        ("last", run, "last"),
        ("best", run, "best"),
        ("10", run, "10"),
        ("path", run / "checkpoints" / "step=20", "last"),
    ):
        (found,) = find(settings, checkpoint, str(models_flag), checkpoint=chosen)
        steps[name] = (found.label, found.step, found.experiment)
    assert steps == {
        "last": ("my_run-step30", 30, run),
        "best": ("my_run-step20", 20, run),
        "10": ("my_run-step10", 10, run),
        "path": ("my_run-step20", 20, run),
    }
    expected = checkpoint.load_transformer()
    merge_loras(expected, [(run / "checkpoints" / "step=20", 1.0)])
    assert_same(load(found, checkpoint), expected)


def finetuned(checkpoint):
    model = checkpoint.load_transformer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


@pytest.mark.parametrize("chosen", ["last", "best", "10"])
def test_a_run_that_trained_all_weights_is_its_checkpoint(settings, checkpoint, write_run, chosen):
    model = finetuned(checkpoint)
    run = write_run({10: model}, None)
    for path in (run, run / "checkpoints" / "step=10"):
        (found,) = find(settings, checkpoint, str(path), checkpoint=chosen)
        assert (found.kind, found.label, found.experiment) == ("trained weights", "my_run-step10", run)
        assert_same(load(found, checkpoint), model)


def test_a_fine_tuned_transformer_is_its_folder(settings, checkpoint, tmp_path):
    model = finetuned(checkpoint)
    folder = export_transformer(checkpoint, weights(model), tmp_path / "tuned" / "ace_step_transformer")
    for path in (folder, folder.parent):
        (found,) = find(settings, checkpoint, str(path))
        assert (found.kind, found.label) == ("transformer", "tuned")
        assert_same(load(found, checkpoint), model)


def test_one_model_at_several_strengths_has_several_names(settings, checkpoint, lora):
    found = find(settings, checkpoint, f"{lora},{lora},{lora},base,base", lora_weight="1,0.5,1,1,1")
    assert [one.label for one in found] == ["my_lora", "my_lora@0.5", "my_lora (2)", "base", "base (2)"]


def refused(settings, base, models, **changes) -> str:
    with pytest.raises(InputError) as error:
        find(settings, base, models, **changes)
    return str(error.value)


def test_a_lora_of_another_model_is_refused_with_the_shapes(settings, checkpoint, lora):
    tensors = load_file(lora)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    tensors[name] = torch.zeros(tensors[name].shape[0], 999)
    save_file(tensors, lora)
    said = refused(settings, checkpoint, str(lora))
    assert "made for another model" in said
    assert re.search(r"is \((\d+), \d+\) in the model, and \(\1, 999\) in the LoRA", said)


def test_what_is_no_lora_is_refused(settings, checkpoint, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "b.bin").write_bytes(pickle.dumps({"lora": 1}))
    (tmp_path / "c").mkdir()
    assert "not a safetensors file" in refused(settings, checkpoint, str(tmp_path / "a.safetensors"))
    assert "a pickle is not opened" in refused(settings, checkpoint, str(tmp_path / "b.bin"))
    assert "no such LoRA" in refused(settings, checkpoint, str(tmp_path / "c"))
    assert "nothing here" in refused(settings, checkpoint, str(tmp_path / "d"))
    assert "no model is given" in refused(settings, checkpoint, " , ")


def test_weights_of_another_model_are_refused_with_the_shapes(settings, checkpoint, write_run, tmp_path):
    model = torch.nn.Module()
    model.other = torch.nn.Linear(3, 5, bias=False)
    assert "`other.weight` is (5, 3) in the run, missing in the checkpoint" in refused(
        settings, checkpoint, str(write_run({1: model}, None))
    )
    folder = export_transformer(checkpoint, {}, tmp_path / "ace_step_transformer")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("transformer_blocks"))
    save_file({**tensors, name: torch.zeros(3)}, file)
    assert f"`{name}` is" in refused(settings, checkpoint, str(folder))


@pytest.mark.parametrize(
    ("given", "said"),
    [("1", "1 strengths for 2 models"), ("1,x", "not a list of numbers"), ("1,nan", "not a list of numbers")],
)
def test_strengths_that_do_not_fit_are_refused(settings, checkpoint, lora, given, said):
    assert said in refused(settings, checkpoint, f"base,{lora}", lora_weight=given)


def test_a_strength_of_the_base_is_refused(settings, checkpoint):
    assert "`base` has no LoRA whose strength" in refused(settings, checkpoint, "base", lora_weight="0.5")


def test_a_checkpoint_that_is_not_there_or_damaged_is_refused(settings, checkpoint, trained, write_run):
    run = write_run({10: trained(PATTERNS)}, PATTERNS)
    assert "no such checkpoint" in refused(settings, checkpoint, str(run), checkpoint="7")
    file = run / "checkpoints" / "step=10" / LORA_FILE
    file.write_bytes(file.read_bytes()[:-10])
    assert "not what training wrote" in refused(settings, checkpoint, str(run))
    shutil.rmtree(run / "checkpoints" / "step=10")
    assert "no checkpoint yet" in refused(settings, checkpoint, str(run))
