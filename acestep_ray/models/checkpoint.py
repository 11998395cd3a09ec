"""The checkpoint directory in the released layout: checking it, loading its parts, where it is published."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acestep_ray.errors import InputError
from acestep_ray.foreign_files import seems_to_be
from acestep_ray.models.codec import MusicCodec
from acestep_ray.models.fingerprints import noted_sha256
from acestep_ray.models.ssl import SSLEncoder
from acestep_ray.models.text_encoder import TextEncoder
from acestep_ray.models.transformer import ACEStepTransformer, is_unused_parameter
from acestep_ray.models.transformer_config import TransformerConfig
from acestep_ray.models.vocoder import VocoderConfig
from acestep_ray.models.weights import (
    FIX,
    build_on_meta,
    check_weight_file,
    load_weights,
    read_json,
    weight_files,
)
from acestep_ray.paths import expand_home, shell_command
from acestep_ray.storage import is_url

TRANSFORMER = "ace_step_transformer"
AUTOENCODER = "music_dcae_f8c8"
VOCODER = "music_vocoder"
TEXT_ENCODER = "umt5-base"
TOKENIZER_FILE = "tokenizer.json"
LYRIC_VOCAB = "lyric_tokenizer/vocab.json"
_FETCH = ("acestep-ray", "checkpoint", "fetch")
LYRIC_VOCAB_VARIABLE = "ACESTEP_LYRIC_VOCAB"
# Folder of each SSL model by the name that the transformer's configuration gives it.
SSL_FOLDERS = {"mert": "mert", "m-hubert": "mhubert"}

# What `fingerprint` knows. Encoding uses the autoencoder alone, so a new vocoder leaves cached latents valid.
PARTS = {
    "transformer": TRANSFORMER,
    "codec": AUTOENCODER,
    "vocoder": VOCODER,
    "text_encoder": TEXT_ENCODER,
    **SSL_FOLDERS,
}


@dataclass(frozen=True)
class CheckpointDir:
    """A directory whose parts were found whole; the loaders read them, float32 and frozen but for the transformer."""

    path: Path
    transformer_config: TransformerConfig
    ssl_names: tuple[str, ...]
    """SSL models that are there, in the transformer's order."""

    @classmethod
    def open(cls, path: str | Path) -> CheckpointDir:
        """Check that every part is there, its configuration reads, its weights have a whole header, its sizes agree.

        Reads no weights. Raises one `InputError` that lists everything that is missing or broken.
        """
        if is_url(path):
            raise InputError(
                "a checkpoint directory is read from a disk, by every node that loads models",
                where=str(path),
                fix="copy it to the same path on every node, or to a disk that they share, and give that path",
            )
        root = Path(expand_home(os.fspath(path)))
        fix = (
            f"`{shell_command(*_FETCH, root)}` downloads what is missing of the released model; "
            f"`acestep-ray checkpoint tiny DIR` writes a small random one to try things with"
        )
        if not root.is_dir():
            raise InputError("no such checkpoint directory", where=str(root), fix=fix)
        if other := _other_place(root):
            raise other
        present = [name for name, folder in SSL_FOLDERS.items() if (root / folder).is_dir()]
        folders = [TRANSFORMER, AUTOENCODER, VOCODER, TEXT_ENCODER, *(SSL_FOLDERS[name] for name in present)]
        problems: list[str] = []
        configs = {folder: _check_part(root, folder, problems) for folder in folders}
        transformer_config = _parse_configs(configs, problems)
        if problems or transformer_config is None:
            listed = "".join(f"\n  - {problem}" for problem in problems)
            raise InputError(
                "the checkpoint directory is incomplete or broken", where=f"{root}{listed}", fix=fix
            )
        ssl_names = tuple(name for name in transformer_config.ssl_names if name in present)
        return cls(root, transformer_config, ssl_names)

    def load_transformer(
        self,
        dtype: torch.dtype | Callable[[nn.Module], torch.dtype] = torch.float32,
        device: torch.device | str = "cpu",
        *,
        directory: str | Path | None = None,
    ) -> ACEStepTransformer:
        """The transformer in `dtype`, trainable, one copy in memory; parameters that it never uses are left out.

        `dtype` may be a function of the module that a parameter belongs to. `directory` holds a fine-tuned one, to be
        taken instead. Raises `InputError` with every missing, unexpected or misshapen name.
        """
        directory = self.path / TRANSFORMER if directory is None else Path(directory)
        transformer = build_on_meta(lambda: ACEStepTransformer(self.transformer_config), directory)
        load_weights(transformer, directory, dtype=dtype, device=device, ignore=is_unused_parameter)
        return transformer

    def load_codec(self, device: torch.device | str = "cpu", *, precision: str = "32") -> MusicCodec:
        """`precision` "16" encodes in float16, and in float32 the songs that overflow it; decoding is float32."""
        return MusicCodec.from_pretrained(
            self.path / AUTOENCODER,
            self.path / VOCODER,
            device=device,
            encoder_dtype=_dtype(precision, torch.float16),
        )

    def load_text_encoder(self, device: torch.device | str = "cpu", *, precision: str = "32") -> TextEncoder:
        """`precision` "16" is bfloat16."""
        return TextEncoder.from_pretrained(
            self.path / TEXT_ENCODER, device=device, dtype=_dtype(precision, torch.bfloat16)
        )

    def load_ssl_encoders(
        self, device: torch.device | str = "cpu", *, precision: str = "32"
    ) -> dict[str, SSLEncoder]:
        """The SSL encoders that are there, by name; empty where none is. `precision` "16" is bfloat16."""
        dtype = _dtype(precision, torch.bfloat16)
        return {
            name: SSLEncoder.from_pretrained(self.path / SSL_FOLDERS[name], name, device=device, dtype=dtype)
            for name in self.ssl_names
        }

    def lyric_vocab_path(self) -> Path:
        """The lyric vocabulary: `lyric_tokenizer/vocab.json`, else the file that $ACESTEP_LYRIC_VOCAB names.

        Raises `InputError` where there is neither.
        """
        path = self.path / LYRIC_VOCAB
        if path.is_file():
            return path
        elsewhere = os.environ.get(LYRIC_VOCAB_VARIABLE)
        if elsewhere:
            path = Path(expand_home(elsewhere))
            if not path.is_file():
                raise InputError(
                    "no lyric vocabulary here",
                    where=f"{path} (from ${LYRIC_VOCAB_VARIABLE})",
                    fix=f"let ${LYRIC_VOCAB_VARIABLE} name the released vocab.json",
                )
            return path
        raise InputError(
            "no lyric vocabulary",
            where=str(path),
            fix=(
                f"`{shell_command(*_FETCH, self.path)}` downloads it, "
                f"or let ${LYRIC_VOCAB_VARIABLE} name the file"
            ),
        )

    def fingerprint(self, part: str) -> str:
        """SHA-256, in hex, over the bytes of a part's configuration, weights and tokenizer.

        `part` is one of `PARTS` or "lyric_vocab". Raises `InputError` where the part is missing.
        """
        if part == "lyric_vocab":
            files = [self.lyric_vocab_path()]
        else:
            directory = self.path / PARTS[part]
            files = [directory / "config.json", *weight_files(directory)]
            if part == "text_encoder":
                files.append(directory / TOKENIZER_FILE)
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name} {noted_sha256(file)}\n".encode())
        return digest.hexdigest()


def _dtype(precision: str, half: torch.dtype) -> torch.dtype:
    if precision not in ("32", "16"):
        raise InputError(f"unknown precision {precision!r}", fix='"32" or "16"')
    return half if precision == "16" else torch.float32


def _other_place(root: Path) -> InputError | None:
    """The error for a directory with none of the parts that is known to be something else."""
    if any((root / folder).is_dir() for folder in (TRANSFORMER, AUTOENCODER, VOCODER, TEXT_ENCODER)):
        return None
    where = str(root)
    if root.name in (TRANSFORMER, AUTOENCODER, VOCODER, TEXT_ENCODER) and (root / "config.json").is_file():
        fix = f"give the directory that holds it: {root.parent}"
        return InputError("this is one part of a checkpoint directory", where=where, fix=fix)
    within = [*sorted(root.glob(f"*/{TRANSFORMER}")), *sorted(root.glob(f"snapshots/*/{TRANSFORMER}"))]
    if within:
        fix = f"give {within[-1].parent}"
        return InputError("the checkpoint directory is further inside", where=where, fix=fix)
    if any(root.glob("acestep-v15*")) or any(root.glob("acestep-5Hz*")) or _model_type(root) == "acestep":
        return InputError(
            "this is a checkpoint of ACE-Step 1.5, and this program trains version 1",
            where=where,
            fix="give one of ACE-Step v1: `acestep-ray checkpoint fetch DIR` downloads it into a new directory",
        )
    return None


def _model_type(root: Path) -> object:
    try:
        return read_json(root / "config.json").get("model_type")
    except InputError:
        return None


def _check_part(root: Path, folder: str, problems: list[str]) -> dict[str, Any] | None:
    """The part's config.json; what is wrong with the part is added to `problems`."""
    directory = root / folder
    if not directory.is_dir():
        problems.append(f"{folder}/ is missing")
        return None
    config = None
    try:
        config = read_json(directory / "config.json")
    except InputError as error:
        problems.append(f"{folder}/config.json: {_with_own_fix(error)}")
    try:
        for path in weight_files(directory):
            check_weight_file(path)
    except InputError as error:
        problems.append(f"{Path(error.where or directory).relative_to(root)}: {_with_own_fix(error)}")
    if folder == TEXT_ENCODER:
        tokenizer = directory / TOKENIZER_FILE
        if not tokenizer.is_file():
            problems.append(f"{folder}/{TOKENIZER_FILE}: missing file")
        elif found := seems_to_be(tokenizer):
            problems.append(f"{folder}/{TOKENIZER_FILE}: it is {found.what}; {found.fix}")
    return config


def _with_own_fix(error: InputError) -> str:
    """The mistake, and what to do about it where that is not to download the part again."""
    return error.what if error.fix in (None, FIX) else f"{error.what}; {error.fix}"


def _parse_configs(
    configs: dict[str, dict[str, Any] | None], problems: list[str]
) -> TransformerConfig | None:
    """The transformer's configuration; widths that other parts do not share with it are added to `problems`."""
    vocoder_config, transformer_config = configs[VOCODER], configs[TRANSFORMER]
    if vocoder_config is not None:
        try:
            VocoderConfig.from_dict(vocoder_config)
        except (TypeError, ValueError) as error:
            problems.append(f"{VOCODER}/config.json: {error}")
    if transformer_config is None:
        return None
    try:
        transformer = TransformerConfig.from_dict(transformer_config)
    except (TypeError, ValueError) as error:
        problems.append(f"{TRANSFORMER}/config.json: {error}")
        return None
    shared = [
        (TEXT_ENCODER, "d_model", transformer.text_embedding_dim),
        (AUTOENCODER, "latent_channels", transformer.in_channels),
    ]
    for name, width in zip(transformer.ssl_names, transformer.ssl_latent_dims, strict=True):
        if name in SSL_FOLDERS:
            shared.append((SSL_FOLDERS[name], "hidden_size", width))
        else:
            problems.append(f"{TRANSFORMER}/config.json: unknown SSL model {name!r} in `ssl_names`")
    for folder, key, wanted in shared:
        config = configs.get(folder)
        if config is not None and config.get(key) != wanted:
            problems.append(
                f"{folder}/config.json: `{key}` is {config.get(key)}, the transformer expects {wanted}"
            )
    return transformer


@dataclass(frozen=True)
class Release:
    """Where the parts of a checkpoint are published, and the SHA-256 of every file that has a known one."""

    repository: str
    revision: str
    files: dict[str, str]
    lyric_vocab_url: str
    lyric_vocab_sha256: str
    ssl_repositories: dict[str, str] = field(default_factory=dict)
    """Repository by folder. No revision and no sum of them was published with the release."""


ACE_STEP_V1 = Release(
    repository="ACE-Step/ACE-Step-v1-3.5B",
    revision="82cd0d7b6322bd28cd4e830fe675ddb6180ce36c",
    files={
        "ace_step_transformer/config.json": "4d78beb6afb4c7f3705256b44faaf60f3e1e2d78f4015ca87740f3695d7f5447",
        "ace_step_transformer/diffusion_pytorch_model.safetensors": (
            "e810f16728d8a2e0d1b9c3a907aac8c9a427ce38edbd890cb3dce5ff92da5aad"
        ),
        "music_dcae_f8c8/config.json": "b14a49a8c52a52c2c8050098af1a946810a8a1a0b6e50abc75ba81371383cf04",
        "music_dcae_f8c8/diffusion_pytorch_model.safetensors": (
            "2b0cb469307ac50659d1880db2a99bae47d0df335cbb36853964662d4b80e8ee"
        ),
        "music_vocoder/config.json": "39ddc4c417e01dc3be1862fcf315887358dd61b7f91c3cc8227f65072984bb55",
        "music_vocoder/diffusion_pytorch_model.safetensors": (
            "c92c9b46e28ab7b37b777780cf4308ad7ddac869636bb77aa61599358c4bc1c0"
        ),
        "umt5-base/config.json": "afae5da9a35e2b293cee66536f03fc2581cfc3f3d5707d3a262b552748de1572",
        "umt5-base/model.safetensors": "779cec0d210b2123e21d0a9cd8128f02b4d412627355028965a8be0b241cc3b6",
        "umt5-base/tokenizer.json": "20a46ac256746594ed7e1e3ef733b83fbc5a6f0922aa7480eda961743de080ef",
        "umt5-base/special_tokens_map.json": "456b58fd240a06c743a7c2cf8008bec501240d68ebd1fc4018ea569505fea270",
        "umt5-base/tokenizer_config.json": "ed9a3a8b0faa71a70a32847e0435fe036e6e112d4df4edb7bb48a921e344dc05",
    },
    lyric_vocab_url=(
        "https://raw.githubusercontent.com/ace-step/ACE-Step/d612523f50e252c0e138e68ae75b06223f96e934"
        "/acestep/models/lyrics_utils/vocab.json"
    ),
    lyric_vocab_sha256="c2a66ea48c478c0bb9acb5497144b926acdeaa37128faa799508d40f2b9cc558",
    ssl_repositories={"mert": "m-a-p/MERT-v1-330M", "mhubert": "utter-project/mHuBERT-147"},
)
