"""The scan of a run without a cache: which songs can be used and how long they are, found once before it trains.

Every song is decoded for that, in Ray tasks, and its audio dropped again. What was found is noted in the run's folder:

    scan.parquet   every song, used or rejected, with the versions of its files: a song is scanned again if they change
    songs.arrow    the songs that can be used, sorted by key, uncompressed: workers map it into memory
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import RayError, RayTaskError, WorkerCrashedError

from acestep_ray.cache.decoding import decode_song, file_versions
from acestep_ray.cache.lyric_warnings import lyric_warnings
from acestep_ray.cache.schema import has_types, table_from_bytes, table_to_bytes
from acestep_ray.cache.songs import DecodedSong, FileVersions, Recipe, Reject, Song, encode_lyrics
from acestep_ray.cache.transport import decoded_table, plain_faults
from acestep_ray.data.schema import RejectReason
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.ray_runtime import cluster_cpus
from acestep_ray.storage import Store, scratch_folder
from acestep_ray.terminal import Progress, fact_table

if TYPE_CHECKING:
    # Workers that only decode need no models, whose libraries load for seconds.
    from acestep_ray.data.lyrics import LyricTokenizer
    from acestep_ray.data.songs import SongTable

SCAN, SONGS = "scan.parquet", "songs.arrow"

SCAN_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("filename", pa.string()),
        # Of text, settings and the versions of the files: what the outcome follows from.
        ("fingerprint", pa.string()),
        ("audio_version", pa.string()),
        ("speaker_version", pa.string()),
        # Length of the training audio at 48 kHz; null for a song that is rejected, for the reason below.
        ("samples", pa.int64()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        # What disagrees in the song's file; null where nothing does, and in a scan of an older version.
        ("warning", pa.string()),
    ]
)

SONG_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("latent_frames", pa.int32()),
        # Fields of `Song` as JSON.
        ("song", pa.string()),
        ("audio_version", pa.string()),
        ("speaker_version", pa.string()),
    ]
)

_PLACE = pa.field("place", pa.int64())
"""Of the song in its table."""
_PLACED = SCAN_SCHEMA.append(_PLACE)

DECODE_CPUS = 0.5
_RETRIES = 2
_SONGS_PER_TASK = 32
_TASKS_PER_CPU = 4
_SONGS_PER_BATCH = 1024
# What a run that is killed while it scans has to do again.
_SECONDS_BETWEEN_SAVES = 60.0
_LISTED = 10


@dataclass(frozen=True)
class ScanSummary:
    """What a scan found; `inputs` is `songs` and `rejects` together."""

    inputs: int
    songs: int
    """That can be used."""
    rejects: list[Reject]
    scanned: int
    """Songs that were decoded now; the others are as an earlier scan found them."""
    wall_seconds: float
    warnings: list[str] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    """What the texts of a folder or table were taken for, a line for each kind."""

    def render(self) -> str:
        """The summary as a few lines of text."""
        rejects = [str(len(self.rejects))]
        for reason, count in Counter(reject.reason for reject in self.rejects).most_common():
            rejects.append(f"{reason:<12} {count}")
        rejects += [f"{reject.key}: {reject.message}" for reject in self.rejects[:_LISTED]]
        return fact_table(
            [
                ("inputs", f"{self.inputs} = {self.songs} songs + {len(self.rejects)} rejects"),
                *(("texts", layout) for layout in self.layouts),
                ("scanned", f"{self.scanned} in {self.wall_seconds:,.0f} s"),
                ("rejects", "\n".join(rejects)),
                *(("warning", warning) for warning in self.warnings[:_LISTED]),
                *(
                    [("warning", f"… and {len(self.warnings) - _LISTED} more")]
                    if self.warnings[_LISTED:]
                    else []
                ),
            ]
        )


def scan(songs: SongTable, recipe: Recipe, tokenizer: LyricTokenizer, folder: Store) -> ScanSummary:
    """Find out which songs can be used; writes both files to `folder`. The recipe's window has to be `first`.

    Raises InputError where not one song can be used, AceStepError where a worker fails for another reason than its
    song; what was found by then is noted.
    """
    assert recipe.settings.window == "first", "one row a song"
    started = time.monotonic()
    before = _read_scan(folder)
    found = [_PLACED.empty_table()]
    done = scanned = 0
    saved = started
    progress = Progress("scanning", len(songs), "songs")
    try:
        with _faults_explained(), progress:
            for outcomes, newly_scanned in _in_tasks(songs, before, recipe, tokenizer):
                found.append(outcomes)
                done += len(outcomes)
                scanned += newly_scanned
                if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                    _write_scan(folder, [*found, before])
                    saved = time.monotonic()
                progress.update(done)
    except BaseException:
        _write_scan(folder, [*found, before])
        raise
    table = pa.concat_tables(found).sort_by("key")
    _write_scan(folder, [table])
    usable = table.filter(pc.is_valid(table["samples"]))
    rejects = [_reject(row) for row in table.filter(pc.is_null(table["samples"])).to_pylist()]
    if not len(usable):
        first = "".join(f"\n  - {reject.filename}: {reject.message}" for reject in rejects[:_LISTED])
        raise InputError(f"none of the {len(rejects)} songs can be used{first}", where=songs.root.url)
    _write_songs(folder, songs, usable)
    return ScanSummary(
        inputs=len(table),
        songs=len(usable),
        rejects=rejects,
        scanned=scanned,
        wall_seconds=time.monotonic() - started,
        warnings=[
            *_warnings_of(usable),
            *songs.warnings,
            *lyric_warnings(songs, tokenizer, {reject.key for reject in rejects}),
        ],
        layouts=songs.layouts,
    )


def _warnings_of(usable: pa.Table) -> list[str]:
    told = usable.filter(pc.is_valid(usable["warning"]))
    return [
        f"{key}: {text}"
        for key, text in zip(told["key"].to_pylist(), told["warning"].to_pylist(), strict=True)
    ]


def read_songs(folder: Store) -> pa.Table:
    """The songs that the last scan found usable, sorted by key: `SONG_SCHEMA`, mapped into memory from the file.

    Of a folder in object storage from a copy on this machine, which goes with the table.
    """
    with contextlib.ExitStack() as stack:
        path = folder.place_of(SONGS)
        if not folder.is_local:
            path = stack.enter_context(scratch_folder()) / SONGS
            folder.download(SONGS, path)
        with pa.ipc.open_file(pa.memory_map(str(path))) as file:
            if not has_types(file.schema, SONG_SCHEMA):
                raise pa.ArrowInvalid(f"{SONGS} has other columns than this version's")
            return file.read_all()


def decode_songs(songs: pa.Table, root: Store, recipe: Recipe) -> pa.Table:
    """Songs of `SONG_SCHEMA` → a row each, decoded or rejected, as `decoded_table` makes them."""
    outcomes: list[DecodedSong | Reject] = []
    for row in songs.to_pylist():
        song = Song(**json.loads(row["song"]))
        with plain_faults(song.key):
            versions = FileVersions(row["audio_version"], row["speaker_version"])
            outcomes += decode_song(root, song, recipe, versions)
    return decoded_table(outcomes)


def scan_songs(
    root: Store, songs: Sequence[Song], before: pa.Table, recipe: Recipe, tokenizer: LyricTokenizer
) -> tuple[pa.Table, int]:
    """The outcome of each song, a table of `SCAN_SCHEMA`, and how many were decoded for it.

    `before` has an earlier outcome for each, or nulls. It stands while the song's text, its files and the recipe are
    the same, unless it was storage that failed.
    """
    outcomes, scanned = [], 0
    for song, known in zip(songs, before.to_pylist(), strict=True):
        versions = file_versions(root, song)
        is_known = recipe.reject_fingerprint(song, versions) == known["fingerprint"]
        if not is_known or (known["reason"] is not None and RejectReason.of(known["reason"]).is_transient):
            known = _outcome(song, versions, recipe, _scan_song(root, song, versions, recipe, tokenizer))
            scanned += 1
        outcomes.append(known)
    return pa.Table.from_pylist(outcomes, schema=SCAN_SCHEMA), scanned


def _scan_song(
    root: Store, song: Song, versions: FileVersions, recipe: Recipe, tokenizer: LyricTokenizer
) -> DecodedSong | Reject:
    with plain_faults(song.key):
        (outcome,) = decode_song(root, song, recipe, versions)
        if isinstance(outcome, DecodedSong):
            lyrics = encode_lyrics(outcome, tokenizer, recipe)
            return lyrics if isinstance(lyrics, Reject) else outcome
        return outcome


def _outcome(
    song: Song, versions: FileVersions, recipe: Recipe, found: DecodedSong | Reject
) -> dict[str, Any]:
    if isinstance(found, DecodedSong):
        what = {"samples": found.wave.shape[1], "warning": found.warning}
    else:
        what = {"samples": None, "stage": found.stage, "reason": found.reason, "message": found.message}
    return {
        "key": song.key,
        "filename": song.filename,
        "fingerprint": recipe.reject_fingerprint(song, versions),
        "audio_version": versions.audio,
        "speaker_version": versions.speaker,
        **what,
    }


def _reject(row: Mapping[str, Any]) -> Reject:
    names = ("key", "filename", "stage", "reason", "message", "fingerprint", "audio_version")
    return Reject(**{name: row[name] for name in names}, song_key=row["key"])


def _in_tasks(
    songs: SongTable, before: pa.Table, recipe: Recipe, tokenizer: LyricTokenizer
) -> Iterator[tuple[pa.Table, int]]:
    """What `scan_songs` returns, with the songs' places in `songs`, as the tasks end."""
    task = ray.remote(num_cpus=DECODE_CPUS, max_retries=_RETRIES, scheduling_strategy="SPREAD")(scan_songs)
    shared = ray.put(tokenizer)
    known: dict[str, int] = {}
    for place, key in enumerate(before["key"].to_pylist()):
        known.setdefault(key, place)  # a scan that was interrupted put first what it found
    at_once = max(1, int(_TASKS_PER_CPU * cluster_cpus()))
    size = max(1, min(_SONGS_PER_TASK, len(songs) // at_once))
    todo = deque(list(range(i, min(i + size, len(songs)))) for i in range(0, len(songs), size))
    running: dict[ray.ObjectRef[Any], tuple[list[int], list[Song]]] = {}
    while todo or running:
        while todo and len(running) < at_once:
            places = todo.popleft()
            some = [Song.from_row(songs.row(place)) for place in places]
            earlier = before.take(pa.array([known.get(song.key) for song in some], pa.int64()))
            running[task.remote(songs.root, some, earlier, recipe, shared)] = places, some
        (ended,), _ = ray.wait(list(running))
        places, some = running.pop(ended)
        try:
            outcomes, scanned = ray.get(ended)
        except WorkerCrashedError:
            if len(places) > 1:
                todo.extend([place] for place in places)  # each alone: one of them is to blame
                continue
            outcomes, scanned = _ended_its_process(songs.root, some[0], recipe), 1
        yield outcomes.append_column(_PLACE, pa.array(places, pa.int64())), scanned


def _ended_its_process(root: Store, song: Song, recipe: Recipe) -> pa.Table:
    versions = file_versions(root, song)
    reason = RejectReason.CORRUPT
    message = f"reading the file has ended its process {_RETRIES + 1} times"
    reject = Reject(song.key, song.filename, reason.stage, reason.value, message)
    return pa.Table.from_pylist([_outcome(song, versions, recipe, reject)], schema=SCAN_SCHEMA)


# --- files -------------------------------------------------------------------------------------------------


def _read_scan(folder: Store) -> pa.Table:
    try:
        return table_from_bytes(folder.read_bytes(SCAN), SCAN_SCHEMA)
    except FileNotFoundError:
        return SCAN_SCHEMA.empty_table()


def _write_scan(folder: Store, tables: Sequence[pa.Table]) -> None:
    table = pa.concat_tables([table.select(SCAN_SCHEMA.names) for table in tables])
    folder.write_bytes(SCAN, table_to_bytes(table))


def _write_songs(folder: Store, songs: SongTable, usable: pa.Table) -> None:
    from acestep_ray.models.codec import latent_frames

    with folder.writer(SONGS) as file, pa.ipc.new_file(file, SONG_SCHEMA) as writer:
        for batch in usable.to_batches(max_chunksize=_SONGS_PER_BATCH):
            rows = [
                {
                    **outcome,
                    "latent_frames": latent_frames(outcome["samples"]),
                    "song": json.dumps(asdict(Song.from_row(songs.row(outcome[_PLACE.name])))),
                }
                for outcome in batch.to_pylist()
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=SONG_SCHEMA))


@contextlib.contextmanager
def _faults_explained() -> Iterator[None]:
    """Ray's errors as one message with the cause."""
    try:
        yield
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, InputError):
            raise cause from None
        raise AceStepError(
            f"the scan of the songs stopped: {cause}\n"
            "  → what it has found is kept; the same command goes on from there"
        ) from error
