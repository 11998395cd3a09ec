"""The generate job: prompt and lyrics to an audio file."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from acestep_ray.config import GenerateConfig
from acestep_ray.data.lyrics import LyricTokenizer
from acestep_ray.data.prompts import prompt_variants
from acestep_ray.data.speaker import SpeakerEmbeddingError, load_speaker_embedding
from acestep_ray.device import check_device_name, resolve_device
from acestep_ray.errors import InputError
from acestep_ray.export.lora import find_lora_file, merge_lora
from acestep_ray.generation.render import SUBTYPES, render, write_audio, write_mel_picture
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.codec import SAMPLE_RATE, latent_frames
from acestep_ray.models.fusing import fuse_where_possible

MAX_DURATION = 240.0
AUTO = "auto"
PRECISIONS = {"32": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class GenerateSummary:
    """What was made."""

    audio: Path
    picture: Path
    seconds: float
    """Length of the audio."""
    wall_seconds: float

    def render(self) -> str:
        """The summary as text."""
        return (
            f"audio    {self.audio} ({self.seconds:.1f} s)\n"
            f"picture  {self.picture}\n"
            f"took     {self.wall_seconds:.1f} s"
        )


def generate(config: GenerateConfig) -> GenerateSummary:
    """Make one piece of music. Raises InputError for settings or files that cannot be used."""
    started = time.monotonic()
    check_generate_config(config)
    output = Path(config.output_path)
    device = resolve_device(config.device)
    checkpoint = CheckpointDir.open(config.checkpoint_dir)
    condition = encode_condition(config, checkpoint, device)
    transformer = checkpoint.load_transformer(device=device, directory=config.transformer_path)
    if config.lora_path is not None:
        merge_lora(transformer, config.lora_path, config.lora_weight)
    precision = PRECISIONS.get(config.precision, torch.bfloat16 if device.type == "cuda" else torch.float32)
    transformer.requires_grad_(False)
    if precision is torch.bfloat16:
        fuse_where_possible(transformer, device)
    frames = latent_frames(int(config.duration * SAMPLE_RATE))
    with torch.autocast(device.type, precision, enabled=precision is torch.bfloat16):
        waveform = render(
            transformer.eval(),
            checkpoint.load_codec(device),
            condition,
            frames=frames,
            seed=config.seed,
            steps=config.infer_steps,
            guidance_scale=config.guidance_scale,
            omega=config.omega,
            shift=config.shift,
            overlapped=config.overlapped_decode,
            on_step=_show_step(config.infer_steps),
        )
    write_audio(output, waveform)
    picture = output.with_suffix(".png")
    write_mel_picture(picture, waveform, config.prompt[:80] or output.stem)
    return GenerateSummary(output, picture, waveform.shape[-1] / SAMPLE_RATE, time.monotonic() - started)


def check_generate_config(config: GenerateConfig) -> None:
    """Raise InputError for values that no model could use."""
    check_device_name(config.device)
    suffix = Path(config.output_path).suffix.lower()
    if suffix not in SUBTYPES:
        raise InputError(
            f"cannot write `{suffix or 'no suffix'}`",
            where=f"--output_path {config.output_path}",
            fix=f"use one of {', '.join(SUBTYPES)}",
        )
    if not 0 < config.duration <= MAX_DURATION:
        raise InputError("out of range", where=f"--duration {config.duration}", fix="from 1 to 240 seconds")
    if latent_frames(int(config.duration * SAMPLE_RATE)) < 1:
        raise InputError(
            "shorter than one latent frame", where=f"--duration {config.duration}", fix="from 1 second"
        )
    if config.infer_steps < 1:
        raise InputError("at least one step is needed", where=f"--infer_steps {config.infer_steps}")
    if config.precision not in (AUTO, *PRECISIONS):
        raise InputError("unknown precision", where=f"--precision {config.precision}", fix="auto, 32 or bf16")
    if config.lora_path is not None:
        find_lora_file(config.lora_path)


def encode_condition(
    config: GenerateConfig, checkpoint: CheckpointDir, device: torch.device
) -> dict[str, Tensor]:
    """Prompt, lyrics and speaker as the arguments of `ACEStepTransformer.encode_condition`, for one song."""
    tokens = LyricTokenizer.from_file(checkpoint.lyric_vocab_path()).encode(
        read_lyrics(config.lyrics), config.language
    )
    tags = [config.prompt] if config.prompt.strip() else []
    prompt = prompt_variants(tags, {}, key="", shuffles=1, seed=0)[0].text
    text, text_mask = checkpoint.load_text_encoder(device).encode([prompt])
    width = checkpoint.transformer_config.speaker_embedding_dim
    speaker = torch.zeros(width)
    if config.speaker_emb_path is not None:
        try:
            speaker = torch.from_numpy(load_speaker_embedding(config.speaker_emb_path, width))
        except SpeakerEmbeddingError as error:
            raise InputError(str(error), where=f"--speaker_emb_path {config.speaker_emb_path}") from None
    ids = torch.tensor([tokens.ids])
    condition = {
        "text": text.float(),
        "text_mask": text_mask.bool(),
        "speaker": speaker[None],
        "lyric_ids": ids,
        "lyric_mask": torch.full(ids.shape, not tokens.is_empty),
    }
    return {name: value.to(device) for name, value in condition.items()}


def read_lyrics(lyrics: str) -> str:
    """The lyrics themselves, or the text of the file that they name. Raises InputError for a file that is no text."""
    looks_like_a_path = "\n" not in lyrics and len(lyrics) < 1024
    if not looks_like_a_path or not lyrics.strip():
        return lyrics
    path = Path(lyrics)
    if not path.is_file():
        if path.suffix.lower() in (".txt", ".lyrics"):
            raise InputError("no such file", where=f"--lyrics {lyrics}")
        return lyrics
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the lyrics ({error})", where=f"--lyrics {lyrics}", fix="save as UTF-8"
        ) from None


def _show_step(total: int):
    def show(step: int) -> None:
        if sys.stderr.isatty():
            print(f"\rstep {step}/{total}", end="\n" if step == total else "", file=sys.stderr, flush=True)

    return show
