"""The whole road once: songs → dataset → feature cache → LoRA → music."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.precompute import PrecomputeSummary, precompute
from acestep_ray.config import GenerateConfig, PrecomputeConfig, PrepareConfig, QuickstartConfig, TrainConfig
from acestep_ray.data.demo import write_demo_songs
from acestep_ray.data.prepare import PrepareSummary, prepare_dataset
from acestep_ray.data.prompts import PROMPT_WITHOUT_TAGS
from acestep_ray.data.schema import open_dataset, row_recaption, row_tags, row_text
from acestep_ray.device import resolve_device
from acestep_ray.errors import InputError
from acestep_ray.generation.job import GenerateSummary, MadeSong, generate
from acestep_ray.paths import shell_command
from acestep_ray.storage import Store, only_writer, output_folder
from acestep_ray.storage.files import written_whole
from acestep_ray.terminal import fact_table, show_summary
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from acestep_ray.training.job import TrainSummary, train
from acestep_ray.training.lora_config import DEFAULT_LORA

# A tiny model with random weights learns nothing of music; a high rate shows within a minute that its loss falls.
LEARNING_RATE = 3e-3
GENERATED_SECONDS = 8.0


@dataclass
class QuickstartSummary:
    """What was made on the way."""

    output: Path
    checkpoint: Path
    tiny: bool
    prepared: PrepareSummary
    cached: PrecomputeSummary
    trained: TrainSummary
    generated: GenerateSummary
    next_command: str
    wall_seconds: float

    def render(self) -> str:
        """The summary as text."""
        reasons = Counter(reject.reason for reject in self.cached.rejects)
        rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
        fixed = list(self.trained.fixed_noise.values())
        rows = [
            ("checkpoint", f"{self.checkpoint}" + (" (tiny, random weights)" if self.tiny else "")),
            ("dataset", f"{self.prepared.output_dir} ({self.prepared.songs} songs)"),
            ("cache", f"{self.cached.output_dir} ({self.cached.samples} songs)"),
            ("rejected", f"{len(self.cached.rejects)} songs: {rejected}" if self.cached.rejects else "none"),
            *(("", f"{reject.key}: {reject.message}") for reject in self.cached.rejects),
            ("LoRA", f"{self.trained.result}"),
            (
                "loss",
                f"{self.trained.first_loss:.4f} → {self.trained.last_loss:.4f} from the first step to step "
                f"{self.trained.steps}; on fixed noise {fixed[0]:.4f} → {fixed[-1]:.4f}",
            ),
            *(
                ("music", f"{song.audio} ({song.seconds:.1f} s), {song.picture.name}")
                for song in self.generated.songs
            ),
            ("took", f"{self.wall_seconds:,.0f} s"),
            ("next", self.next_command),
        ]
        return f"\nquickstart done\n{fact_table(rows)}"


def quickstart(config: QuickstartConfig) -> QuickstartSummary:
    """Run every job once on the demonstration songs, or on the user's. Raises InputError for what cannot be used."""
    output = Path(config.output_dir).resolve()
    with only_writer(Store.at(output), f"--output_dir {config.output_dir}"):
        return _run_jobs(config, output)


def _run_jobs(config: QuickstartConfig, output: Path) -> QuickstartSummary:
    """Run every job. Only for the one writer of the folder."""
    started = time.monotonic()
    device = resolve_device(config.device).type
    songs = song_folder(config, output)

    checkpoint = Path(config.checkpoint_dir or output / "checkpoint")
    tiny = config.checkpoint_dir is None
    if tiny:
        # Tiny tensors gain nothing from threads, and lose a lot where other programs use the same cores.
        torch.set_num_threads(1)
    if tiny and not checkpoint.exists():
        announce("a tiny checkpoint with random weights")
        write_tiny_checkpoint(checkpoint, seed=config.seed)

    announce(f"prepare: {songs} → dataset")
    prepared = prepare_dataset(PrepareConfig(data_dir=str(songs), output_dir=str(output / "dataset")))
    show_summary(prepared.render())

    announce("precompute: dataset → feature cache")
    cache = output / "cache"
    cached = precompute(
        PrecomputeConfig(
            dataset_path=str(output / "dataset"),
            checkpoint_dir=str(checkpoint),
            output_dir=str(cache),
            device=device,
        )
    )
    show_summary(cached.render())

    announce("train: feature cache → LoRA")
    trained = train(train_config(config, output, cache, checkpoint, device))
    show_summary(trained.render())

    announce("generate: prompt and lyrics → music")
    prompt, lyrics = song_conditions(output / "dataset", cache)
    generate_config = GenerateConfig(
        checkpoint_dir=str(checkpoint),
        output_path=str(output / "music.wav"),
        duration=GENERATED_SECONDS,
        lora_path=str(trained.result),
        device=device,
        seed=config.seed,
        infer_steps=30,
        prompt=prompt,
        lyrics=lyrics,
    )
    generated = cast(GenerateSummary, generate(generate_config))  # of one song
    note_music(generated.songs[0], generate_config)
    return QuickstartSummary(
        output=output,
        checkpoint=checkpoint,
        tiny=tiny,
        prepared=prepared,
        cached=cached,
        trained=trained,
        generated=generated,
        next_command=next_command(config, generate_config),
        wall_seconds=time.monotonic() - started,
    )


def announce(text: str) -> None:
    """Say which job begins."""
    print(f"\n── {text}", flush=True)


def song_folder(config: QuickstartConfig, output: Path) -> Path:
    """The user's folder, or a new one with the demonstration songs."""
    if config.songs is not None:
        songs = Path(config.songs)
        if not songs.exists():
            raise InputError(
                "no such folder or file",
                where=f"--songs {songs}",
                fix="give a folder of audio files, a table of songs, or another source that prepare reads",
            )
        return songs
    songs = output / "songs"
    if not songs.exists():
        announce("demonstration songs")
        with output_folder(songs) as folder:
            write_demo_songs(folder, seed=config.seed)
    return songs


def train_config(
    config: QuickstartConfig, output: Path, cache: Path, checkpoint: Path, device: str
) -> TrainConfig:
    """A short run; its name follows the songs, so that other songs are another run."""
    lora_config = output / "lora_config.json"
    with written_whole(lora_config) as file:
        file.write((json.dumps(DEFAULT_LORA, indent=4) + "\n").encode())
    return TrainConfig(
        dataset_path=str(cache),
        checkpoint_dir=str(checkpoint),
        lora_config_path=str(lora_config),
        exp_name=f"quickstart-{CacheIndex.open(cache).fingerprint[:8]}",
        exp_dir=str(output / "exps"),
        logger_dir=str(output / "exps" / "logs"),
        learning_rate=LEARNING_RATE,
        max_steps=config.max_steps,
        precision="bf16-mixed" if device == "cuda" else "32",
        device=device,
        num_workers=2,
        every_n_train_steps=config.max_steps,
        every_plot_step=config.max_steps,
        plot_seconds=GENERATED_SECONDS,
        seed=config.seed,
    )


def song_conditions(dataset: Path, cache: Path) -> tuple[str, str]:
    """Prompt and lyrics of the first song that is in the cache."""
    key = CacheIndex.open(cache).keys[0]
    row = next(row for row in open_dataset(dataset) if row["keys"] == key)
    prompt = ", ".join(row_tags(row)) or next(iter(row_recaption(row).values()), PROMPT_WITHOUT_TAGS)
    return prompt, row_text(row, "norm_lyrics")


def note_music(song: MadeSong, made: GenerateConfig) -> None:
    """Write beside the music what it was made from, as training does for its samples: the report shows it."""
    made_from = {
        "prompt": made.prompt,
        "lyrics": made.lyrics,
        "seed": made.seed,
        "seconds": song.seconds,
        "shift": made.shift,
        "steps": made.infer_steps,
        "guidance_scale": made.guidance_scale,
        "omega": made.omega,
    }
    text = json.dumps(made_from, ensure_ascii=False, indent=1) + "\n"
    with written_whole(song.audio.path.with_suffix(".json")) as file:
        file.write(text.encode())


def next_command(config: QuickstartConfig, made: GenerateConfig) -> str:
    """What a newcomer would type now."""
    if config.songs is None:
        return "make quickstart SONGS=path/to/your/songs"
    return shell_command(
        *("acestep-ray", "generate"),
        *("--checkpoint_dir", made.checkpoint_dir, "--lora_path", made.lora_path),
        *("--prompt", made.prompt, "--output_path", "mine.wav"),
    )
