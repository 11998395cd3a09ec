"""Export, merge, extract, mix and info of what is in object storage, to there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import yaml

from acestep_ray import cli
from acestep_ray.config import ExportConfig, ExtractConfig, MergeConfig, MixConfig
from acestep_ray.errors import InputError
from acestep_ray.export.card import CARD, PICTURE
from acestep_ray.export.extract import extract
from acestep_ray.export.fetched import fetched_lora
from acestep_ray.export.info import info
from acestep_ray.export.job import export
from acestep_ray.export.merge import RECORD, merge
from acestep_ray.export.mix import mix
from acestep_ray.export.reading import LORA_FILE, open_lora
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.storage import Store, fetched, upload_folder
from acestep_ray.training.initial_lora import load_lora
from acestep_ray.training.lora_config import DEFAULT_LORA, read_lora_config
from tests.export.conftest import largest_difference, velocity


@pytest.fixture
def run(trained, write_run, s3) -> Store:
    """A run with two checkpoints whose files and logs are in object storage alone."""
    local = write_run({5: trained(DEFAULT_LORA), 10: trained(DEFAULT_LORA, seed=2)}, DEFAULT_LORA)
    place = Store.at(s3.fresh())
    settings = yaml.safe_load((local / "train.yaml").read_text())
    (local / "train.yaml").write_text(yaml.safe_dump({**settings, "logger_dir": place.url_of("logs")}))
    upload_folder(local, place.child("exps/my_run"))
    upload_folder(local.parent / "logs", place.child("logs"))
    return place.child("exps/my_run")


@pytest.fixture
def no_leftovers(tmp_path_factory, monkeypatch):
    """A test that leaves nothing in the folder for temporary files."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert os.listdir(folder) == []


def lora_in(place: Store) -> dict:
    with fetched(place) as folder:
        return open_lora(folder / LORA_FILE).updates


def assert_same_updates(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        assert (found[name].b @ found[name].a).allclose(update.b @ update.a, atol=1e-6), name


def test_a_run_is_exported_with_its_card_from_there_to_there(run, s3, no_leftovers):
    output = Store.at(s3.fresh())
    summary = export(ExportConfig(input_path=run.url, output_dir=output.url, checkpoint="5"))
    assert sorted(output.names()) == sorted(summary.files) == sorted([LORA_FILE, CARD, PICTURE])
    assert summary.directory == output.url
    assert f"wrote    {output.url_of(LORA_FILE)}" in summary.render()
    assert f"from     {run.url} (" in summary.render()
    assert tempfile.gettempdir() not in summary.render()
    assert "| training | 3.0000 | 2.9000 |" in output.read_bytes(CARD).decode()  # of the logs up to its step
    assert_same_updates(lora_in(output), lora_in(run.child("checkpoints/step=5")))
    with pytest.raises(InputError, match=f"there is something here: --output_dir {output.url}"):
        export(ExportConfig(input_path=run.url, output_dir=output.url))


@pytest.mark.parametrize(
    ("place", "step"),
    [("", 10), ("checkpoints", 10), ("checkpoints/step=5", 5), (f"checkpoints/step=5/{LORA_FILE}", 5)],
)
def test_every_place_that_means_a_lora_means_it_there_too(run, place, step, no_leftovers):
    summary = info(run.url_of(place))
    (lora,) = summary.loras.values()
    assert_same_updates(lora.updates, lora_in(run.child(f"checkpoints/step={step}")))
    assert f"file      {run.url_of(place)}\n" in summary.render()


def test_of_a_run_only_the_chosen_lora_comes_here(run, s3):
    with fetched_lora(run.url, "5") as path:
        assert [file.parent.name for file in path.rglob(LORA_FILE)] == ["step=5"]
        assert not list(path.rglob("optimizer*"))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "nothing here|no such LoRA"),
        ({"a.safetensors": b"x", "b.safetensors": b"y"}, "give one: a.safetensors, b.safetensors"),
        ({"lora.bin": b"\x80"}, "a pickle is not opened"),
        ({LORA_FILE: b"cut"}, "not a safetensors file|cut short"),
    ],
)
def test_what_is_no_lora_is_told_of_its_url(s3, files, said, no_leftovers):
    place = Store.at(s3.fresh())
    for name, content in files.items():
        place.write_bytes(name, content)
    with pytest.raises(InputError, match=said) as raised:
        info(place.url)
    assert place.url in str(raised.value)
    assert tempfile.gettempdir() not in str(raised.value)


def test_a_step_that_a_run_has_not_is_told_before_anything_is_written(run, s3):
    output = Store.at(s3.fresh())
    with pytest.raises(InputError, match="last, best, or a step: 5, 10"):
        export(ExportConfig(input_path=run.url, output_dir=output.url, checkpoint="7"))
    assert output.names() == {}


def test_loras_are_merged_extracted_and_mixed_from_there_to_there(run, s3, checkpoint, trained, no_leftovers):
    place = Store.at(s3.fresh())
    lora = run.url_of("checkpoints/step=5")
    merged = merge(MergeConfig(str(checkpoint.path), lora_path=lora, output_dir=place.url_of("merged")))
    assert merged.directory == place.url_of("merged")
    assert lora in merged.render()
    assert f"merged/{RECORD}" in place.names()
    with fetched(place.child("merged")) as folder:
        model = CheckpointDir.open(folder).load_transformer()
    assert largest_difference(velocity(model), velocity(trained(DEFAULT_LORA))) < 1e-4

    extracted = extract(
        ExtractConfig(
            str(checkpoint.path), place.url_of("merged"), place.url_of("extracted"), rank=16, device="cpu"
        )
    )
    assert extracted.file == place.url_of(f"extracted/{LORA_FILE}")
    assert extracted.relative_error < 1e-3

    mixed = mix(MixConfig(lora_path=f"{lora},{place.url_of('extracted')}", output_dir=place.url_of("mixed")))
    assert mixed.file == place.url_of(f"mixed/{LORA_FILE}")
    assert set(place.child("mixed").names()) == {LORA_FILE}


def test_a_transformer_that_is_not_there_is_told_of_its_url(s3, checkpoint):
    place = Store.at(s3.fresh())
    with pytest.raises(InputError, match="no transformer here") as raised:
        extract(ExtractConfig(str(checkpoint.path), place.url, place.url_of("out"), device="cpu"))
    assert place.url in str(raised.value)


def test_training_starts_from_a_lora_and_a_configuration_there(run, s3, checkpoint, trained):
    place = Store.at(s3.fresh())
    place.write_bytes("lora_config.json", b'{"r": 4}')
    assert read_lora_config(place.url_of("lora_config.json"))["r"] == 4
    with pytest.raises(InputError, match=f"--lora_config_path {place.url_of('none.json')}"):
        read_lora_config(place.url_of("none.json"))
    model = trained(DEFAULT_LORA, seed=3)
    expected = velocity(trained(DEFAULT_LORA))
    assert largest_difference(velocity(model), expected) > 1e-3
    load_lora(model, run.url_of("checkpoints/step=5"))
    assert largest_difference(velocity(model), expected) < 1e-4


def test_the_command_tells_of_a_lora_there(run, capsys):
    assert cli.main(["info", run.url]) == 0
    assert run.url in capsys.readouterr().out
    assert cli.main(["info", f"{run.url}-none"]) == 2
    assert f"{run.url}-none" in capsys.readouterr().err


def test_files_of_the_same_machine_are_given_as_they_are(tmp_path):
    with fetched_lora(tmp_path / "lora") as path:
        assert path == Path(tmp_path / "lora")
