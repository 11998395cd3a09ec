"""Settings of what `export` does with LoRAs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from acestep_ray.config.groups import Groups
from acestep_ray.config.paths import PathSettings


@dataclass
class ExportConfig(PathSettings):
    """Writes a LoRA for other programs, with a model card where it comes from a run."""

    GROUPS: ClassVar[Groups] = {
        "LoRA": ("input_path", "checkpoint", "checkpoint_dir"),
        "files": ("output_dir", "format", "dtype"),
        "Hugging Face Hub": ("push_to_hub", "dry_run"),
    }

    input_path: str
    """Experiment, training checkpoint, or a LoRA's file or directory in any known form; a path or a URL."""
    output_dir: str
    """New directory to write, a path or a URL."""
    format: str = "universal"
    """universal (one file that plays everywhere), peft (adapter directory), comfyui or kohya."""
    checkpoint: str = "last"
    """Of an experiment: last, best (the lowest validation loss), or a step."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    checkpoint_dir: str | None = None
    """Checkpoint directory that the LoRA is to fit; none looks at the names of its modules alone."""
    push_to_hub: str | None = None
    """Repository on the Hugging Face Hub, USER/NAME, that gets the files; a new one is private."""
    dry_run: bool = False
    """With `push_to_hub`: only say what would be uploaded."""


@dataclass
class MergeConfig(PathSettings):
    """Merges LoRAs into a base model: a complete checkpoint directory."""

    GROUPS: ClassVar[Groups] = {
        "model and LoRAs": ("checkpoint_dir", "lora_path", "lora_weight"),
        "files": ("output_dir", "dtype", "max_shard_size"),
    }

    checkpoint_dir: str
    """Checkpoint directory of the base model, in the released layout."""
    lora_path: str
    """LoRA, training checkpoint or experiment, a path or a URL; several with commas between them."""
    output_dir: str
    """New checkpoint directory to write, a path or a URL."""
    lora_weight: str | None = None
    """Strength of each LoRA, with commas between them; none is 1 for all."""
    dtype: str = "float32"
    """float32 or bfloat16, of the transformer."""
    max_shard_size: str = "5GB"
    """Largest file of the transformer's weights, such as 5GB or 500MB."""


@dataclass
class ExtractConfig(PathSettings):
    """Makes a LoRA of the difference between a fine-tuned model and its base."""

    GROUPS: ClassVar[Groups] = {
        "models": ("checkpoint_dir", "finetuned_path"),
        "LoRA": ("output_dir", "rank", "dtype"),
        "speed": ("device",),
    }

    checkpoint_dir: str
    """Checkpoint directory of the base model, in the released layout."""
    finetuned_path: str
    """Fine-tuned transformer: its folder, the experiment that trained it, or a checkpoint directory; path or URL."""
    output_dir: str
    """New directory to write, a path or a URL."""
    rank: int = 64
    """Rank of the LoRA."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "auto"
    """Device to compute on: auto, cpu or cuda."""


@dataclass
class MixConfig(PathSettings):
    """Makes one LoRA of the weighted sum of several."""

    GROUPS: ClassVar[Groups] = {
        "LoRAs": ("lora_path", "lora_weight"),
        "the mixture": ("output_dir", "rank", "dtype"),
    }

    lora_path: str
    """LoRAs, training checkpoints or experiments, paths or URLs with commas between them."""
    output_dir: str
    """New directory to write, a path or a URL."""
    lora_weight: str | None = None
    """Weight of each LoRA, with commas between them; none is 1 for all."""
    rank: int | None = None
    """Largest rank of the result; none adds the ranks up, which is exact."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
