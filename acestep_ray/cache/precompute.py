"""The `precompute` job: songs through the frozen models into the feature cache, once, on Ray.

What earlier runs have left is found (`stored`, `outcomes`), the rest goes through the stages of `graph`, which decode,
encode and store song after song in bounded memory.

A stored song survives whatever comes after it: a rerun finds it and computes only what is missing. Once every song is
stored or rejected, small files are joined, and the manifest is written, which makes them a cache (`commit`).
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

import acestep_ray
from acestep_ray.cache.commit import commit, plan_commit, repack
from acestep_ray.cache.graph import EncoderPool, Graph
from acestep_ray.cache.lyric_warnings import has_unusable_lyrics, lyric_warnings
from acestep_ray.cache.outcomes import (
    Candidate,
    Outcomes,
    check_complete,
    first_of_each,
    rejects_of,
    unchanged_songs,
)
from acestep_ray.cache.parts import read_dims
from acestep_ray.cache.pools import choose_pools
from acestep_ray.cache.schema import FEATURE_GROUPS, FORMAT_VERSION, LEDGER_SCHEMA, hash_of
from acestep_ray.cache.songs import WINDOWS, Recipe, Reject, Settings, Song
from acestep_ray.cache.stored import claim_output_dir, find_rejects, find_rows, join_tables
from acestep_ray.config import PrecomputeConfig
from acestep_ray.data.audio import MIN_SECONDS
from acestep_ray.data.lyrics import LyricTokenizer
from acestep_ray.data.songs import SongTable
from acestep_ray.errors import InputError
from acestep_ray.hints import one_of
from acestep_ray.ray_runtime import cluster_cpus, connect, faults_explained, nodes_with
from acestep_ray.storage import Store, only_writer
from acestep_ray.terminal import Progress, fact_table

if TYPE_CHECKING:
    # Imported where it is used: the workers that only decode need no models, whose libraries load for seconds.
    from acestep_ray.models.checkpoint import CheckpointDir

LONGEST_SECONDS = 240.0

_FILE_CPUS = 0.5
_FILE_RETRIES = 3
_SONGS_PER_TASK = 128
_LISTED_REJECTS = 10


@dataclass(frozen=True)
class PrecomputeSummary:
    """What a run found, computed and left out: `inputs` is `computed`, `unchanged` and `rejects` together."""

    inputs: int
    """Songs; with `--window all` windows of songs."""
    samples: int
    """In the cache now: those computed and those unchanged."""
    unchanged: int
    computed: int
    rejects: list[Reject]
    ssl_names: list[str]
    seconds_of_audio: float
    """Of all samples, padding excluded."""
    num_bytes: int
    """Of all samples."""
    wall_seconds: float
    output_dir: str
    warnings: list[str] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    """What the texts of a folder or table were taken for, a line for each kind."""

    def render(self) -> str:
        """The summary as a few lines of text."""
        hours, minutes = divmod(round(self.seconds_of_audio / 60), 60)
        rejects = [str(len(self.rejects))]
        for reason, count in Counter(reject.reason for reject in self.rejects).most_common():
            rejects.append(f"{reason:<12} {count}")
        rejects += [f"{reject.key}: {reject.message}" for reject in self.rejects[:_LISTED_REJECTS]]
        if len(self.rejects) > _LISTED_REJECTS:
            rejects.append(f"… the others are in {self.output_dir}/rejects")
        warnings = self.warnings[:_LISTED_REJECTS]
        if len(self.warnings) > _LISTED_REJECTS:
            warnings.append(f"… and {len(self.warnings) - _LISTED_REJECTS} more")
        return fact_table(
            [
                ("cache", self.output_dir),
                *(("texts", layout) for layout in self.layouts),
                (
                    "inputs",
                    f"{self.inputs} = {self.computed} samples + {len(self.rejects)} rejects "
                    f"+ {self.unchanged} unchanged",
                ),
                (
                    "samples",
                    f"{self.samples}, {hours} h {minutes:02d} min of audio, {self.num_bytes / 1e6:,.1f} MB",
                ),
                ("rejects", "\n".join(rejects)),
                ("SSL", ", ".join(self.ssl_names) or "none: train with --ssl_coeff 0"),
                *(("warning", warning) for warning in warnings),
                ("took", f"{self.wall_seconds:,.0f} s"),
            ]
        )


def precompute(config: PrecomputeConfig) -> PrecomputeSummary:
    """Write the feature cache of a dataset; what an earlier run has written and is still right is kept.

    Raises InputError for a mistake in the settings, the dataset or the checkpoint, and where not one song can be
    used; AceStepError where a worker fails for another reason than its song.
    """
    from acestep_ray.models.checkpoint import CheckpointDir

    started = time.monotonic()
    features = check_settings(config)
    songs = SongTable.open(config.dataset_path, config.split, layout=config.texts, tag_metas=config.tag_metas)
    # Workers on other nodes have another working directory.
    checkpoint = CheckpointDir.open(Store.at(config.checkpoint_dir).url)
    cache = Store.at(config.output_dir)
    claim_output_dir(cache)
    with only_writer(cache, f"--output_dir {config.output_dir}"):
        return _fill(cache, songs, features, checkpoint, config, started)


def _fill(
    cache: Store,
    songs: SongTable,
    features: tuple[str, ...],
    checkpoint: CheckpointDir,
    config: PrecomputeConfig,
    started: float,
) -> PrecomputeSummary:
    """Compute what is missing, and commit it. Only for the one writer of the cache."""
    connect()
    nodes_with(config.decode_resource, "--decode_resource")
    pools = choose_pools(config, features, checkpoint)
    recipe = make_recipe(config, checkpoint, features, device=pools[0].device)
    tokenizer = LyricTokenizer.from_file(checkpoint.lyric_vocab_path()) if "text" in features else None
    run = _Run(songs, cache, recipe, checkpoint, pools, config, tokenizer)

    with faults_explained("precompute", "encoded"):
        kept_rows, kept_rejects = run.find_unchanged()
        new_rows, new_rejects = run.compute(
            {*kept_rows["song_key"].to_pylist(), *(r.song_key for r in kept_rejects)}
        )
        rows = pa.concat_tables([kept_rows, new_rows])
        rejects = sorted([*kept_rejects, *new_rejects], key=lambda reject: reject.key)
        check_complete(songs.keys, rows, rejects)
        plan = plan_commit(rows)
        rows = pa.concat_tables([plan.kept, *_map_tasks(repack, ((cache, part) for part in plan.repack))])
    commit(cache, rows, rejects, run.manifest(rows, rejects))
    if not len(rows):
        first = "".join(f"\n  - {reject.filename}: {reject.message}" for reject in rejects[:_LISTED_REJECTS])
        raise InputError(f"none of the {len(rejects)} songs can be used{first}", where=songs.root.url)
    return PrecomputeSummary(
        inputs=len(rows) + len(rejects),
        samples=len(rows),
        unchanged=len(kept_rows),
        computed=len(new_rows),
        rejects=rejects,
        ssl_names=list(checkpoint.ssl_names) if "ssl" in features else [],
        seconds_of_audio=sum(rows["duration_seconds"].to_pylist()),
        num_bytes=sum(rows["length"].to_pylist()),
        wall_seconds=time.monotonic() - started,
        output_dir=cache.url,
        warnings=[
            *_warnings_of(rows),
            *songs.warnings,
            *lyric_warnings(songs, run.tokenizer, {r.song_key for r in rejects}),
        ],
        layouts=songs.layouts,
    )


def _warnings_of(rows: pa.Table) -> list[str]:
    """A line for each song, or window, whose file was read otherwise than its header says."""
    told = rows.filter(pc.is_valid(rows["warning"])).sort_by("key")
    return [
        f"{key}: {text}"
        for key, text in zip(told["key"].to_pylist(), told["warning"].to_pylist(), strict=True)
    ]


# --- settings ----------------------------------------------------------------------------------------------


def check_settings(config: PrecomputeConfig) -> tuple[str, ...]:
    """Raise InputError for values that cannot be computed with; returns the groups of features, in their order."""
    workers = ("encoder_workers", "codec_workers", "ssl_workers", "text_workers", "decode_workers")
    shares = ("encoder_gpus", "codec_gpus", "ssl_gpus", "text_gpus")
    longest = f"at least {MIN_SECONDS:g} and at most {LONGEST_SECONDS:g}"
    allowed = [
        ("tag_shuffles", config.tag_shuffles >= 1, "at least 1"),
        ("ssl_frame_stride", config.ssl_frame_stride >= 1, "at least 1"),
        ("window", config.window in WINDOWS, ", ".join(WINDOWS)),
        ("window_seconds", MIN_SECONDS <= config.window_seconds <= LONGEST_SECONDS, longest),
        (
            "loudness_lufs",
            config.loudness_lufs is None or -70 <= config.loudness_lufs <= 0,
            "-70 to 0 (LUFS), or left out",
        ),
        ("min_decoded", 0 < config.min_decoded <= 1, "above 0 and at most 1"),
        ("batch_frames", config.batch_frames >= 1, "at least 1"),
        ("device", config.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
        ("precision", config.precision in ("auto", "32", "16"), "auto, 32 or 16"),
        *(
            (name, getattr(config, name) is None or getattr(config, name) >= 1, "at least 1")
            for name in workers
        ),
        *(
            (name, getattr(config, name) is None or 0 <= getattr(config, name) <= 1, "0 to 1")
            for name in shares
        ),
    ]
    for name, is_allowed, values in allowed:
        if not is_allowed:
            raise InputError(f"--{name} is {getattr(config, name)}, it has to be {values}")
    wanted = [name.strip() for name in config.features.split(",")]
    unknown = [name for name in wanted if name not in FEATURE_GROUPS]
    if unknown:
        raise InputError(
            f"--features has {', '.join(map(repr, unknown))}",
            fix=f"{one_of(unknown[0], FEATURE_GROUPS)}; several with commas between them",
        )
    return tuple(name for name in FEATURE_GROUPS if name in wanted)


def make_recipe(
    config: PrecomputeConfig, checkpoint: CheckpointDir, features: Sequence[str], device: str
) -> Recipe:
    """What rows are made from: the settings and the fingerprints of the models that take part."""
    parts: list[str] = []
    if "latents" in features:
        parts.append("codec")
    if "text" in features:
        parts.append("text_encoder")
    if "ssl" in features:
        parts += checkpoint.ssl_names
    models = {part: checkpoint.fingerprint(part) for part in parts}
    if "text" in features:
        models["lyric_tokenizer"] = LyricTokenizer.from_file(checkpoint.lyric_vocab_path()).fingerprint
    precision = config.precision
    if precision == "auto":
        precision = "16" if device == "cuda" else "32"
    settings = Settings(
        window=config.window,
        window_seconds=config.window_seconds,
        loudness_lufs=config.loudness_lufs,
        features=tuple(features),
        precision=precision,
        tag_shuffles=config.tag_shuffles,
        ssl_frame_stride=config.ssl_frame_stride,
        seed=config.seed,
        speaker_dim=checkpoint.transformer_config.speaker_embedding_dim,
    )
    return Recipe(settings, models, config.min_decoded, config.keep_unknown_lyrics)


# --- the run -----------------------------------------------------------------------------------------------


@dataclass
class _Run:
    songs: SongTable
    cache: Store
    recipe: Recipe
    checkpoint: CheckpointDir
    pools: list[EncoderPool]
    config: PrecomputeConfig
    tokenizer: LyricTokenizer | None
    """None where no lyrics are encoded."""

    def find_unchanged(self) -> tuple[pa.Table, list[Reject]]:
        """What is on disk, rows and rejects, and is what this run would compute."""
        rows, rejects = find_rows(self.cache), rejects_of(find_rejects(self.cache))
        if self.config.retry_rejects:
            rejects = []
        outcomes = Outcomes(rows, rejects)
        candidates = self._candidates(outcomes)
        batches = iter(lambda: list(islice(candidates, _SONGS_PER_TASK)), [])
        calls = ((self.songs.root, self.recipe, batch) for batch in batches)
        unchanged = (one for some in _map_tasks(unchanged_songs, calls) for one in some)
        return outcomes.of(unchanged)

    def _candidates(self, outcomes: Outcomes) -> Iterator[Candidate]:
        """Songs on disk that are still right if their files have not changed, which takes a look at those."""
        if not outcomes:
            return
        for values in self.songs:
            song = Song.from_row(values)
            candidates = outcomes.candidates(song, self.recipe)
            if candidates and self._is_rejected(song):
                candidates = [candidate for candidate in candidates if candidate.versions is None]
            yield from candidates

    def _is_rejected(self, song: Song) -> bool:
        """Whether the song's lyrics are unusable: rows of it are of an earlier version, or were kept by the flag."""
        if self.tokenizer is None or self.config.keep_unknown_lyrics:
            return False
        return has_unusable_lyrics(song.lyrics, song.language, self.tokenizer)

    def compute(self, known: set[str]) -> tuple[pa.Table, list[Reject]]:
        """Rows and rejects of the songs whose keys are not known yet."""
        pending = len(self.songs.keys) - len(known)
        rejects: list[Reject] = []
        if known:
            print(f"{len(known)} songs are in the cache already", file=sys.stderr, flush=True)

        def ledgers() -> Iterator[pa.Table]:
            yield LEDGER_SCHEMA.empty_table()
            if pending:
                yield from self._encode(known, pending, rejects)

        return first_of_each(join_tables(ledgers())), list({r.key: r for r in rejects}.values())

    def _encode(self, known: set[str], pending: int, rejects: list[Reject]) -> Iterator[pa.Table]:
        """Ledgers of what the graph stores; what it rejects is added to `rejects`."""
        values = (row for row in self.songs if row["keys"] not in known)
        graph = Graph(
            root=self.songs.root,
            cache=self.cache,
            checkpoint_dir=str(self.checkpoint.path),
            recipe=self.recipe,
            pools=self.pools,
            batch_frames=self.config.batch_frames,
            decode_workers=self.config.decode_workers,
            decode_resource=self.config.decode_resource,
        )
        done = 0
        with Progress("encoding", pending, "songs") as progress:
            for ledger, rejected in graph.run((Song.from_row(row) for row in values), pending):
                yield ledger
                rejects += rejected
                done += sum(ledger["is_last_window"].to_pylist())
                done += sum(reject.is_last_window for reject in rejected)
                progress.update(done, f"{len(rejects)} rejected")

    def manifest(self, rows: pa.Table, rejects: list[Reject]) -> dict[str, Any]:
        settings = asdict(self.recipe.settings)
        models = dict(self.recipe.models)
        if "lyric_tokenizer" in models:
            models["lyric_vocab"] = self.checkpoint.fingerprint("lyric_vocab")
        return {
            "format_version": FORMAT_VERSION,
            "created_by": {
                "acestep_ray": acestep_ray.__version__,
                "torch": torch.__version__,
                "pyarrow": pa.__version__,
            },
            "dataset": {"songs": len(self.songs), "fingerprint": _fingerprint(self.songs)},
            "checkpoint": models,
            "settings": {**settings, "features": list(settings["features"])},
            "counts": {
                "inputs": len(rows) + len(rejects),
                "samples": len(rows),
                "rejects": len(rejects),
            },
            **(read_dims(self.cache, rows) if len(rows) else {"text_dim": None, "ssl": {}}),
        }


def _fingerprint(songs: SongTable) -> str:
    fingerprint = ""
    for row in songs:
        fingerprint = hash_of(fingerprint, asdict(Song.from_row(row)))
    return fingerprint


def _map_tasks(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Results of `function` on each tuple of arguments, run as Ray tasks, in the order in which they end."""
    remote = ray.remote(num_cpus=_FILE_CPUS, max_retries=_FILE_RETRIES)(function)
    at_once = int(4 * cluster_cpus() / _FILE_CPUS)
    running: list[ray.ObjectRef[Any]] = []
    for call in calls:
        running.append(remote.remote(*call))
        if len(running) >= at_once:
            done, running = ray.wait(running)
            yield from ray.get(done)
    while running:
        done, running = ray.wait(running)
        yield from ray.get(done)
