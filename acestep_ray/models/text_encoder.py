"""The frozen prompt encoder: UMT5 (Chung et al. 2023, arXiv:2304.09151), its encoder half."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from torch import nn

from acestep_ray.device import small_tensor
from acestep_ray.errors import InputError
from acestep_ray.models.tokenizer_file import read_tokenizer
from acestep_ray.models.weights import FIX, build_on_meta, load_weights, read_json

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

MAX_TOKENS = 256


class TextEncoder(nn.Module):
    """Prompts → one embedding a token."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: Tokenizer):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> TextEncoder:
        """The encoder and tokenizer in `umt5-base/`, frozen. Raises `InputError` if broken.

        `dtype` is float32 or bfloat16: UMT5 overflows float16.
        """
        # Seconds of imports that who loads no text encoder need not wait for.
        from transformers import UMT5Config, UMT5EncoderModel

        directory = Path(directory)
        settings = read_json(directory / "config.json")
        model = build_on_meta(lambda: UMT5EncoderModel(UMT5Config.from_dict(settings)), directory)
        pad_id = model.config.pad_token_id
        if pad_id is None:
            raise InputError("no `pad_token_id`", where=str(directory / "config.json"), fix=FIX)
        tokenizer = load_tokenizer(directory / "tokenizer.json", pad_id)
        # A full UMT5 has a decoder as well.
        load_weights(
            model,
            directory,
            dtype=dtype,
            device=device,
            ignore=lambda name: name.startswith(("decoder.", "lm_head.")),
        )
        model.eval().requires_grad_(False)
        return cls(model, tokenizer).eval()

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self.model.config.d_model

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts → embeddings (B, T, dim), zero past a prompt's end, and mask (B, T) of ones and zeros, float32.

        T is the longest prompt's length in tokens, at most 256, the end token included.
        """
        try:
            encodings = self.tokenizer.encode_batch(texts)
        except Exception as error:  # the Rust library raises plain Exception
            raise RuntimeError(f"the tokenizer cannot read a prompt ({error})") from error
        device = self.model.shared.weight.device
        ids = small_tensor([encoding.ids for encoding in encodings], device)
        mask = small_tensor([encoding.attention_mask for encoding in encodings], device)
        embeddings = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        mask = mask.to(embeddings.dtype)
        return embeddings * mask[..., None], mask


def load_tokenizer(path: Path, pad_id: int) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, for prompts of up to `MAX_TOKENS`. Raises `InputError` if broken."""
    tokenizer = read_tokenizer(path)
    pad_token = tokenizer.id_to_token(pad_id)
    if pad_token is None:
        raise InputError(f"this tokenizer has no token {pad_id}, the padding's", where=str(path), fix=FIX)
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(pad_id=pad_id, pad_token=pad_token)
    return tokenizer
