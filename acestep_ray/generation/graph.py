"""The stages of a batch as Ray Data runs them: groups of songs ─▶ make (actors) ─▶ write (tasks) ─▶ outcomes.

Actors hold the models, one a GPU; encoding mp3 takes a CPU longer than the song took the GPU, so others do it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from acestep_ray.cache.attempts import MAX_ATTEMPTS, Attempts, counted, holders_ended, join_run
from acestep_ray.errors import InputError
from acestep_ray.generation.audio import Sound
from acestep_ray.generation.records import Recipe, write_song
from acestep_ray.generation.song import Song
from acestep_ray.ray_runtime import beside_driver, wait_for_first_node
from acestep_ray.storage import DiskFullError, Store
from acestep_ray.terminal import is_verbose

if TYPE_CHECKING:
    # Imported where it is used: the workers that only write need no models, whose libraries load for seconds.
    from acestep_ray.generation.models import ModelChoice, MusicModels

_WRITE_CPUS = 0.5
_CPUS_PER_GPU = 1
# One group is made while the next waits; more would wait for one actor where another has nothing to do.
_GROUPS_PER_ACTOR = 2


@dataclass(frozen=True)
class ModelPool:
    """Actors that hold the models, and what each reserves."""

    device: str
    actors: int
    num_cpus: float
    """On a CPU also the number of threads, at least one."""
    num_gpus: float


@dataclass(frozen=True)
class Outcome:
    """What became of a song."""

    name: str
    seconds: float | None
    """Length of the audio that was written; None for a song that failed."""
    error: str | None


def choose_pool(device: str, workers: int | None) -> ModelPool:
    """`workers` actors, or one a GPU, or one a node where there are no GPUs (or `device` is cpu).

    Raises InputError where the cluster has no place for them.
    """
    wait_for_first_node(device)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cores = [node["CPU"] for node in nodes if node.get("CPU")]
    if not cores:
        raise InputError("the Ray cluster has no CPUs", fix="start Ray with --num-cpus 2 or more")
    if device == "cuda" and not gpus:
        raise InputError(
            "--device is cuda, and the Ray cluster has no GPU",
            fix="give --device cpu, or start Ray where torch sees a GPU",
        )
    if gpus and device != "cpu":
        actors = workers or gpus
        return ModelPool("cuda", actors, _CPUS_PER_GPU, num_gpus=1 / -(-actors // gpus))
    actors = workers or len(cores)
    share = min(cores) / -(-actors // len(cores))
    # Whole cores but one, or where that leaves none half of the share: writing needs the rest.
    return ModelPool("cpu", actors, int(share - 1) if share >= 2 else share / 2, num_gpus=0)


def make_songs(
    groups: Sequence[Sequence[Song]], pool: ModelPool, choice: ModelChoice, store: Store, recipe: Recipe
) -> Iterator[Outcome]:
    """Make and write groups of songs that are sampled together; yields what became of each song as it ends."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = is_verbose()
    context.print_on_execution_start = is_verbose()
    context.raise_original_map_exception = True
    # Every song is a block of its own, which is written without waiting for others.
    context.target_max_block_size = 1
    attempts = beside_driver(Attempts).remote()
    with holders_ended(attempts), DataContext.current(context):
        lists = [json.dumps([asdict(song) for song in group]) for group in groups]
        dataset: ray.data.Dataset = ray.data.from_blocks([pa.table({"songs": [songs]}) for songs in lists])
        dataset = dataset.map_batches(
            Maker,
            fn_constructor_args=(choice, attempts, max(1, int(pool.num_cpus))),
            compute=ActorPoolStrategy(
                size=min(pool.actors, len(groups)), max_tasks_in_flight_per_actor=_GROUPS_PER_ACTOR
            ),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
            batch_size=1,
            batch_format="pyarrow",
        )
        dataset = dataset.map_batches(
            partial(_write, store=store, recipe=recipe),
            num_cpus=_WRITE_CPUS,
            batch_size=1,
            batch_format="pyarrow",
        )
        batches: Iterable[pa.Table] = dataset.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        )
        for outcomes in batches:
            for outcome in outcomes.to_pylist():
                yield Outcome(**outcome)


class Maker:
    """Makes groups of songs on an actor that keeps the models. A song that fails fails alone."""

    def __init__(self, choice: ModelChoice, attempts: Any, threads: int):
        self.choice = choice
        self.attempts = attempts
        self.models: MusicModels | None = None
        join_run(attempts)
        if choice.device == "cpu":
            import torch

            torch.set_num_threads(threads)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """`songs`, a list of them → a table for each with its sound, or with what is wrong."""
        if self.models is None:
            # Not when the actor starts: Ray would start it again and again.
            from acestep_ray.generation.models import MusicModels

            self.models = MusicModels.load(self.choice)
        songs = [Song(**values) for values in json.loads(batch["songs"][0].as_py())]
        for song, made in zip(songs, make_unless_fatal(self.models, self.attempts, songs), strict=True):
            sound = made if isinstance(made, Sound) else None
            yield pa.table(
                {
                    "song": [json.dumps(asdict(song))],
                    "wave": pa.array([sound and sound.waveform.tobytes()], pa.large_binary()),
                    "overlapped": pa.array([sound and sound.overlapped], pa.bool_()),
                    "error": pa.array([None if sound else made], pa.string()),
                }
            )


def make_unless_fatal(models: MusicModels, attempts: Any, songs: Sequence[Song]) -> list[Sound | str]:
    """As `make_each`; a song that has ended its process several times is not begun again."""
    with counted(attempts, "make together", [song.name for song in songs]) as attempt:
        if attempt == 1:
            return make_each(models, songs)
        made: list[Sound | str] = []
        for song in songs:
            with counted(attempts, "make", [song.name]) as attempt_at_song:
                if attempt_at_song >= MAX_ATTEMPTS:
                    made.append(f"making it has ended its process {MAX_ATTEMPTS} times (out of memory?)")
                else:
                    made += make_each(models, [song])
        return made


def make_each(models: MusicModels, songs: Sequence[Song]) -> list[Sound | str]:
    """The sound of each song, or what is wrong with it."""
    try:
        return [*models.make(songs)]
    except Exception as error:
        if len(songs) == 1:
            return [_told(error)]
    # Not in the clause above, where the error still holds the tensors.
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [made for song in songs for made in make_each(models, [song])]


def _write(batch: pa.Table, store: Store, recipe: Recipe) -> pa.Table:
    """Songs with their sound to files; what is left are their outcomes."""
    outcomes = []
    for row in range(len(batch)):
        song = Song(**json.loads(batch["song"][row].as_py()))
        seconds, error = None, batch["error"][row].as_py()
        if error is None:
            wave = np.frombuffer(batch["wave"][row].as_buffer(), np.float32).reshape(2, -1)
            sound = Sound(wave, batch["overlapped"][row].as_py())
            try:
                seconds = write_song(store, song, sound, recipe)
            except Exception as failure:  # a full disk, storage that denies: the others may still be written
                error = _told(failure)
        outcomes.append(asdict(Outcome(song.name, seconds, error)))
    schema = pa.schema([("name", pa.string()), ("seconds", pa.float64()), ("error", pa.string())])
    return pa.Table.from_pylist(outcomes, schema=schema)


def _told(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, DiskFullError) else f"{type(error).__name__}: {text}"
