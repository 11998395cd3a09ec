"""Settings of the jobs that make music and measure it, and of the quickstart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from acestep_ray.config.groups import Groups
from acestep_ray.config.paths import PathSettings


@dataclass
class GenerateConfig(PathSettings):
    """Makes music from a prompt and lyrics, or from a file of many."""

    GROUPS: ClassVar[Groups] = {
        "model and LoRA": ("checkpoint_dir", "transformer_path", "lora_path", "lora_weight"),
        "one song, or several seeds of it": (
            "output_path",
            "prompt",
            "lyrics",
            "language",
            "keep_unknown_lyrics",
            "duration",
            "seed",
            "speaker_emb_path",
        ),
        "many songs": ("batch_path", "output_dir", "format", "workers", "batch_size"),
        "sampler": ("infer_steps", "scheduler", "guidance_scale", "omega", "shift"),
        "precision and speed": ("precision", "device", "overlapped_decode"),
    }

    checkpoint_dir: str
    """Checkpoint directory of the base model, in the released layout."""
    output_path: str | None = None
    """Audio file to write (.wav, .flac, .ogg or .mp3), of several seeds NAME-seedN; its mel picture lies beside it as
    .png."""
    batch_path: str | None = None
    """Instead of `output_path`: a JSON-lines file with a song a line, which may set prompt, lyrics, language, duration,
    seed, infer_steps, guidance_scale, scheduler, omega, shift, speaker_emb_path, name; flags are its defaults."""
    output_dir: str | None = None
    """With `batch_path`: folder of the songs and of `results.jsonl`, a path or a URL; a rerun makes what is missing."""
    format: str | None = None
    """With `batch_path`: wav, flac, ogg or mp3; none is wav."""
    workers: int | None = None
    """With `batch_path`: models loaded on the cluster; none is one a GPU, or one a node where there are no GPUs."""
    batch_size: int = 1
    """Songs, of one length and sampled alike, that go through the transformer together."""
    transformer_path: str | None = None
    """Fine-tuned transformer to take instead of the checkpoint's: the folder that training all weights wrote."""
    prompt: str = ""
    """Tags or a description of the music, or a path to a text file that holds them."""
    lyrics: str = ""
    """The lyrics, or a path to a text file that holds them (.txt, .lrc, .srt, …); `\\n` is read as a line end."""
    language: str | None = None
    """Language of all lyrics: a code or an English name (en, German, …); none detects it line by line."""
    keep_unknown_lyrics: bool = False
    """Sing lyrics of which more than half is unknown to the model, such as Thai; else they are an error."""
    duration: float = 60.0
    """Length in seconds, at most 240."""
    seed: int | str | list[int] = 0
    """Same seed, same music; several with commas between them make a song each."""
    infer_steps: int = 60
    """Steps of the sampler."""
    scheduler: str = "euler"
    """euler, heun (of second order: twice the work a step) or pingpong (fresh noise in every step)."""
    guidance_scale: float = 15.0
    """Strength of the guidance; 1 turns it off."""
    omega: float = 10.0
    """Granularity of the sampler's steps; pingpong has none."""
    shift: float = 3.0
    """Shift of the noise schedule."""
    lora_path: str | None = None
    """LoRA of any known form, training checkpoint or experiment; several with commas between them."""
    lora_weight: float | str | None = None
    """Strength of each LoRA, with commas between them; none is 1 for all."""
    speaker_emb_path: str | None = None
    """Speaker embedding (.pt, .npy or .safetensors with 512 floats)."""
    overlapped_decode: bool | None = None
    """Decode in overlapping windows, which bounds the memory of long songs; none does where it would not suffice."""
    precision: str = "auto"
    """Precision of the transformer: 32, or bf16, which is several times as fast on a GPU (auto there)."""
    device: str = "auto"
    """Device to run on: auto, cpu or cuda."""


@dataclass
class EvaluateConfig(PathSettings):
    """Measures how good models are and compares them: losses, distances from real music, and a page to listen to."""

    GROUPS: ClassVar[Groups] = {
        "models": ("checkpoint_dir", "models", "lora_weight", "checkpoint"),
        "songs and music": (
            "dataset_path",
            "val_songs",
            "songs",
            "keep_unknown_lyrics",
            "generated_dir",
            "reference_dir",
            "training_dir",
        ),
        "clips": ("duration", "infer_steps", "guidance_scale", "omega", "shift", "seed"),
        "results and tracking": (
            "output_dir",
            "logger_dir",
            "tracking_uri",
            "tracking_experiment",
            "restore_experiment",
        ),
        "precision and speed": ("precision", "device"),
    }

    checkpoint_dir: str
    """Checkpoint directory of the base model, with the SSL encoders, in the released layout."""
    output_dir: str
    """New directory to write."""
    models: str | None = None
    """`base`, LoRAs, training checkpoints, experiments and fine-tuned transformers, with commas between them."""
    lora_weight: str | None = None
    """Strength of each model's LoRA, with commas between them; none is 1 for all."""
    checkpoint: str = "last"
    """Of experiments: last, best (the lowest validation loss), or a step."""
    dataset_path: str | None = None
    """Feature cache with the songs whose loss is measured, and whose prompts and lyrics the models sing anew."""
    val_songs: int | None = None
    """Recordings that training held out of that cache (its --val_songs); none asks the experiments among the models."""
    generated_dir: str | None = None
    """Score the audio in this folder, or of each of its subfolders as a model, instead of generating any."""
    reference_dir: str | None = None
    """Folder of audio, the music that the models are to come near; none leaves the Fréchet distance out."""
    training_dir: str | None = None
    """Folder of audio, the songs trained on, that may not be repeated; none takes `reference_dir`."""
    songs: int = 8
    """Songs to measure on."""
    keep_unknown_lyrics: bool = False
    """Measure on songs with lyrics of which more than half is unknown to the model too; else they are an error."""
    duration: float = 30.0
    """Seconds of each generated clip, at most 240."""
    infer_steps: int = 60
    """Steps of the sampler."""
    guidance_scale: float = 15.0
    """Strength of the guidance; 1 turns it off."""
    omega: float = 10.0
    """Granularity of the sampler's steps."""
    shift: float = 3.0
    """Shift of the noise schedule."""
    seed: int = 0
    """Chooses the noise that each song is made from, the same for all models."""
    logger_dir: str = "./exps/logs/"
    """Folder of MLflow's database, where `tracking_uri` names no other."""
    tracking_uri: str | None = None
    """MLflow server or database; the default is a SQLite file in LOGGER_DIR. `none` turns MLflow off."""
    tracking_experiment: str = "acestep-ray evaluate"
    """MLflow's experiment, in which the run is shown."""
    restore_experiment: bool = False
    """Where MLflow's experiment, or this run in it, was deleted in MLflow's page: restore it and continue the run."""
    precision: str = "auto"
    """Precision of the transformer: 32, or bf16 (auto on a GPU)."""
    device: str = "auto"
    """Device to run on: auto, cpu or cuda."""


@dataclass
class QuickstartConfig(PathSettings):
    """The whole road once: songs, dataset, cache, LoRA, music."""

    GROUPS: ClassVar[Groups] = {
        "songs and model": ("songs", "checkpoint_dir", "output_dir"),
        "run": ("max_steps", "device", "seed"),
    }

    songs: str | None = None
    """Folder of your songs; none makes a few demonstration songs."""
    output_dir: str = "./quickstart"
    """Where everything is written."""
    checkpoint_dir: str | None = None
    """Checkpoint to train on; none writes a tiny one with random weights."""
    max_steps: int = 60
    """Training steps."""
    device: str = "auto"
    """Device to run on: auto, cpu or cuda."""
    seed: int = 0
    """Seed of the run."""
