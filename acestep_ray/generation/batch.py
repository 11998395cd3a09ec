"""Many songs of a JSON-lines file, made on a Ray cluster: what is there already is kept, a song that fails fails alone.

`songs` reads the file, `graph` spreads the work, `records` are the files that come out.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from acestep_ray.config import GenerateConfig
from acestep_ray.data.lyrics import LyricTokenizer
from acestep_ray.errors import InputError
from acestep_ray.generation.audio import SUBTYPES
from acestep_ray.generation.graph import Outcome, choose_pool, make_songs
from acestep_ray.generation.models import ModelChoice, choose_models, is_bfloat16
from acestep_ray.generation.records import Recipe, find_made
from acestep_ray.generation.requests import Request, check_lyrics, songs_of_file
from acestep_ray.generation.song import Song, together
from acestep_ray.hints import one_of
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.ray_runtime import connect, faults_explained
from acestep_ray.storage import DiskFullError, StorageError, Store, only_writer
from acestep_ray.terminal import Progress, fact_table

RESULTS = "results.jsonl"
"""A row for every song, in the order of the requests."""

DEFAULT_FORMAT = "wav"
_LISTED = 10


@dataclass(frozen=True)
class BatchSummary:
    """What became of a batch."""

    output: str
    """The folder: a path or a URL."""
    outcomes: list[Outcome]
    """Of every song, in the order of the requests."""
    unchanged: int
    """Songs that an earlier run had made."""
    wall_seconds: float

    @property
    def failed(self) -> list[Outcome]:
        """Songs that could not be made."""
        return [outcome for outcome in self.outcomes if outcome.error is not None]

    @property
    def unfinished(self) -> str | None:
        """What is left to do, for which the command's exit code is 1; None where all songs are there."""
        if not self.failed:
            return None
        return f"{len(self.failed)} of {len(self.outcomes)} songs failed\n  → the same command makes what is missing"

    def render(self) -> str:
        """The summary as text."""
        made = len(self.outcomes) - self.unchanged - len(self.failed)
        seconds = sum(outcome.seconds or 0 for outcome in self.outcomes)
        failed = [f"{outcome.name}: {outcome.error}" for outcome in self.failed[:_LISTED]]
        if len(self.failed) > _LISTED:
            failed.append(f"… the others are in {RESULTS}")
        return fact_table(
            [
                ("songs", self.output),
                (
                    "all",
                    f"{len(self.outcomes)} = {made} made + {self.unchanged} unchanged + {len(self.failed)} failed",
                ),
                ("music", f"{seconds:,.1f} s"),
                *(("failed", told) for told in failed),
                ("took", f"{self.wall_seconds:,.1f} s"),
            ]
        )


def generate_batch(config: GenerateConfig) -> BatchSummary:
    """Make the songs of `--batch_path` that are not in `--output_dir` yet.

    Raises InputError for a mistake in the settings or the file, before anything is made; AceStepError where a worker
    fails for another reason than its song.
    """
    started = time.monotonic()
    path, output_dir = check_batch(config)
    checkpoint = CheckpointDir.open(config.checkpoint_dir)
    request = songs_of_file(path, config, checkpoint.transformer_config.speaker_embedding_dim)
    tokenizer = LyricTokenizer.from_file(checkpoint.lyric_vocab_path())
    request = check_lyrics(request, tokenizer, config.keep_unknown_lyrics, where=f"--batch_path {path}")
    choice = choose_models(config, checkpoint)
    store = claim_output(output_dir, path)
    with only_writer(store, f"--output_dir {output_dir}"):
        return _make_missing(store, request, choice, checkpoint, config, started)


def _make_missing(
    store: Store,
    request: Request,
    choice: ModelChoice,
    checkpoint: CheckpointDir,
    config: GenerateConfig,
    started: float,
) -> BatchSummary:
    """Make the songs that are not there. Only for the one writer of the folder."""
    request.show_warnings()
    connect()
    pool = choose_pool(config.device, config.workers)
    bfloat16 = is_bfloat16(config.precision, on_gpu=pool.device == "cuda")
    choice = replace(choice, device=pool.device, precision="bf16" if bfloat16 else "32")
    recipe = Recipe.of(choice, checkpoint, config.format or DEFAULT_FORMAT)
    made = find_made(store, request.songs, recipe)
    outcomes = {name: Outcome(name, seconds, None) for name, seconds in made.items()}
    groups = together([song for song in request.songs if song.name not in made], config.batch_size)
    # The longest first: at the end no one waits for a worker that began one late.
    groups.sort(key=lambda group: -len(group) * group[0].frames * group[0].infer_steps)
    if groups:
        progress = Progress("generating", len(request.songs), "songs")
        with faults_explained("generate", "made"), progress:
            for outcome in make_songs(groups, pool, choice, store, recipe):
                outcomes[outcome.name] = outcome
                if outcome.error is not None:
                    progress.say(f"failed: {outcome.name}")
                progress.update(len(outcomes))
    write_results(store, request.songs, outcomes, recipe)
    return BatchSummary(
        output=store.url,
        outcomes=[outcomes[song.name] for song in request.songs],
        unchanged=len(made),
        wall_seconds=time.monotonic() - started,
    )


def check_batch(config: GenerateConfig) -> tuple[Path, str]:
    """The file of the songs and the output folder. Raises InputError for flags that cannot be used together."""
    if config.output_path is not None:
        raise InputError(
            "many songs are written to a folder",
            where=f"--output_path {config.output_path}",
            fix="give --output_dir",
        )
    if config.batch_path is None or config.output_dir is None:
        raise InputError("no folder for the songs of --batch_path", where="--output_dir", fix="give one")
    if config.format is not None and config.format not in SUBTYPES:
        raise InputError(
            "unknown format", where=f"--format {config.format}", fix=one_of(config.format, SUBTYPES)
        )
    if config.workers is not None and config.workers < 1:
        raise InputError("must be at least 1", where=f"--workers {config.workers}")
    return Path(config.batch_path), config.output_dir


def claim_output(output_dir: str, requests: Path) -> Store:
    """The output folder. Raises InputError where it cannot be written to, or the results would replace the requests."""
    store = Store.at(output_dir)
    if store.is_local and (store.path / RESULTS).resolve() == requests.resolve():
        raise InputError(
            f"{RESULTS} of the output folder would replace the requests",
            where=f"--batch_path {requests}",
            fix="give another --output_dir",
        )
    probe = f".writable-{uuid.uuid4().hex}"
    try:
        store.write_bytes(probe, b"")
        store.delete([probe])
    except DiskFullError:
        raise
    except (OSError, StorageError) as error:
        raise InputError(f"cannot write here ({error})", where=f"--output_dir {output_dir}") from None
    return store


def write_results(store: Store, songs: Sequence[Song], outcomes: dict[str, Outcome], recipe: Recipe) -> None:
    """Write a row for every song: line of its request, name, file, seed, seconds and error."""
    rows = []
    for song in songs:
        outcome = outcomes[song.name]
        row = {
            "line": song.line,
            "name": song.name,
            "file": recipe.file(song) if outcome.error is None else None,
            "seed": song.seed,
            "seconds": outcome.seconds,
            "error": outcome.error,
        }
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    store.write_bytes(RESULTS, "".join(rows).encode())
