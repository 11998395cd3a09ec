from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from acestep_ray.errors import InputError
from acestep_ray.models.text_encoder import MAX_TOKENS, TextEncoder

PROMPTS = ["pop, rock", "a slow piano ballad with soft strings and a very long description", "日本語の歌", ""]


@pytest.fixture(scope="module")
def encoder(checkpoint) -> TextEncoder:
    return checkpoint.load_text_encoder()


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint.path / "umt5-base", tmp_path / "umt5-base")


def test_a_prompt_has_the_same_embeddings_alone_and_in_a_batch(encoder):
    embeddings, mask = encoder.encode(PROMPTS)
    for prompt, in_batch, valid in zip(PROMPTS, embeddings, mask, strict=True):
        alone, alone_mask = encoder.encode([prompt])
        length = alone.shape[1]
        assert alone_mask.all()
        assert valid.tolist() == [1] * length + [0] * (len(valid) - length)
        torch.testing.assert_close(in_batch[:length], alone[0], rtol=1e-5, atol=1e-5)
        assert not in_batch[length:].any()


def test_embeddings_tell_prompts_apart(encoder):
    embeddings, _ = encoder.encode(["happy", "darkness"])
    assert (embeddings[0, 0] - embeddings[1, 0]).abs().max() > 0.1


def test_a_long_prompt_is_cut_to_256_tokens_with_the_end_token_last(encoder):
    embeddings, mask = encoder.encode(["é" * 500])
    assert embeddings.shape == (1, MAX_TOKENS, encoder.dim)
    assert mask.sum() == MAX_TOKENS
    ids = encoder.tokenizer.encode("é" * 500).ids
    assert ids[-1] == encoder.model.config.eos_token_id


def test_padding_follows_the_models_pad_token_whatever_the_file_says(folder, encoder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=7, pad_token="x", length=300)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(folder / "tokenizer.json"))
    for found, wanted in zip(
        TextEncoder.from_pretrained(folder).encode(PROMPTS), encoder.encode(PROMPTS), strict=True
    ):
        assert torch.equal(found, wanted)


def test_the_embedding_may_lie_in_the_file_under_its_other_name_beside_a_decoder(folder, encoder):
    weights = load_file(folder / "model.safetensors")
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    weights["decoder.final_layer_norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors")
    found, _ = TextEncoder.from_pretrained(folder).encode(PROMPTS)
    assert torch.equal(found, encoder.encode(PROMPTS)[0])


def test_a_missing_or_broken_tokenizer_is_the_users_to_mend(folder):
    path = folder / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        TextEncoder.from_pretrained(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"missing file: .*tokenizer\.json"):
        TextEncoder.from_pretrained(folder)


def test_a_configuration_without_a_pad_token_is_the_users_to_mend(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": None}))
    with pytest.raises(InputError, match=r"no `pad_token_id`: .*config\.json"):
        TextEncoder.from_pretrained(folder)


def test_an_impossible_configuration_is_the_users_to_mend(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_model": "wide"}))
    with pytest.raises(InputError, match=r"config\.json"):
        TextEncoder.from_pretrained(folder)
