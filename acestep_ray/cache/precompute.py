"""The `precompute` job: a dataset's songs through the frozen models into the feature cache, once, on Ray.

    dataset rows ─▶ decode (tasks) ─▶ encode (actors, one a GPU) ─▶ store (tasks, a file a song) ─▶ receipts

A stored song survives whatever comes after it: a rerun finds it and computes only what is missing. Once every song is
stored or rejected, the songs are joined into part files, and the manifest is written, which makes them a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError, RayTaskError

import acestep_ray
from acestep_ray.cache.parts import (
    Part,
    StoredRow,
    claim_output_dir,
    commit,
    counted_attempt,
    find_rows,
    plan_parts,
    read_dims,
    row_to_bytes,
    store_song,
    write_part,
)
from acestep_ray.cache.progress import Progress
from acestep_ray.cache.schema import FORMAT_VERSION, hash_of
from acestep_ray.cache.stages import (
    DecodedSong,
    Encoder,
    Recipe,
    Reject,
    Settings,
    Song,
    decode_song,
    files_unchanged,
)
from acestep_ray.config import PrecomputeConfig
from acestep_ray.data.lyrics import LyricTokenizer
from acestep_ray.data.schema import RejectReason, open_dataset
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.ray_runtime import connect

if TYPE_CHECKING:
    # Imported where it is used: the workers that only decode need no models, whose libraries load for seconds.
    from acestep_ray.models.checkpoint import CheckpointDir

LONGEST_SECONDS = 240.0

# Fractions, so that every stage finds a place beside the encoder on a machine with two cores.
_DECODE_CPUS = 0.5
_STORE_CPUS = 0.25
_FILE_CPUS = 0.5
_FILE_RETRIES = 3
# Ray Data retries without end what a dead worker was doing: nobody would wait for a song that kills its worker.
_ATTEMPTS = 3
_SONGS_PER_BLOCK = 32
_LISTED_REJECTS = 10


@dataclass(frozen=True)
class PrecomputeSummary:
    """What a run found, computed and left out: `inputs` is `samples` and `rejects` together."""

    inputs: int
    samples: int
    unchanged: int
    computed: int
    rejects: list[Reject]
    ssl_names: list[str]
    seconds_of_audio: float
    """Of all samples, padding excluded."""
    wall_seconds: float
    output_dir: str

    def render(self) -> str:
        """The summary as a few lines of text."""
        hours, minutes = divmod(round(self.seconds_of_audio / 60), 60)
        lines = [
            f"feature cache  {self.output_dir}",
            f"  songs        {self.inputs}",
            f"  samples      {self.samples} ({self.computed} computed, {self.unchanged} unchanged), "
            f"{hours} h {minutes:02d} min of audio",
            f"  rejects      {len(self.rejects)}",
        ]
        for reason, count in Counter(reject.reason for reject in self.rejects).most_common():
            lines.append(f"    {reason:<10} {count}")
        lines += [f"    {reject.key}: {reject.message}" for reject in self.rejects[:_LISTED_REJECTS]]
        if len(self.rejects) > _LISTED_REJECTS:
            lines.append(f"    … the others are in {self.output_dir}/rejects")
        if self.ssl_names:
            lines.append(f"  SSL          {', '.join(self.ssl_names)}")
        else:
            lines.append(
                "  SSL          none: the checkpoint has no mert/ or mhubert/, train with --ssl_coeff 0"
            )
        lines.append(f"  took         {self.wall_seconds:.0f} s")
        return "\n".join(lines)


def precompute(config: PrecomputeConfig) -> PrecomputeSummary:
    """Write the feature cache of a dataset; what an earlier run has written and is still right is kept.

    Raises InputError for a mistake in the settings, the dataset or the checkpoint, and where not one song can be
    used; AceStepError where a worker fails for another reason than its song.
    """
    from acestep_ray.models.checkpoint import CheckpointDir

    started = time.monotonic()
    _check_settings(config)
    # Workers on other nodes have another working directory.
    dataset_dir, cache = os.path.abspath(config.dataset_path), Path(os.path.abspath(config.output_dir))
    dataset = open_dataset(dataset_dir, config.split)
    checkpoint = CheckpointDir.open(os.path.abspath(config.checkpoint_dir))
    recipe = _recipe(config, checkpoint)
    keys = dataset["keys"][:]
    claim_output_dir(cache)
    connect()
    pool = _EncoderPool.choose(config)

    with _faults_explained():
        rows = _find_unchanged(dataset, dataset_dir, find_rows(cache), recipe)
        unchanged = len(rows)
        pending = [i for i, key in enumerate(keys) if key not in rows]
        rejects: list[Reject] = []
        progress = Progress(len(pending), unchanged)
        songs = (Song.from_row(dataset[i]) for i in pending)
        for outcome in _encode(songs, len(pending), dataset_dir, checkpoint, recipe, cache, pool):
            if isinstance(outcome, Reject):
                rejects.append(outcome)
            else:
                rows[outcome.key] = outcome
            progress.show(done=len(rows) - unchanged + len(rejects), rejected=len(rejects))
        progress.close()
        _check_complete(keys, rows, rejects)
        parts = plan_parts(rows.values())
        missing = [(cache, part) for part in parts if not part.is_written]
        for _ in _map_tasks(write_part, missing):
            pass
    rejects.sort(key=lambda reject: reject.key)
    commit(cache, parts, rejects, _manifest(dataset, recipe, checkpoint, cache, parts, rejects))
    if not rows:
        first = "".join(f"\n  - {reject.filename}: {reject.message}" for reject in rejects[:_LISTED_REJECTS])
        raise InputError(f"none of the {len(rejects)} songs can be used{first}", where=dataset_dir)
    return PrecomputeSummary(
        inputs=len(keys),
        samples=len(rows),
        unchanged=unchanged,
        computed=len(rows) - unchanged,
        rejects=rejects,
        ssl_names=list(checkpoint.ssl_names),
        seconds_of_audio=sum(row.duration_seconds for row in rows.values()),
        wall_seconds=time.monotonic() - started,
        output_dir=str(cache),
    )


def _check_settings(config: PrecomputeConfig) -> None:
    allowed = [
        ("tag_shuffles", config.tag_shuffles >= 1, "at least 1"),
        ("ssl_frame_stride", config.ssl_frame_stride >= 1, "at least 1"),
        (
            "max_duration",
            0 < config.max_duration <= LONGEST_SECONDS,
            f"above 0 and at most {LONGEST_SECONDS:g}",
        ),
        ("encoder_workers", config.encoder_workers is None or config.encoder_workers >= 1, "at least 1"),
        ("device", config.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
    ]
    for name, is_allowed, values in allowed:
        if not is_allowed:
            raise InputError(f"--{name} is {getattr(config, name)}, it has to be {values}")


def _recipe(config: PrecomputeConfig, checkpoint: CheckpointDir) -> Recipe:
    models = {part: checkpoint.fingerprint(part) for part in ("codec", "text_encoder", *checkpoint.ssl_names)}
    models["lyric_tokenizer"] = LyricTokenizer.from_file(checkpoint.lyric_vocab_path()).fingerprint
    settings = Settings(
        max_duration=config.max_duration,
        tag_shuffles=config.tag_shuffles,
        ssl_frame_stride=config.ssl_frame_stride,
        seed=config.seed,
        speaker_dim=checkpoint.transformer_config.speaker_embedding_dim,
    )
    return Recipe(settings, models)


@dataclass(frozen=True)
class _EncoderPool:
    """Where the encoders run."""

    device: str
    actors: int
    num_cpus: float
    """Reserved for each actor; on a CPU also its number of threads, at least one."""
    num_gpus: float

    @classmethod
    def choose(cls, config: PrecomputeConfig) -> _EncoderPool:
        """One actor a GPU, or a node without GPUs, unless the settings say how many."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        device = config.device if config.device != "auto" else ("cuda" if gpus else "cpu")
        if device == "cuda":
            if not gpus:
                raise InputError(
                    "--device is cuda, and the Ray cluster has no GPU",
                    fix="give --device cpu, or start Ray where torch sees a GPU",
                )
            actors = config.encoder_workers or gpus
            return cls(device, actors, num_cpus=1, num_gpus=1 / -(-actors // gpus))
        cores = [node["CPU"] for node in nodes if node.get("CPU")]
        if not cores:
            raise InputError("the Ray cluster has no CPUs", fix="start Ray with --num-cpus 2 or more")
        actors = config.encoder_workers or len(cores)
        share = min(cores) / -(-actors // len(cores))
        # Whole cores but one, or where that leaves none half of the share: decoding needs the rest.
        return cls(device, actors, num_cpus=int(share - 1) if share >= 2 else share / 2, num_gpus=0)


def _find_unchanged(
    dataset: datasets.Dataset, dataset_dir: str, stored: dict[str, list[StoredRow]], recipe: Recipe
) -> dict[str, StoredRow]:
    """Rows on disk, by key, that are what this run would compute."""
    candidates = _candidates(dataset, stored, recipe) if stored else iter(())
    batches = iter(lambda: list(islice(candidates, _SONGS_PER_BLOCK)), [])
    found = _map_tasks(_unchanged_rows, ((dataset_dir, batch) for batch in batches))
    return {row.key: row for rows in found for row in rows}


def _candidates(
    dataset: datasets.Dataset, stored: dict[str, list[StoredRow]], recipe: Recipe
) -> Iterator[tuple[Song, StoredRow]]:
    """Rows on disk that are still right if the files of their songs have not changed, which takes reading them."""
    for song in _songs(dataset):
        for row in stored.get(song.key, ()):
            if row.fingerprint == recipe.row_fingerprint(song, row.audio_sha256, row.speaker_sha256):
                yield song, row
                break


def _unchanged_rows(dataset_dir: str, candidates: list[tuple[Song, StoredRow]]) -> list[StoredRow]:
    return [
        row
        for song, row in candidates
        if files_unchanged(dataset_dir, song, row.audio_sha256, row.speaker_sha256)
    ]


def _songs(dataset: datasets.Dataset) -> Iterator[Song]:
    return (Song.from_row(row) for row in dataset)


def _map_tasks(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Results of `function` on each tuple of arguments, run as Ray tasks, in the order in which they end."""
    remote = ray.remote(num_cpus=_FILE_CPUS, max_retries=_FILE_RETRIES)(function)
    at_once = int(4 * ray.cluster_resources()["CPU"] / _FILE_CPUS)
    running: list[ray.ObjectRef] = []
    for call in calls:
        running.append(remote.remote(*call))
        if len(running) >= at_once:
            done, running = ray.wait(running)
            yield from ray.get(done)
    while running:
        done, running = ray.wait(running)
        yield from ray.get(done)


def _encode(
    songs: Iterator[Song],
    count: int,
    dataset_dir: str,
    checkpoint: CheckpointDir,
    recipe: Recipe,
    cache: Path,
    pool: _EncoderPool,
) -> Iterator[StoredRow | Reject]:
    """Decode, encode and store songs; yields what became of each, in the order in which they end."""
    if not count:
        return
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    # Every song a block of its own, 92 MB when decoded, so that none waits for another.
    context.target_max_block_size = 1
    # Small blocks let a small dataset spread over the cluster, and a large one needs no million of them.
    per_block = min(_SONGS_PER_BLOCK, -(-count // int(4 * ray.cluster_resources()["CPU"])))
    blocks = iter(lambda: list(islice(songs, per_block)), [])
    with DataContext.current(context):
        dataset = (
            ray.data.from_arrow([_song_table(block) for block in blocks])
            .map_batches(
                partial(_decode, dataset_dir=dataset_dir, cache=str(cache), settings=recipe.settings),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=_DECODE_CPUS,
            )
            .map_batches(
                _Encode,
                fn_constructor_args=(str(checkpoint.path), str(cache), recipe, pool),
                batch_size=1,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(size=min(pool.actors, count)),
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
            )
            .map_batches(
                partial(_store, cache=str(cache)),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=_STORE_CPUS,
            )
        )
        for receipts in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for receipt in receipts["receipt"].to_pylist():
                yield _read_receipt(receipt)


def _song_table(songs: list[Song]) -> pa.Table:
    return pa.table({"song": [json.dumps(asdict(song)) for song in songs]})


def _decode(batch: pa.Table, dataset_dir: str, cache: str, settings: Settings) -> pa.Table:
    """Stage of one song: `song` → `decoded` (everything but the arrays), `wave`, `speaker`; or a receipt."""
    song = Song(**json.loads(batch["song"][0].as_py()))
    with _plain_faults(song.key), counted_attempt(Path(cache), "decode", song.key) as attempt:
        if attempt > _ATTEMPTS:
            message = f"reading the file has ended its process {_ATTEMPTS} times"
            decoded = Reject.of(song, RejectReason.CORRUPT, message)
        else:
            decoded = decode_song(dataset_dir, song, settings)
        if isinstance(decoded, Reject):
            return _decoded_table(receipt=_write_receipt(decoded))
        header = {
            name: getattr(decoded, name) for name in ("audio_sha256", "speaker_sha256", "duration_seconds")
        }
        return _decoded_table(
            decoded=json.dumps({**header, "song": asdict(song)}), wave=decoded.wave, speaker=decoded.speaker
        )


def _decoded_table(
    receipt: str | None = None,
    decoded: str | None = None,
    wave: np.ndarray | None = None,
    speaker: np.ndarray | None = None,
) -> pa.Table:
    columns = {"receipt": pa.array([receipt], pa.string()), "decoded": pa.array([decoded], pa.string())}
    for name, array in (("wave", wave), ("speaker", speaker)):
        columns[name] = _binary(None if array is None else np.ascontiguousarray(array).data.cast("B"))
    return pa.table(columns)


def _binary(content: memoryview | None) -> pa.Array:
    return pa.array([content], pa.large_binary())


def _read_decoded(batch: pa.Table) -> DecodedSong:
    header = json.loads(batch["decoded"][0].as_py())
    speaker = batch["speaker"][0]
    return DecodedSong(
        **{**header, "song": Song(**header["song"])},
        wave=np.frombuffer(batch["wave"][0].as_buffer(), np.float32).reshape(2, -1),
        speaker=np.frombuffer(speaker.as_buffer(), np.float32) if speaker.is_valid else None,
    )


class _Encode:
    """Stage of one song, on an actor that keeps the models: what `_decode` gave → `receipt` or `row`."""

    def __init__(self, checkpoint_dir: str, cache: str, recipe: Recipe, pool: _EncoderPool):
        self.checkpoint_dir = checkpoint_dir
        self.cache = Path(cache)
        self.recipe = recipe
        self.device = pool.device
        self.encoder: Encoder | None = None
        if pool.device == "cpu":
            torch.set_num_threads(max(1, int(pool.num_cpus)))

    def __call__(self, batch: pa.Table) -> pa.Table:
        receipt, row = batch["receipt"][0].as_py(), None
        if receipt is None:
            decoded = _read_decoded(batch)
            key = decoded.song.key
            with _plain_faults(key), counted_attempt(self.cache, "encode", key) as attempt:
                if attempt > _ATTEMPTS:
                    raise RuntimeError(f"encoding has ended its process {_ATTEMPTS} times (out of memory?)")
                outcome = self._models().encode_song(decoded)
            if isinstance(outcome, Reject):
                receipt = _write_receipt(outcome)
            else:
                row = memoryview(row_to_bytes(outcome))
        return pa.table({"receipt": pa.array([receipt], pa.string()), "row": _binary(row)})

    def _models(self) -> Encoder:
        # Loaded for the first song that decodes: a rerun that only meets old rejects loads nothing.
        if self.encoder is None:
            from acestep_ray.models.checkpoint import CheckpointDir

            self.encoder = Encoder.load(CheckpointDir.open(self.checkpoint_dir), self.recipe, self.device)
        return self.encoder


def _store(batch: pa.Table, cache: str) -> pa.Table:
    """Stage of one song: `row`, if there is one, to a file of the cache; what is left is the receipt."""
    row = batch["row"][0]
    if row.is_valid:
        return pa.table({"receipt": [_write_receipt(store_song(Path(cache), row.as_buffer()))]})
    return batch.select(["receipt"])


def _write_receipt(outcome: StoredRow | Reject) -> str:
    return json.dumps([type(outcome).__name__, asdict(outcome)])


def _read_receipt(receipt: str) -> StoredRow | Reject:
    kind, fields = json.loads(receipt)
    return {"StoredRow": StoredRow, "Reject": Reject}[kind](**fields)


@contextlib.contextmanager
def _plain_faults(key: str) -> Iterator[None]:
    """Raises a fault as one that survives the way to the driver: some libraries' errors cannot be unpickled."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__} at song {key!r}: {error}") from error


@contextlib.contextmanager
def _faults_explained() -> Iterator[None]:
    """Ray's errors as one message with the cause, without Ray Data's own account of them on the console."""
    consoles = [
        handler
        for handler in logging.getLogger("ray.data").handlers
        if isinstance(handler, logging.StreamHandler)
    ]
    for handler in consoles:
        handler.addFilter(_is_worth_showing)
    try:
        yield
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, InputError):
            raise cause from None
        # Ray Data adds advice on its own retries.
        told = str(cause).partition("\nFailed to apply UDF")[0]
        raise AceStepError(
            f"precompute stopped: {told}\n"
            "  → the songs that were encoded are kept; the same command goes on from there"
        ) from error
    finally:
        for handler in consoles:
            handler.removeFilter(_is_worth_showing)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    """Warnings, such as that of a cluster without room for the encoders; errors are told by what is raised."""
    return record.levelno == logging.WARNING and not record.getMessage().startswith("Progress bars disabled")


def _check_complete(keys: Iterable[str], rows: dict[str, StoredRow], rejects: list[Reject]) -> None:
    """Every input row is in exactly one of samples and rejects, or Ray Data has lost or doubled one."""
    inputs, outcomes = Counter(keys), Counter([*rows, *(reject.key for reject in rejects)])
    wrong = sorted((inputs - outcomes) | (outcomes - inputs))
    if wrong:
        raise AceStepError(f"{len(wrong)} songs were lost or doubled on the way, among them {wrong[0]!r}")


def _manifest(
    dataset: datasets.Dataset,
    recipe: Recipe,
    checkpoint: CheckpointDir,
    cache: Path,
    parts: list[Part],
    rejects: list[Reject],
) -> dict[str, Any]:
    samples = sum(len(part.rows) for part in parts)
    digest = hashlib.sha256()
    for song in _songs(dataset):
        digest.update(hash_of(asdict(song)).encode())
    return {
        "format_version": FORMAT_VERSION,
        "created_by": {
            "acestep_ray": acestep_ray.__version__,
            "torch": torch.__version__,
            "pyarrow": pa.__version__,
        },
        "dataset": {"fingerprint": digest.hexdigest()},
        "checkpoint": {**recipe.models, "lyric_vocab": checkpoint.fingerprint("lyric_vocab")},
        "settings": asdict(recipe.settings),
        "counts": {"inputs": samples + len(rejects), "samples": samples, "rejects": len(rejects)},
        **(read_dims(cache, parts[0]) if parts else {"text_dim": None, "ssl": {}}),
    }
