from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from acestep_ray.errors import InputError
from acestep_ray.models import fingerprints
from acestep_ray.models.checkpoint import LYRIC_VOCAB_VARIABLE, CheckpointDir
from acestep_ray.models.transformer import is_unused_parameter
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint

TRANSFORMER_WEIGHTS = "ace_step_transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(checkpoint.path, tmp_path / "copy")


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestOpen:
    def test_a_complete_directory_opens_with_its_ssl_models(self, checkpoint):
        assert CheckpointDir.open(str(checkpoint.path)).ssl_names == ("mert", "m-hubert")

    def test_everything_that_is_missing_or_broken_is_listed_in_one_message(self, folder):
        shutil.rmtree(folder / "music_vocoder")
        (folder / "music_dcae_f8c8/config.json").write_text("{broken")
        (folder / "umt5-base/tokenizer.json").unlink()
        (folder / "mert/model.safetensors").unlink()
        weights = folder / TRANSFORMER_WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1000])
        with pytest.raises(InputError) as error:
            CheckpointDir.open(folder)
        message = str(error.value)
        for part in (
            "music_vocoder/ is missing",
            "music_dcae_f8c8/config.json: ",
            "umt5-base/tokenizer.json: ",
            "mert: no weights",
            f"{TRANSFORMER_WEIGHTS}: ",
        ):
            assert part in message
        assert message.count("\n  - ") == 5
        assert f"acestep-ray checkpoint fetch {folder}" in message
        assert "acestep-ray checkpoint tiny" in message

    def test_a_directory_that_does_not_exist_is_named(self, tmp_path):
        with pytest.raises(InputError, match="nowhere"):
            CheckpointDir.open(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        ("file", "key"),
        [
            ("umt5-base", "d_model"),
            ("music_dcae_f8c8", "latent_channels"),
            ("mert", "hidden_size"),
            ("mhubert", "hidden_size"),
        ],
    )
    def test_a_part_of_another_width_than_the_transformers_is_named(self, folder, file, key):
        edit_json(folder / file / "config.json", **{key: 99})
        with pytest.raises(InputError, match=f"{file}/config.json: `{key}` is 99"):
            CheckpointDir.open(folder)

    @pytest.mark.parametrize(
        "change", [{"inner_dim": 65}, {"lyric_encoder": {"sizes": 3}}, {"ssl_names": ["mert", "other"]}]
    )
    def test_an_impossible_transformer_configuration_is_named(self, folder, change):
        edit_json(folder / "ace_step_transformer/config.json", **change)
        with pytest.raises(InputError, match=r"ace_step_transformer/config\.json"):
            CheckpointDir.open(folder)

    def test_an_impossible_vocoder_configuration_is_named(self, folder):
        edit_json(folder / "music_vocoder/config.json", use_template=True)
        with pytest.raises(InputError, match=r"music_vocoder/config\.json: .*use_template"):
            CheckpointDir.open(folder)

    def test_without_ssl_folders_there_are_no_ssl_encoders(self, folder):
        shutil.rmtree(folder / "mert")
        assert list(CheckpointDir.open(folder).load_ssl_encoders()) == ["m-hubert"]
        shutil.rmtree(folder / "mhubert")
        assert CheckpointDir.open(folder).load_ssl_encoders() == {}


class TestLoadTransformer:
    def test_every_parameter_is_the_files_and_none_is_left_on_the_meta_device(self, checkpoint):
        weights = load_file(checkpoint.path / TRANSFORMER_WEIGHTS)
        parameters = dict(checkpoint.load_transformer().named_parameters())
        used = {name for name in weights if not is_unused_parameter(name)}
        assert parameters.keys() == used
        assert len(used) < len(weights)
        for name, parameter in parameters.items():
            assert parameter.requires_grad
            assert torch.equal(parameter, weights[name])

    def test_the_dtype_asked_for_is_the_dtype_of_all(self, checkpoint):
        transformer = checkpoint.load_transformer(dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}

    def test_changing_a_loaded_weight_leaves_the_file_alone(self, checkpoint):
        before = hashlib.sha256((checkpoint.path / TRANSFORMER_WEIGHTS).read_bytes()).digest()
        with torch.no_grad():
            for parameter in checkpoint.load_transformer().parameters():
                parameter.zero_()
        assert hashlib.sha256((checkpoint.path / TRANSFORMER_WEIGHTS).read_bytes()).digest() == before

    def test_missing_unexpected_and_misshapen_weights_are_named_with_their_file(self, folder):
        weights = load_file(folder / TRANSFORMER_WEIGHTS)
        del weights["genre_embedder.bias"]
        weights["lyric_proj.weight"] = weights["lyric_proj.weight"][:3].clone()
        weights["transformer_blocks.0.attn.to_add_out.weight"] = torch.zeros(2)
        save_file(weights, folder / TRANSFORMER_WEIGHTS)
        with pytest.raises(InputError) as error:
            CheckpointDir.open(folder).load_transformer()
        message = str(error.value)
        assert "genre_embedder.bias is missing" in message
        assert "lyric_proj.weight in diffusion_pytorch_model.safetensors has shape (3, " in message
        assert "transformer_blocks.0.attn.to_add_out.weight" in message
        assert "3 more" not in message
        assert str(folder / "ace_step_transformer") in message

    def test_weights_in_shards_load_alike(self, folder, checkpoint):
        weights = load_file(folder / TRANSFORMER_WEIGHTS)
        names = sorted(weights)
        halves = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
        (folder / TRANSFORMER_WEIGHTS).unlink()
        for shard, held in halves.items():
            save_file({name: weights[name] for name in held}, folder / "ace_step_transformer" / shard)
        index = {"weight_map": {name: shard for shard, held in halves.items() for name in held}}
        index_path = folder / (TRANSFORMER_WEIGHTS + ".index.json")
        index_path.write_text(json.dumps(index))
        found = CheckpointDir.open(folder).load_transformer().state_dict()
        wanted = checkpoint.load_transformer().state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

        (folder / "ace_step_transformer/part-2.safetensors").unlink()
        with pytest.raises(InputError, match=r"missing weight files part-2\.safetensors"):
            CheckpointDir.open(folder)


class TestLyricVocab:
    def test_the_directorys_own_comes_first(self, checkpoint, monkeypatch):
        monkeypatch.setenv(LYRIC_VOCAB_VARIABLE, "/elsewhere.json")
        assert checkpoint.lyric_vocab_path() == checkpoint.path / "lyric_tokenizer/vocab.json"

    def test_the_variable_comes_second(self, folder, tmp_path, monkeypatch):
        (folder / "lyric_tokenizer/vocab.json").unlink()
        opened = CheckpointDir.open(folder)
        monkeypatch.setenv(LYRIC_VOCAB_VARIABLE, str(tmp_path / "vocab.json"))
        with pytest.raises(InputError, match=LYRIC_VOCAB_VARIABLE):
            opened.lyric_vocab_path()
        (tmp_path / "vocab.json").write_text("{}")
        assert opened.lyric_vocab_path() == tmp_path / "vocab.json"

    def test_neither_is_the_users_to_mend(self, folder, monkeypatch):
        monkeypatch.delenv(LYRIC_VOCAB_VARIABLE, raising=False)
        (folder / "lyric_tokenizer/vocab.json").unlink()
        with pytest.raises(InputError, match="checkpoint fetch"):
            CheckpointDir.open(folder).lyric_vocab_path()


class TestFingerprint:
    PARTS = (
        ("transformer", "ace_step_transformer/config.json"),
        ("transformer", TRANSFORMER_WEIGHTS),
        ("codec", "music_dcae_f8c8/diffusion_pytorch_model.safetensors"),
        ("vocoder", "music_vocoder/config.json"),
        ("text_encoder", "umt5-base/tokenizer.json"),
        ("mert", "mert/model.safetensors"),
        ("m-hubert", "mhubert/config.json"),
        ("lyric_vocab", "lyric_tokenizer/vocab.json"),
    )

    @pytest.mark.parametrize(("part", "file"), PARTS)
    def test_one_changed_byte_changes_the_fingerprint_of_its_part_alone(self, checkpoint, folder, part, file):
        copy = dataclasses.replace(checkpoint, path=folder)
        parts = {name for name, _ in self.PARTS}
        before = {name: copy.fingerprint(name) for name in parts}
        assert before == {name: checkpoint.fingerprint(name) for name in parts}
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)
        assert {name for name in parts if copy.fingerprint(name) != before[name]} == {part}

    def test_weights_are_not_read_again_by_a_later_process(self, folder, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(fingerprints, "NOTED_BYTES", 0)
        monkeypatch.setattr(fingerprints, "SETTLED_SECONDS", 0.0)
        copy = dataclasses.replace(checkpoint, path=folder)
        before = copy.fingerprint("transformer")
        monkeypatch.setattr(fingerprints, "_sha256_of", lambda *_: pytest.fail("it was read again"))
        assert copy.fingerprint("transformer") == before


@pytest.mark.parametrize(
    ("given", "told", "fix"),
    [
        ("ace_step_transformer", "this is one part of a checkpoint directory", "tiny"),
        ("..", "the checkpoint directory is further inside", "tiny"),
    ],
)
def test_a_folder_below_or_above_the_checkpoint_directory_is_told_with_the_right_one(
    tmp_path, given, told, fix
):
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny")
    with pytest.raises(InputError, match=told) as error:
        CheckpointDir.open((checkpoint.path / given).resolve())
    assert error.value.fix.endswith(fix)


@pytest.mark.parametrize("name", ["config.json", "acestep-v15-turbo/config.json"])
def test_a_checkpoint_of_another_version_is_named(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"model_type": "acestep"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"ACE-Step 1\.5"):
        CheckpointDir.open(tmp_path)
