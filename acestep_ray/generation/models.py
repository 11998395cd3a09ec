"""The models that make music, loaded once: songs in, sound out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from acestep_ray.config import GenerateConfig
from acestep_ray.data.lyrics import LyricTokenizer
from acestep_ray.data.prompts import prompt_variants
from acestep_ray.device import check_device_name, resolve_device
from acestep_ray.diffusion.sampler import sample
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.export.lora import check_lora_fits, merge_updates
from acestep_ray.export.merge import read_strengths
from acestep_ray.export.reading import LoraUpdate
from acestep_ray.generation.audio import Sound
from acestep_ray.generation.render import decode, decoding_bytes, free_bytes, starting_noise
from acestep_ray.generation.song import Song
from acestep_ray.hints import one_of
from acestep_ray.models.checkpoint import TRANSFORMER, CheckpointDir
from acestep_ray.models.codec import MusicCodec
from acestep_ray.models.fusing import fuse_where_possible
from acestep_ray.models.text_encoder import TextEncoder
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.weights import read_weights, weight_files

AUTO = "auto"
PRECISIONS = {"32": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelChoice:
    """Which models make the music, and how they are run."""

    checkpoint_dir: str
    transformer_path: str
    """Folder of the transformer, the checkpoint's own or a fine-tuned one."""
    loras: tuple[tuple[dict[str, LoraUpdate], float], ...]
    """What each LoRA changes, and its strength; not its file, which lies on the driver's machine or in a copy there."""
    device: str
    precision: str
    overlapped: bool | None
    """Whether sound is decoded in overlapping windows; None where memory would not suffice for one piece."""


def choose_models(config: GenerateConfig, checkpoint: CheckpointDir) -> ModelChoice:
    """The models that the flags name. Raises InputError for what cannot be loaded together."""
    check_device_name(config.device)
    if config.precision not in (AUTO, *PRECISIONS):
        fix = one_of(config.precision, (AUTO, *PRECISIONS))
        raise InputError("unknown precision", where=f"--precision {config.precision}", fix=fix)
    if config.lora_path is None and config.lora_weight is not None:
        raise InputError(
            "there is no LoRA", where=f"--lora_weight {config.lora_weight}", fix="give --lora_path"
        )
    transformer = checkpoint.path / TRANSFORMER
    if config.transformer_path is not None:
        transformer = Path(config.transformer_path)
        weight_files(transformer)
    loras = []
    if config.lora_path is not None:
        weights = None if config.lora_weight is None else str(config.lora_weight)
        loras = read_strengths(config.lora_path, weights)
        shapes = {name: tuple(tensor.shape) for name, tensor, _ in read_weights(transformer)}
        for lora in loras:
            check_lora_fits(lora.updates, shapes, lora.path)
    return ModelChoice(
        # Workers on other nodes have another working directory.
        checkpoint_dir=str(checkpoint.path.absolute()),
        transformer_path=str(transformer.absolute()),
        loras=tuple((lora.updates, lora.weight) for lora in loras),
        device=config.device,
        precision=config.precision,
        overlapped=config.overlapped_decode,
    )


class MusicModels:
    """All models of a checkpoint that generating needs, on one device."""

    def __init__(
        self,
        transformer: ACEStepTransformer,
        codec: MusicCodec,
        text_encoder: TextEncoder,
        lyric_tokenizer: LyricTokenizer,
        *,
        bfloat16: bool = False,
        overlapped: bool | None = None,
    ):
        self.transformer = transformer
        self.codec = codec
        self.text_encoder = text_encoder
        self.lyric_tokenizer = lyric_tokenizer
        self.bfloat16 = bfloat16
        self.overlapped = overlapped

    @classmethod
    def load(cls, choice: ModelChoice) -> MusicModels:
        """Read them from disk, LoRAs merged. Raises InputError for what is broken."""
        device = resolve_device(choice.device)
        checkpoint = CheckpointDir.open(choice.checkpoint_dir)
        transformer = checkpoint.load_transformer(device=device, directory=choice.transformer_path)
        merge_updates(transformer, choice.loras)
        transformer.requires_grad_(False).eval()
        bfloat16 = is_bfloat16(choice.precision, on_gpu=device.type == "cuda")
        if bfloat16:
            fuse_where_possible(transformer, device)
        return cls(
            transformer,
            checkpoint.load_codec(device),
            checkpoint.load_text_encoder(device),
            LyricTokenizer.from_file(checkpoint.lyric_vocab_path()),
            bfloat16=bfloat16,
            overlapped=choice.overlapped,
        )

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.codec.device

    def make(self, songs: Sequence[Song], on_step: Callable[[int], None] | None = None) -> list[Sound]:
        """The sound of songs that are `sampled_with` the same; each is what it is alone.

        Raises AceStepError where a model gives values that are not finite.
        """
        first = songs[0]
        condition = joined([self.encode_condition(song) for song in songs])
        noise = torch.cat([starting_noise(song.frames, song.seed) for song in songs])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            latents = sample(
                self.transformer,
                noise.to(self.device),
                condition,
                steps=first.infer_steps,
                guidance_scale=first.guidance_scale,
                omega=first.omega,
                shift=first.shift,
                scheduler=first.scheduler,
                seeds=[song.seed for song in songs],
                on_step=on_step,
            )
        return [self._decode(song_latents[None]) for song_latents in latents]

    def encode_condition(self, song: Song) -> dict[str, Tensor]:
        """Prompt, lyrics and speaker as the arguments of `ACEStepTransformer.encode_condition`, for one song."""
        tokens = self.lyric_tokenizer.encode(song.lyrics, song.language)
        tags = [song.prompt] if song.prompt.strip() else []
        prompt = prompt_variants(tags, {}, key="", shuffles=1, seed=0)[0].text
        text, text_mask = self.text_encoder.encode([prompt])
        speaker = torch.zeros(self.transformer.config.speaker_embedding_dim)
        if song.speaker is not None:
            speaker = torch.tensor(song.speaker)
        ids = torch.tensor([tokens.ids])
        condition = {
            "text": text.float(),
            "text_mask": text_mask.bool(),
            "speaker": speaker[None],
            "lyric_ids": ids,
            "lyric_mask": torch.full(ids.shape, not tokens.is_empty),
        }
        return {name: value.to(self.device) for name, value in condition.items()}

    def _decode(self, latents: Tensor) -> Sound:
        overlapped = self.overlapped
        if overlapped is None:
            overlapped = decoding_bytes(self.codec, latents.shape[-1]) > free_bytes(self.device)
        waveform = decode(self.codec, latents, overlapped=overlapped)
        if not np.isfinite(waveform).all():
            raise AceStepError("the models gave values that are not finite")
        return Sound(waveform, overlapped)


def joined(conditions: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Conditions of one song each as a batch, padded; every song's positions are those it has alone."""
    return {
        "speaker": torch.cat([condition["speaker"] for condition in conditions]),
        "lyric_start": torch.tensor(
            [1 + condition["text"].shape[1] for condition in conditions], device=conditions[0]["text"].device
        ),
        **{
            name: pad_sequence([condition[name][0] for condition in conditions], batch_first=True)
            for name in ("text", "text_mask", "lyric_ids", "lyric_mask")
        },
    }


def is_bfloat16(precision: str, *, on_gpu: bool) -> bool:
    """Whether the transformer computes in bfloat16 with this `--precision`."""
    return PRECISIONS.get(precision, torch.bfloat16 if on_gpu else torch.float32) is torch.bfloat16
