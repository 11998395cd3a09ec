"""A complete checkpoint directory with small random models, for the quickstart and the tests.

Everything has the released layout, names and configuration keys; only the sizes differ. The weights are random but
scaled so that what flows through the models is as wide as in the released ones: latents of unit variance, mel frames
in the vocoder's range, audible waves.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderDC
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import HubertConfig, HubertModel, UMT5Config, UMT5EncoderModel

from acestep_ray.data.lyrics.tokenizer import build_tiny_vocabulary
from acestep_ray.errors import InputError
from acestep_ray.models.checkpoint import (
    AUTOENCODER,
    LYRIC_VOCAB,
    SSL_FOLDERS,
    TEXT_ENCODER,
    TOKENIZER_FILE,
    TRANSFORMER,
    VOCODER,
    CheckpointDir,
)
from acestep_ray.models.codec import LATENT_SCALE, LATENT_SHIFT, SAMPLE_RATE, MusicCodec
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.transformer_config import TransformerConfig
from acestep_ray.models.vocoder import Vocoder, VocoderConfig
from acestep_ray.paths import expand_home
from acestep_ray.storage import output_folder

LYRIC_VOCAB_SIZE = 512
TEXT_DIM = 32

TRANSFORMER_CONFIG: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 4,
    "inner_dim": 64,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "mlp_ratio": 2.5,
    "out_channels": 8,
    "max_position": 32768,
    "rope_theta": 1_000_000.0,
    "speaker_embedding_dim": 512,
    "text_embedding_dim": TEXT_DIM,
    "ssl_encoder_depths": [1, 1],
    "ssl_names": ["mert", "m-hubert"],
    "ssl_latent_dims": [32, 24],
    "lyric_encoder_vocab_size": LYRIC_VOCAB_SIZE,
    "lyric_hidden_size": 32,
    "patch_size": [16, 1],
    "max_height": 16,
    "max_width": 32768,
    "lyric_encoder": {"attention_heads": 2, "linear_units": 64, "num_blocks": 2},
}
AUTOENCODER_CONFIG: dict[str, Any] = {
    "in_channels": 2,
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_types": ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [8, 16, 16, 32],
    "decoder_block_out_channels": [8, 16, 16, 32],
    "encoder_layers_per_block": [1, 1, 1, 1],
    "decoder_layers_per_block": [1, 1, 1, 1],
    "encoder_qkv_multiscales": [[], [], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [5], [5]],
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    # Without the shortcut the last convolution alone sets the latents' scale.
    "encoder_out_shortcut": False,
    "scaling_factor": 0.41407,
}
VOCODER_CONFIG: dict[str, Any] = {
    "input_channels": 128,
    "depths": [1, 1],
    "dims": [32, 48],
    "kernel_sizes": [7],
    "upsample_rates": [8, 8, 8],
    "upsample_kernel_sizes": [16, 16, 16],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "num_mels": 48,
    "upsample_initial_channel": 32,
    "use_template": False,
    "pre_conv_kernel_size": 13,
    "post_conv_kernel_size": 13,
}
SSL_CONFIGS: dict[str, dict[str, Any]] = {
    "mert": {
        "model_type": "mert_model",
        "architectures": ["MERTModel"],
        "attention_relax": 32.0,
        "deepnorm": False,
        "feature_extractor_cqt": False,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "conv_bias": True,
    },
    "m-hubert": {
        "model_type": "hubert",
        "architectures": ["HubertModel"],
        "hidden_size": 24,
        "num_attention_heads": 4,
        "feat_extract_norm": "group",
        "do_stable_layer_norm": False,
        "conv_bias": False,
    },
}
_SSL_COMMON: dict[str, Any] = {
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}

# Prompts of the kind that songs come with: enough to learn a few hundred merges from.
_TOKENIZER_TEXT = (
    "pop, rock, electronic, jazz, classical, hip hop, rap, folk, country, ambient, techno, house, metal, soul, funk",
    "male vocals, female vocals, choir, whispered voice, spoken word, instrumental, no vocals, harmonies",
    "piano, acoustic guitar, electric guitar, bass, drums, synthesizer, strings, violin, cello, flute, trumpet",
    "happy, sad, energetic, calm, dreamy, dark, romantic, melancholic, uplifting, aggressive, slow, fast, 120 bpm",
    "a slow piano ballad with a warm female voice and soft strings that grows into a wide chorus",
    "an energetic electronic dance track with heavy bass, bright synthesizers and a driving beat",
    "this song is a calm acoustic folk tune about the sea, sung by a man with a guitar in a small room",
)
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"


def write_tiny_checkpoint(directory: str | Path, seed: int = 0) -> CheckpointDir:
    """Write a complete small checkpoint (about 5 MB) to `directory` and open it; the same seed gives the same files.

    The directory appears whole or not at all. Raises `InputError` if it exists and is not empty.
    """
    target = Path(expand_home(os.fspath(directory)))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            "a tiny checkpoint is written to a new directory, this one is not empty",
            where=str(target),
            fix="choose another directory, or delete this one",
        )
    with output_folder(target) as building:
        _write_transformer(building / TRANSFORMER, seed)
        _write_codec(building / AUTOENCODER, building / VOCODER, seed)
        _write_text_encoder(building / TEXT_ENCODER, seed)
        for name, folder in SSL_FOLDERS.items():
            _write_ssl_model(building / folder, name, seed)
        (building / LYRIC_VOCAB).parent.mkdir()
        build_tiny_vocabulary(building / LYRIC_VOCAB, size=LYRIC_VOCAB_SIZE)
    return CheckpointDir.open(target)


def _write_transformer(directory: Path, seed: int) -> None:
    transformer = ACEStepTransformer(TransformerConfig.from_dict(TRANSFORMER_CONFIG))
    _randomise(transformer, seed, TRANSFORMER)
    weights = dict(transformer.state_dict())
    # The released file has these projections too, and its forward pass does not use them either.
    dim = TRANSFORMER_CONFIG["inner_dim"]
    for block in range(TRANSFORMER_CONFIG["num_layers"]):
        for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            prefix = f"transformer_blocks.{block}.cross_attn.{name}"
            weights[f"{prefix}.weight"] = _random_weight(f"{seed}/{prefix}.weight", (dim, dim))
            weights[f"{prefix}.bias"] = _random_weight(f"{seed}/{prefix}.bias", (dim,))
    config = {"_class_name": "ACEStepTransformer2DModel", **TRANSFORMER_CONFIG}
    _write_model(directory, config, weights, "diffusion_pytorch_model.safetensors")


@torch.no_grad()
def _write_codec(autoencoder_directory: Path, vocoder_directory: Path, seed: int) -> None:
    """Random autoencoder and vocoder whose last layers are scaled on a few synthetic songs."""
    autoencoder = AutoencoderDC(**AUTOENCODER_CONFIG).eval()
    vocoder = Vocoder(VocoderConfig.from_dict(VOCODER_CONFIG)).eval()
    _randomise(autoencoder, seed, AUTOENCODER)
    _randomise(vocoder, seed, VOCODER)
    codec = MusicCodec(autoencoder, vocoder)

    mel = torch.stack([codec.log_mel(song) for song in _synthetic_songs(seed)])
    last = autoencoder.encoder.conv_out
    unscaled = codec.mel_to_latents(mel) / LATENT_SCALE + LATENT_SHIFT
    _standardise(last.weight, last.bias, unscaled, mean=LATENT_SHIFT, std=1 / LATENT_SCALE)
    latents = codec.mel_to_latents(mel)
    last = autoencoder.decoder.conv_out
    normalised_mel = autoencoder.decode(latents / LATENT_SCALE + LATENT_SHIFT).sample
    _standardise(last.weight, last.bias, normalised_mel, mean=0.0, std=0.3)
    last = vocoder.head.conv_post
    before_tanh = torch.atanh(vocoder(codec.latents_to_mel(latents).flatten(0, 1)))
    _standardise(last.weight_g, last.bias, before_tanh, mean=0.0, std=0.2)

    config = {"_class_name": "AutoencoderDC", **AUTOENCODER_CONFIG}
    _write_model(
        autoencoder_directory, config, autoencoder.state_dict(), "diffusion_pytorch_model.safetensors"
    )
    config = {"_class_name": "ADaMoSHiFiGANV1", **VOCODER_CONFIG}
    _write_model(vocoder_directory, config, vocoder.state_dict(), "diffusion_pytorch_model.safetensors")


def _write_text_encoder(directory: Path, seed: int) -> None:
    tokenizer = _train_tokenizer()
    config = UMT5Config(
        vocab_size=tokenizer.get_vocab_size(), d_model=TEXT_DIM, d_kv=16, d_ff=64, num_layers=2, num_heads=2
    )
    encoder = UMT5EncoderModel(config)
    _randomise(encoder, seed, TEXT_ENCODER)
    weights = {
        name: tensor for name, tensor in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"
    }
    settings = {**config.to_dict(), "architectures": ["UMT5EncoderModel"]}
    _write_model(directory, settings, weights, "model.safetensors")
    tokenizer.save(str(directory / TOKENIZER_FILE))


def _train_tokenizer() -> Tokenizer:
    """A byte-level BPE: no text is outside its vocabulary. Ids 0 and 1 are padding and end, as in UMT5."""
    tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[_PAD, _END, _UNKNOWN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TOKENIZER_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, tokenizer.token_to_id(_END))]
    )
    return tokenizer


def _write_ssl_model(directory: Path, name: str, seed: int) -> None:
    settings = {**SSL_CONFIGS[name], **_SSL_COMMON}
    model = HubertModel(HubertConfig(**{key: settings[key] for key in settings if key != "model_type"}))
    _randomise(model, seed, name)
    _write_model(directory, settings, model.state_dict(), "model.safetensors")


def _write_model(
    directory: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], name: str
) -> None:
    directory.mkdir()
    config_path, weights_path = directory / "config.json", directory / name
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, weights_path, {"format": "pt"})
    # safetensors makes its files readable by their owner alone, whatever the umask.
    weights_path.chmod(config_path.stat().st_mode)


@torch.no_grad()
def _randomise(module: nn.Module, seed: int, part: str) -> None:
    """Random weights that keep the width of what passes through; each depends on the seed and its own name only."""
    for name, parameter in module.named_parameters():
        # A conv's gain under weight norm is positive and one number a channel.
        if name.endswith(("weight_g", "weight.original0")):
            parameter.fill_(1.0)
        else:
            parameter.copy_(_random_weight(f"{seed}/{part}/{name}", parameter.shape))


def _random_weight(tag: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal numbers over √fan-in for a matrix, about 0 for a bias and about 1 for a gain."""
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(tag.encode())))
    if len(shape) > 1:
        return normal / normal[0].numel() ** 0.5
    return 0.02 * normal if tag.endswith("bias") else 1 + 0.02 * normal


def _standardise(
    gain: torch.Tensor, bias: torch.Tensor | None, outputs: torch.Tensor, *, mean: float, std: float
) -> None:
    """Change a last layer, in place, so that each channel of its `outputs` (B, C, …) gets this mean and deviation."""
    assert bias is not None  # last layers have one
    by_channel = outputs.transpose(0, 1).flatten(1)
    factor = _coarse(std / by_channel.std(dim=1))
    gain.mul_(factor.view(-1, *[1] * (gain.ndim - 1)))
    bias.copy_(_coarse((bias - by_channel.mean(dim=1)) * factor + mean))


def _coarse(x: torch.Tensor) -> torch.Tensor:
    # Rounding errors differ with the number of threads; three digits do not.
    return x.bfloat16().float()


def _synthetic_songs(seed: int, count: int = 4, seconds: float = 4.0) -> torch.Tensor:
    """(count, 2, samples) at 48 kHz: notes with harmonics and bursts of noise, each in a rhythm of its own."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/songs".encode()))
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    songs = torch.zeros(count, 2, len(time))
    for song in songs:
        for _ in range(4):
            pitch, rate, *gains = torch.rand(4, generator=generator).tolist()
            frequency = 80 * 2 ** (4 * pitch)
            strikes = torch.exp(-6 * torch.remainder(time * (1 + 2 * rate), 1.0))
            noise = 0.3 * torch.randn(len(time), generator=generator) * strikes**2
            tone = sum(torch.sin(2 * torch.pi * k * frequency * time) / k for k in range(1, 6)) * strikes
            song += 0.2 * torch.tensor(gains)[:, None] * (tone + noise)
    return songs
