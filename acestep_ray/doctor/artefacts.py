"""What jobs read: checkpoint directory, dataset, feature cache; and the server that they tell of themselves."""

from __future__ import annotations

from collections.abc import Iterator

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.parts import CacheDamagedError
from acestep_ray.cache.reader import CacheReader
from acestep_ray.data.audio import AudioFile
from acestep_ray.data.audio_source import AudioError
from acestep_ray.data.file_names import locate_file
from acestep_ray.data.songs import SongTable
from acestep_ray.doctor.finding import Finding, from_error, ok, problem, warning
from acestep_ray.errors import InputError, without_password
from acestep_ray.models.checkpoint import ACE_STEP_V1, SSL_FOLDERS, CheckpointDir
from acestep_ray.models.fingerprints import noted_sha256
from acestep_ray.paths import expand_home_in_uri, shell_command
from acestep_ray.tracking.local_database import database_of
from acestep_ray.tracking.mlflow_address import OFF, check_scheme
from acestep_ray.tracking.mlflow_errors import explain
from acestep_ray.tracking.mlflow_run import short_requests

SAMPLED = 5
"""Songs of a dataset or a cache that are looked at, evenly spread over it."""
TRACKING_SECONDS = 5

_FETCH = ("acestep-ray", "checkpoint", "fetch")


def check_checkpoint(checkpoint: CheckpointDir, *, fingerprint: bool) -> Iterator[Finding]:
    """What a whole checkpoint directory lacks, and whether it is the released one; `fingerprint` reads all of it."""
    path = checkpoint.path
    config = checkpoint.transformer_config
    parts = (
        f"{config.num_layers} layers of {config.inner_dim}; SSL {', '.join(checkpoint.ssl_names) or 'none'}"
    )
    files = {
        name: sha256
        for name, sha256 in ACE_STEP_V1.files.items()
        if fingerprint or name.endswith("config.json")
    }
    others = [
        name
        for name, sha256 in files.items()
        if not (path / name).is_file() or noted_sha256(path / name) != sha256
    ]
    what = "every file" if fingerprint else "every configuration"
    if not others:
        yield ok("checkpoint", f"whole: {parts}; {what} is the released one's ({path})")
    elif len(others) == len(files):
        yield ok("checkpoint", f"whole: {parts}; not the released one ({path})")
    else:
        yield warning(
            "checkpoint",
            f"whole: {parts}; not the released one in {', '.join(others)} ({path})",
            f"`{shell_command(*_FETCH, path)}` unless you changed it",
        )
    try:
        checkpoint.lyric_vocab_path()
    except InputError as error:
        yield from_error("checkpoint", error)
    absent = [name for name in config.ssl_names if name not in checkpoint.ssl_names]
    if absent:
        folders = ", ".join(f"{SSL_FOLDERS[name]}/" for name in absent)
        yield warning(
            "checkpoint",
            f"no {folders}: there will be no SSL features",
            f"`{shell_command(*_FETCH, path, '--only', ','.join(absent))}`, or train with --ssl_coeff 0",
        )


def check_dataset(place: str, split: str = "train") -> Finding:
    """How many songs there are, and whether the audio of some of them opens."""
    try:
        songs = SongTable.open(place, split)
    except InputError as error:
        return from_error("dataset", error)
    sampled = _spread(len(songs))
    failures = []
    for i in sampled:
        filename = songs.row(i)["filename"]
        try:
            with AudioFile(locate_file(songs.root, filename), fetch_whole=False):
                pass
        except (AudioError, InputError) as error:
            failures.append(str(error).splitlines()[0])
    found = f"{len(songs)} songs ({place})"
    if not failures:
        return ok("dataset", f"{found}; the audio of {len(sampled)} looked at opens")
    found = f"{found}; of {len(sampled)} looked at, {len(failures)} do not open: {failures[0]}"
    if len(failures) == len(sampled):
        return problem("dataset", found, "see that the audio lies where the dataset says, on every node")
    return warning("dataset", found, "precompute lists such songs in rejects/ and goes on")


def check_cache(place: str, checkpoint: CheckpointDir | None, *, fingerprint: bool) -> Iterator[Finding]:
    """Whether a feature cache is whole and some of its songs read, and whether `checkpoint` computed it."""
    try:
        reader = CacheReader(place, needs=())
    except InputError as error:
        yield from_error("cache", error)
        return
    index = reader.index
    damaged = []
    sampled = _spread(len(index))
    for i in sampled:
        try:
            reader.read(i)
        except CacheDamagedError as error:
            damaged.append(str(error).splitlines()[0])
    found = f"{len(index)} songs with {', '.join(index.features)} ({place})"
    if damaged:
        yield problem(
            "cache",
            f"{found}; of {len(sampled)} read, {len(damaged)} are damaged: {damaged[0]}",
            f"`{shell_command('acestep-ray', 'cache', 'verify', place)}` lists all that is wrong",
        )
    else:
        yield ok("cache", f"{found}; {len(sampled)} were read")
    if checkpoint is not None:
        yield _check_encoders(index, checkpoint, fingerprint)


def _check_encoders(index: CacheIndex, checkpoint: CheckpointDir, fingerprint: bool) -> Finding:
    remedy = "run precompute with this checkpoint, or give the one that it was computed with"
    width = checkpoint.transformer_config.text_embedding_dim
    if index.text_dim not in (None, width):
        return problem(
            "cache", f"its prompts have width {index.text_dim}, the checkpoint reads {width}", remedy
        )
    if not fingerprint:
        return ok("cache", "its widths are the checkpoint's; --fingerprint compares the models themselves")
    noted = index.manifest.get("checkpoint", {})
    parts = [part for part in ("codec", "text_encoder", *checkpoint.ssl_names) if part in noted]
    others = [part for part in parts if noted[part] != checkpoint.fingerprint(part)]
    if others:
        return problem("cache", f"computed with another {' and another '.join(others)}", remedy)
    return ok("cache", f"computed with this checkpoint's {', '.join(parts)}")


def check_tracking(uri: str) -> Finding:
    """Whether the MLflow server or database at `uri` answers."""
    if uri == OFF:
        return ok("tracking", "off")
    shown = without_password(uri)
    uri = expand_home_in_uri(uri)
    database = database_of(uri)
    if database is not None and not database.exists():
        return ok("tracking", f"the first run makes {shown}")  # to ask would be to make it
    try:
        from mlflow.tracking import MlflowClient
    except ImportError:
        return problem("tracking", f"MLflow is not installed ({shown})", "pip install mlflow, or `none`")
    try:
        check_scheme(uri)
    except InputError as error:
        return problem("tracking", f"{error.what} ({shown})", error.fix or "correct --tracking_uri")
    try:
        with short_requests(uri, TRACKING_SECONDS):
            MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # every kind of store and network has errors of its own
        cause = explain(error, uri)
        return problem(
            "tracking",
            f"MLflow at {shown} {'takes no runs' if cause.lasts else 'does not answer'} ({cause.what})",
            cause.fix,
        )
    return ok("tracking", f"MLflow answers at {shown}")


def _spread(count: int) -> list[int]:
    """At most `SAMPLED` positions from the first to the last of `count`."""
    if count <= SAMPLED:
        return list(range(count))
    return [round(i * (count - 1) / (SAMPLED - 1)) for i in range(SAMPLED)]
