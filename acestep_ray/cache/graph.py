"""The stages of precompute as Ray Data runs them: tables in, tables out, over `decoding`, `encoding` and `parts`.

    lists of songs ─▶ plan ─▶ decode ─▶ encode ─▶ store ─▶ receipts
                     (tasks)  (tasks)   (actors)  (tasks)

Every table that a stage yields is a block of its own, and a block of decoded songs is a batch of the encoders.

Ray Data's driver works some milliseconds for every task and every block. So tasks of many songs take several batches
each, as many as leave all workers busy: else a driver could feed only a few GPUs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypedDict, cast

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

from acestep_ray.cache.attempts import MAX_ATTEMPTS, Attempts, counted, holders_ended, join_run
from acestep_ray.cache.decoding import decode_song, file_versions
from acestep_ray.cache.parts import store_rejects, store_rows
from acestep_ray.cache.schema import INCOMING, LEDGER_SCHEMA, SAMPLE_SCHEMA
from acestep_ray.cache.songs import DecodedSong, Recipe, Reject, Settings, Song, build_row
from acestep_ray.cache.transport import (
    as_one_row,
    decoded_table,
    from_one_row,
    plain_faults,
    read_decoded,
)
from acestep_ray.data.audio import MIN_SECONDS, SAMPLE_RATE, probe_seconds
from acestep_ray.data.file_names import locate_file
from acestep_ray.data.schema import RejectReason
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.ray_runtime import beside_driver, cluster_cpus, nodes_with, share_of
from acestep_ray.storage import Store
from acestep_ray.terminal import is_verbose

if TYPE_CHECKING:
    from acestep_ray.cache.encoding import Encoder


class _Batches(TypedDict):
    """What a stage is handed at a time."""

    batch_size: int
    batch_format: str


class _Shared(TypedDict):
    """What planning and decoding both need."""

    root: Store
    recipe: Recipe
    budget: float


LATENT_FRAMES_PER_SECOND = 44_100 / 512 / 8

_PLAN_CPUS = 0.25
_DECODE_CPUS = 1.0
_STORE_CPUS = 0.25
# Small tasks could be several on every core, each in a process that takes seconds of a core to start.
_CPUS_PER_PLAN, _CPUS_PER_STORE = 8, 4
# Where no node has more cores than a few, so that every stage finds a place beside the encoders.
_FEW_CPUS, _DECODE_CPUS_OF_FEW = 4, 0.4
_SONGS_PER_LIST = 128
# Batches of a task that decodes or encodes, where songs are so many that each core gets this many tasks all the same.
_BATCHES_PER_TASK, _TASKS_PER_CPU = 8, 16
# Of the object store, for batches that wait for an encoder: two tasks are on their way to each.
_WAITING_SHARE, _TASKS_PER_ENCODER, _BYTES_PER_SECOND = 0.25, 2, SAMPLE_RATE * 2 * 4
# Batches that share a stored file, about 64 MB; few songs get one each: little is lost when the run is killed.
_BATCHES_PER_FILE, _FEW_SONGS = 8, 64
_TYPICAL_BITRATES = {".wav": 1_411_000, ".aiff": 1_411_000, ".aif": 1_411_000, ".flac": 900_000}
_TYPICAL_BITRATE = 160_000
# Where GPUs are asked for, Ray Data wants a number of rows: a batch of songs is one row.
_BY_BLOCK: _Batches = {"batch_size": 1, "batch_format": "pyarrow"}
_COLUMNS = {
    "latents": ("latents", "latent_frames"),
    "text": ("prompts", "text_embeddings", "text_dim", "lyric_ids", "lyric_languages"),
    "ssl": ("ssl",),
}


@dataclass(frozen=True)
class EncoderPool:
    """Actors that hold the models of some groups of features, and what each reserves."""

    features: tuple[str, ...]
    device: str
    actors: int
    num_cpus: float
    """On a CPU also the number of threads, at least one."""
    num_gpus: float
    resource: str | None = None
    """Custom resource of the nodes that they lie on; none for any."""


@dataclass(frozen=True)
class Graph:
    """Everything that the stages need to know."""

    root: Store
    """File names of songs are relative to it."""
    cache: Store
    checkpoint_dir: str
    recipe: Recipe
    pools: list[EncoderPool]
    """One stage of encoders each."""
    batch_frames: int
    """Latent frames of a batch, padding included."""
    decode_workers: int | None
    decode_resource: str | None = None
    """Custom resource of the nodes that decode; none for any."""

    @property
    def budget(self) -> float:
        """Seconds of a batch, padding included."""
        return self.batch_frames / LATENT_FRAMES_PER_SECOND

    def run(self, songs: Iterable[Song], count: int) -> Iterator[tuple[pa.Table, list[Reject]]]:
        """Plan, decode, encode and store `count` songs; yields the ledger and the rejects of some, as they end."""
        with holders_ended(self.attempts), DataContext.current(self.context()):
            dataset = self._stored(self.decoded(songs, count), count)
            for receipts in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for receipt in cast(pa.Table, receipts).to_pylist():
                    yield (
                        pa.Table.from_pylist(json.loads(receipt["ledger"]), schema=LEDGER_SCHEMA),
                        [Reject(**values) for values in json.loads(receipt["rejects"])],
                    )

    def context(self) -> DataContext:
        """Ray Data's settings while the graph is made and runs."""
        context = DataContext.get_current().copy()
        context.enable_progress_bars = is_verbose()
        context.print_on_execution_start = is_verbose()
        context.raise_original_map_exception = True
        # Every table that a stage yields is a block of its own, so that no song waits for another.
        context.target_max_block_size = 1
        return context

    def decoded(self, songs: Iterable[Song], count: int) -> ray.data.Dataset:
        """Batches of decoded songs, a block each; to be made and run within `context`."""
        cpus = cluster_cpus()
        # Short lists let a small dataset spread over the cluster, and a large one needs no million of them.
        lists = self._write_lists(songs, min(_SONGS_PER_LIST, -(-count // int(4 * cpus))))
        shared: _Shared = {"root": self.root, "recipe": self.recipe, "budget": self.budget}
        dataset: ray.data.Dataset = ray.data.from_blocks([pa.table({"list": [name]}) for name in lists])
        dataset = dataset.map_batches(
            partial(_plan, cache=self.cache, per_task=batches_per_task(count, cpus), **shared),
            num_cpus=_PLAN_CPUS,
            compute=TaskPoolStrategy(size=-(-int(cpus) // _CPUS_PER_PLAN)),
            **_BY_BLOCK,
        )
        nodes = nodes_with(self.decode_resource, "--decode_resource")
        return dataset.map_batches(
            partial(_decode, attempts=self.attempts, **shared),
            num_cpus=decode_cpus([node["Resources"] for node in nodes]),
            compute=TaskPoolStrategy(size=self.decode_workers),
            resources=share_of(self.decode_resource),
            **_BY_BLOCK,
        )

    def _stored(self, dataset: ray.data.Dataset, count: int) -> ray.data.Dataset:
        together = 1
        for pool in self.pools:
            is_last = pool is self.pools[-1]
            # What one pool hands to the next has the audio still in it, and stays in small blocks.
            together = self._encoded_together(pool, count) if is_last else 1
            dataset = dataset.map_batches(
                _Encode,  # type: ignore[arg-type]  # Ray's type knows no more arguments, which `fn_kwargs` gives
                fn_constructor_args=(self.checkpoint_dir, self.recipe, pool, self.attempts),
                fn_kwargs={"keep_wave": not is_last},
                compute=ActorPoolStrategy(size=min(pool.actors, count)),
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
                resources=share_of(pool.resource),
                # A byte, as a difference to decoding: Ray Data makes one stage of two that reserve the same.
                memory=1,
                batch_size=together,
                batch_format="pyarrow",
            )
        return dataset.map_batches(
            partial(_store, cache=self.cache, recipe=self.recipe),
            batch_size=1 if count < _FEW_SONGS else max(1, _BATCHES_PER_FILE // together),
            batch_format="pyarrow",
            num_cpus=_STORE_CPUS,
            compute=TaskPoolStrategy(size=-(-int(cluster_cpus()) // _CPUS_PER_STORE)),
        )

    def _encoded_together(self, pool: EncoderPool, count: int) -> int:
        """Batches of a task of this pool; those that wait for it lie in the object store, decoded."""
        room = ray.cluster_resources().get("object_store_memory", 0) * _WAITING_SHARE
        waiting = pool.actors * _TASKS_PER_ENCODER * self.budget * _BYTES_PER_SECOND
        return max(1, min(batches_per_task(count, cluster_cpus()), int(room / waiting)))

    @cached_property
    def attempts(self) -> Any:
        """The actor that counts attempts, of this run."""
        return beside_driver(Attempts).remote()

    def _write_lists(self, songs: Iterable[Song], per_list: int) -> list[str]:
        """Write lists of songs beside the cache, for any worker to read: they need not fit in memory."""
        names: list[str] = []
        left = iter(songs)
        while some := list(islice(left, per_list)):
            names.append(f"{INCOMING}/songs/{len(names):06d}.json")
            self.cache.write_bytes(names[-1], json.dumps([asdict(song) for song in some]).encode())
        return names


def batches_per_task(count: int, cpus: float) -> int:
    """Batches that a task takes of `count` songs: one, as long as every core would get few tasks."""
    return max(1, min(_BATCHES_PER_TASK, int(count / (_TASKS_PER_CPU * cpus))))


def decode_cpus(nodes: Sequence[Mapping[str, float]]) -> float:
    """What decoding a song reserves on these nodes, given the resources of each; it has to fit beside an encoder."""
    most = max(node.get("CPU", 0) for node in nodes)
    return _DECODE_CPUS if most >= _FEW_CPUS else _DECODE_CPUS_OF_FEW


def _plan(
    batch: pa.Table, cache: Store, root: Store, recipe: Recipe, budget: float, per_task: int
) -> Iterator[pa.Table]:
    """`list`, the name of a list of songs → tables with `per_task` groups of songs each, for `_decode`."""
    for name in batch["list"].to_pylist():
        songs = [Song(**values) for values in json.loads(cache.read_bytes(name))]
        planned = [(estimate_seconds(root, song, recipe.settings), song) for song in songs]
        groups = iter(group_by_length(planned, budget))
        while some := list(islice(groups, per_task)):
            yield pa.table({"groups": [json.dumps([[asdict(song) for song in group] for group in some])]})


def estimate_seconds(root: Store, song: Song, settings: Settings) -> float:
    """About how much audio the song will give, at most; a guess is good enough to form batches by."""
    longest = math.inf if settings.window == "all" else settings.window_seconds
    try:
        file = locate_file(root, song.filename)
        if file.local_path is not None:
            seconds = probe_seconds(file)
        else:  # a header costs as much as the file
            status = file.status()
            bitrate = _TYPICAL_BITRATES.get(file.suffix, _TYPICAL_BITRATE)
            seconds = status.size * 8 / bitrate if status else None
    except (InputError, AceStepError, OSError):
        seconds = None  # decoding says why
    return max(MIN_SECONDS, min(seconds if seconds is not None else settings.window_seconds, longest))


def group_by_length(songs: Iterable[tuple[float, Song]], budget: float) -> list[list[Song]]:
    """Songs, each with its seconds, in groups of nearly equal length that, padded to the longest, stay within `budget`.

    A song over the budget is alone in its group.
    """
    groups: list[list[Song]] = []
    longest = 0.0
    for seconds, song in sorted(songs, key=lambda entry: (-entry[0], entry[1].key)):
        # The first song of a group is its longest; half its length is not nearly equal any more.
        if groups and (len(groups[-1]) + 1) * longest <= budget and seconds >= longest / 2:
            groups[-1].append(song)
        else:
            groups.append([song])
            longest = seconds
    return groups


def _decode(batch: pa.Table, root: Store, recipe: Recipe, budget: float, attempts: Any) -> Iterator[pa.Table]:
    """Groups of songs → tables of at most `budget` seconds with a row for each window: decoded, or a receipt.

    Each table is of one group, and is there as soon as it is decoded.
    """
    for group in (group for groups in batch["groups"].to_pylist() for group in json.loads(groups)):
        waiting: list[DecodedSong | Reject] = []
        for song in (Song(**values) for values in group):
            for outcome in _decode_one(root, song, recipe, attempts):
                if _padded_seconds([*waiting, outcome]) > budget and waiting:
                    yield as_one_row(decoded_table(waiting))
                    waiting = []
                waiting.append(outcome)
        if waiting:
            yield as_one_row(decoded_table(waiting))


def _decode_one(root: Store, song: Song, recipe: Recipe, attempts: Any) -> Iterator[DecodedSong | Reject]:
    versions = file_versions(root, song)
    with plain_faults(song.key), counted(attempts, "decode", [song.key]) as attempt:
        if attempt > MAX_ATTEMPTS:
            reason = RejectReason.CORRUPT
            yield Reject(
                key=song.key,
                filename=song.filename,
                stage=reason.stage,
                reason=reason.value,
                message=f"reading the file has ended its process {MAX_ATTEMPTS} times",
                song_key=song.key,
                fingerprint=recipe.reject_fingerprint(song, versions),
                audio_version=versions.audio,
            )
        else:
            yield from decode_song(root, song, recipe, versions)


def _padded_seconds(outcomes: Sequence[DecodedSong | Reject]) -> float:
    lengths = [
        outcome.wave.shape[1] / SAMPLE_RATE for outcome in outcomes if isinstance(outcome, DecodedSong)
    ]
    return len(lengths) * max(lengths, default=0.0)


class _Encode:
    """Batches of decoded songs, on an actor that keeps some models → the same with the columns that those give."""

    def __init__(self, checkpoint_dir: str, recipe: Recipe, pool: EncoderPool, attempts: Any):
        self.checkpoint_dir = checkpoint_dir
        self.recipe = recipe
        self.pool = pool
        self.attempts = attempts
        self.name = f"encode {'+'.join(pool.features)}"
        self.encoder: Encoder | None = None
        join_run(attempts)
        if pool.device == "cpu":
            import torch  # the other stages, whose module this is too, do without

            torch.set_num_threads(max(1, int(pool.num_cpus)))

    def __call__(self, batch: pa.Table, keep_wave: bool) -> pa.Table:
        encoded = [self._encode_batch(from_one_row(batch, row), keep_wave) for row in range(len(batch))]
        return as_one_row(pa.concat_tables(encoded))

    def _encode_batch(self, songs: pa.Table, keep_wave: bool) -> pa.Table:
        rejects = songs["reject"].to_pylist()
        places = [row for row, reject in enumerate(rejects) if reject is None]
        columns: list[dict[str, Any]] = [{} for _ in rejects]
        if places:
            decoded = [read_decoded(songs, row) for row in places]
            for row, outcome in zip(places, self._encode(decoded), strict=True):
                if isinstance(outcome, Reject):
                    rejects[row] = json.dumps(asdict(outcome))
                else:
                    columns[row] = outcome
        place = songs.column_names.index("reject")
        songs = songs.set_column(place, "reject", pa.array(rejects, pa.string()))
        for name in (name for group in self.pool.features for name in _COLUMNS[group]):
            kind = SAMPLE_SCHEMA.field(name).type
            songs = songs.append_column(name, pa.array([values.get(name) for values in columns], kind))
        # 92 MB a song that nobody needs any more.
        return songs if keep_wave else songs.drop_columns("wave")

    def _encode(self, songs: list[DecodedSong]) -> list[dict[str, Any] | Reject]:
        keys = [song.key for song in songs]
        with plain_faults(keys[0]), counted(self.attempts, self.name, keys) as attempt:
            if attempt > MAX_ATTEMPTS:
                raise RuntimeError(f"encoding has ended its process {MAX_ATTEMPTS} times (out of memory?)")
            if attempt > 1:  # whichever song it was, it shall not take the others with it again
                return [outcome for song in songs for outcome in self._models().encode([song])]
            return self._models().encode(songs)

    def _models(self) -> Encoder:
        # Loaded for the first song that decodes: a rerun that only meets old rejects loads nothing.
        if self.encoder is None:
            from acestep_ray.cache.encoding import Encoder
            from acestep_ray.models.checkpoint import CheckpointDir

            self.encoder = Encoder.load(
                CheckpointDir.open(self.checkpoint_dir), self.recipe, self.pool.device, self.pool.features
            )
        return self.encoder


def _store(batch: pa.Table, cache: Store, recipe: Recipe) -> pa.Table:
    """Batches of encoded songs to a file of the cache; what is left is their ledger and their rejects."""
    rows, rejects = [], []
    for number in range(len(batch)):
        songs = from_one_row(batch, number)
        names = [name for name in songs.column_names if name in SAMPLE_SCHEMA.names and name != "speaker"]
        for row, reject in enumerate(songs["reject"].to_pylist()):
            if reject is None:
                columns = songs.select(names).slice(row, 1).to_pylist()[0]
                rows.append(build_row(read_decoded(songs, row), columns, recipe))
            else:
                rejects.append(Reject(**json.loads(reject)))
    ledger = store_rows(cache, rows) if rows else LEDGER_SCHEMA.empty_table()
    store_rejects(cache, rejects)
    receipt = {
        "ledger": [json.dumps(ledger.to_pylist())],
        "rejects": [json.dumps([asdict(reject) for reject in rejects])],
    }
    return pa.table(receipt)
