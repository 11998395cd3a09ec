"""What docs/migrating.md promises: datasets and LoRAs of the original trainer work as they are."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from acestep_ray import cli
from acestep_ray.config import PrepareConfig, TrainConfig
from acestep_ray.data.file_names import locate_file
from acestep_ray.data.schema import open_dataset, row_recaption, row_tags
from acestep_ray.data.songs import SongTable
from acestep_ray.errors import InputError
from acestep_ray.export.lora import merge_loras
from acestep_ray.export.reading import LORA_FILE, open_lora
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from acestep_ray.training.checks import check_model, check_train_config
from acestep_ray.training.initial_lora import load_lora
from acestep_ray.training.lora import add_lora
from acestep_ray.training.lora_config import DEFAULT_LORA
from acestep_ray.training.optim import BETAS
from tests.export.conftest import largest_difference, velocity

PAGE = Path(__file__).parents[2] / "docs" / "migrating.md"
# What the original's converter writes of a song, in its order.
ORIGINAL_COLUMNS = ["keys", "filename", "tags", "speaker_emb_path", "norm_lyrics", "recaption"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> CheckpointDir:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


# --- datasets


def convert(working_dir: Path, data_dir: str, repeat_count: int, audio: tuple[str, ...] = ("a", "b")) -> Path:
    """A dataset as the original's convert2hf_dataset.py leaves it in its working directory, by datasets 3.4.1."""
    (working_dir / data_dir).mkdir(parents=True, exist_ok=True)
    examples = []
    for key in audio:
        song = Path(data_dir) / f"{key}.mp3"
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, (48_000, 2))
        soundfile.write(working_dir / song, noise, 48_000, format="MP3")
        examples.append(
            dict(
                zip(
                    ORIGINAL_COLUMNS,
                    [key, str(song), ["pop", "slow"], "", "[verse]\nla", {}],
                    strict=True,
                )
            )
        )
    dataset = working_dir / "zh_lora_dataset"
    Dataset.from_list(examples * repeat_count).save_to_disk(dataset)
    # Version 3 wrote lists in another way, into this file too.
    info = json.loads((dataset / "dataset_info.json").read_text())
    info["features"]["tags"] = {"feature": {"dtype": "string", "_type": "Value"}, "_type": "Sequence"}
    (dataset / "dataset_info.json").write_text(json.dumps(info))
    return dataset


def test_a_converted_dataset_is_read_from_where_the_converter_ran(tmp_path, monkeypatch):
    dataset = convert(tmp_path, "data", repeat_count=1)
    monkeypatch.chdir(tmp_path)
    songs = SongTable.open("zh_lora_dataset")
    assert songs.keys == ["a", "b"]
    for row in songs:
        assert sorted(row) == sorted(ORIGINAL_COLUMNS)
        assert row_tags(row) == ["pop", "slow"]
        assert row_recaption(row) == {}
        assert locate_file(songs.root, row["filename"]).status().size > 0
    (warning,) = songs.warnings
    assert f"relative to {tmp_path}" in warning
    # From elsewhere the folder beside the dataset is found.
    monkeypatch.chdir("/")
    assert SongTable.open(dataset).root == songs.root


def test_a_converted_dataset_in_its_working_directory_goes_before_the_folder_beside_it(tmp_path, monkeypatch):
    dataset = convert(tmp_path / "here", "data", repeat_count=1)
    moved = tmp_path / "there" / "zh_lora_dataset"
    shutil.copytree(dataset, moved)
    shutil.copytree(tmp_path / "here" / "data", moved.parent / "data")
    monkeypatch.chdir(tmp_path / "here")
    assert SongTable.open(moved).root.path == tmp_path / "here"


def test_songs_inside_the_dataset_go_before_all_others(tmp_path, monkeypatch):
    dataset = convert(tmp_path, "data", repeat_count=1)
    shutil.copytree(tmp_path / "data", dataset / "data")
    monkeypatch.chdir(tmp_path)
    songs = SongTable.open(dataset)
    assert (songs.root.path, songs.warnings) == (dataset, [])


def test_absolute_file_names_of_a_converted_dataset_are_read_from_anywhere(tmp_path, monkeypatch):
    dataset = convert(tmp_path, str(tmp_path / "data"), repeat_count=1)
    monkeypatch.chdir("/")
    songs = SongTable.open(dataset)
    assert songs.warnings == []
    assert all(locate_file(songs.root, row["filename"]).status() for row in songs)


def test_repeats_of_the_converter_are_one_song_and_are_told(tmp_path):
    dataset = convert(tmp_path, "data", repeat_count=50)
    songs = SongTable.open(dataset)
    assert songs.keys == ["a", "b"]
    assert "98 of its 100 rows repeat another one" in songs.warnings[0]


def test_a_song_whose_text_differs_is_no_repeat(tmp_path):
    rows = open_dataset(convert(tmp_path, "data", repeat_count=1)).to_list()
    Dataset.from_list([*rows, rows[0] | {"tags": ["rock"]}]).save_to_disk(tmp_path / "other")
    with pytest.raises(InputError, match="1 keys occur more than once"):
        SongTable.open(tmp_path / "other")


def test_a_dataset_of_this_program_never_looks_elsewhere(tmp_path, monkeypatch):
    dataset = convert(tmp_path, "data", repeat_count=1)
    (dataset / "prepare.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert SongTable.open(dataset).root.path == dataset


def test_songs_that_lie_beside_the_working_directory_are_rejected_by_name(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    dataset = convert(tmp_path / "work", "../data", repeat_count=1)
    monkeypatch.chdir(tmp_path / "work")
    songs = SongTable.open(dataset)
    with pytest.raises(InputError, match="leaves the dataset directory"):
        locate_file(songs.root, songs.row(0)["filename"])


def test_recaptions_that_are_no_texts_are_passed_over_and_told(tmp_path):
    """As the original's instructions have a model write them."""
    rows = open_dataset(convert(tmp_path, "data", repeat_count=1)).to_list()
    written = {
        "simplified": "rap",
        "analysis": {"genre": ["rap"], "tempo": "fast"},
        "lyrical_rap_check": True,
    }
    Dataset.from_list([row | {"recaption": written} for row in rows]).save_to_disk(tmp_path / "other")
    songs = SongTable.open(tmp_path / "other")
    assert [row_recaption(row) for row in songs] == [{"simplified": "rap"}] * 2
    assert any("analysis, lyrical_rap_check hold no text" in warning for warning in songs.warnings)


def test_the_pages_script_makes_file_names_absolute(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    convert(tmp_path / "work", "../data", repeat_count=2)
    monkeypatch.chdir(tmp_path / "work")
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(script, {})
    songs = SongTable.open("zh_lora_dataset_absolute")
    assert [row["filename"] for row in songs] == [str(tmp_path / "data" / f"{key}.mp3") for key in "ab"]
    assert all(locate_file(songs.root, row["filename"]).status() for row in songs)


# --- flags

ORIGINAL_FLAGS = {
    "acestep-ray train": [
        "num_nodes",
        "shift",
        "learning_rate",
        "num_workers",
        "epochs",
        "max_steps",
        "every_n_train_steps",
        "dataset_path",
        "exp_name",
        "precision",
        "accumulate_grad_batches",
        "devices",
        "logger_dir",
        "ckpt_path",
        "checkpoint_dir",
        "gradient_clip_val",
        "gradient_clip_algorithm",
        "reload_dataloaders_every_n_epochs",
        "every_plot_step",
        "val_check_interval",
        "lora_config_path",
    ],
    "acestep-ray prepare": ["data_dir", "repeat_count", "output_name"],
}
RENAMED = {"output_name": "output_dir"}


@pytest.mark.parametrize(("command", "config"), [("train", TrainConfig), ("prepare", PrepareConfig)])
def test_every_flag_of_the_original_is_in_the_table_and_is_a_flag_here(command, config):
    text = PAGE.read_text(encoding="utf-8")
    known = {field.name for field in fields(config)}
    for flag in ORIGINAL_FLAGS[f"acestep-ray {command}"]:
        assert re.search(rf"^\| `--{flag}` \|", text, re.MULTILINE), flag
        assert RENAMED.get(flag, flag) in known


def test_the_defaults_that_the_page_gives_are_those_of_the_settings():
    config = TrainConfig(dataset_path="", checkpoint_dir="")
    text = PAGE.read_text(encoding="utf-8")
    given = re.findall(r"`--(\w+)` ([\d.]*\d)", text)
    assert len(given) >= 6
    for name, value in given:
        if name in ("activation_checkpointing", "repeat_count", "lora_weight"):
            continue  # a value to give, not the default
        assert getattr(config, name) == float(value), name
    assert BETAS == (0.8, 0.9)


# --- LoRAs


class OriginalTransformer(PeftAdapterMixin, ACEStepTransformer):
    """The transformer with the methods of diffusers by which the original adds and saves its adapter."""


def original_lora(checkpoint: CheckpointDir, directory: Path, **config) -> tuple[Path, ACEStepTransformer]:
    """The folder that the original writes beside its checkpoints, and the model whose adapter it holds."""
    model = checkpoint.load_transformer()
    model.__class__ = OriginalTransformer
    model.add_adapter(
        LoraConfig(**{**DEFAULT_LORA, "r": 4, "lora_alpha": 8, **config}), adapter_name="my_exp"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    folder = directory / "epoch=0-step=2000_lora"
    model.save_lora_adapter(folder, adapter_name="my_exp")
    return folder, model.eval()


def without_metadata(folder: Path) -> Path:
    """As the diffusers of 2025's spring has written it."""
    save_file(load_file(folder / LORA_FILE), folder / LORA_FILE)
    return folder


def test_a_lora_of_the_original_is_merged_at_the_strength_that_it_was_trained_with(checkpoint, tmp_path):
    for number, config in enumerate([{}, {"use_rslora": True, "lora_alpha": 3}]):
        folder, trained = original_lora(checkpoint, tmp_path / f"{number}", **config)
        assert [path.name for path in folder.iterdir()] == [LORA_FILE]
        model = checkpoint.load_transformer()
        untouched = velocity(model)
        merge_loras(model, [(folder, 1.0)])
        assert largest_difference(velocity(model), velocity(trained)) < 1e-4
        assert largest_difference(untouched, velocity(trained)) > 1e-2


def test_a_lora_without_metadata_plays_as_the_original_plays_it(checkpoint, tmp_path):
    """Its own inference then takes the rank for alpha, so that what was trained at 2 × plays at 1 ×."""
    folder, _ = original_lora(checkpoint, tmp_path)
    told = open_lora(folder / LORA_FILE)
    assert (set(told.scales.values()), told.scale_source) == ({2.0}, "metadata")
    without = open_lora(without_metadata(folder) / LORA_FILE)
    assert (set(without.scales.values()), without.scale_source) == ({1.0}, None)
    # As it was trained: --lora_weight 2, or a file of it for all programs.
    strong = tmp_path / "strong"
    arguments = ["--lora_path", str(folder), "--lora_weight", "2", "--output_dir", str(strong)]
    assert cli.main(["export", "mix", *arguments]) == 0
    for name, update in open_lora(strong / LORA_FILE).updates.items():
        assert torch.equal(update.b, told.updates[name].b)


def test_training_goes_on_from_a_lora_of_the_original(checkpoint, tmp_path):
    folder, trained = original_lora(checkpoint, tmp_path)
    lora = {**DEFAULT_LORA, "r": 4, "lora_alpha": 4}
    config_path = tmp_path / "lora_config.json"
    config_path.write_text(json.dumps(lora))
    config = TrainConfig(
        dataset_path=str(tmp_path),
        checkpoint_dir=str(checkpoint.path),
        lora_config_path=str(config_path),
        init_lora_path=str(folder),
        precision="32",
    )
    check_model(check_train_config(config), lora, checkpoint)
    model = checkpoint.load_transformer()
    add_lora(model, lora)
    load_lora(model, folder)
    assert largest_difference(velocity(model), velocity(trained)) < 1e-4


def test_a_lora_of_the_original_is_exported_to_every_format(checkpoint, tmp_path):
    folder, trained = original_lora(checkpoint, tmp_path)
    for name in ("universal", "peft", "comfyui", "kohya"):
        written = tmp_path / name
        arguments = ["--input_path", str(folder), "--output_dir", str(written), "--format", name]
        assert cli.main(["export", *arguments, "--checkpoint_dir", str(checkpoint.path)]) == 0
        model = checkpoint.load_transformer()
        merge_loras(model, [(written, 1.0)])
        assert largest_difference(velocity(model), velocity(trained)) < 1e-4


def test_a_checkpoint_of_lightning_is_refused_wherever_it_is_given(checkpoint, tmp_path, capsys):
    """Its adapter lies beside it, in a folder of nearly the same name."""
    pickle = tmp_path / "epoch=0-step=2000.ckpt"
    torch.save({"state_dict": {}, "global_step": 2000}, pickle)
    (tmp_path / "lora_config.json").write_text(json.dumps(DEFAULT_LORA))
    base = ["--checkpoint_dir", str(checkpoint.path)]
    train = ["train", *base, "--dataset_path", str(tmp_path), "--precision", "32"]
    train += ["--lora_config_path", str(tmp_path / "lora_config.json"), "--exp_dir", str(tmp_path / "exps")]
    for arguments, told in (
        ([*train, "--ckpt_path", str(pickle)], "no checkpoint here"),
        ([*train, "--init_lora_path", str(pickle)], "a pickle is not opened"),
        (
            ["export", "--input_path", str(pickle), "--output_dir", str(tmp_path / "o")],
            "a pickle is not opened",
        ),
    ):
        assert cli.main(arguments) == 2
        assert told in capsys.readouterr().err
