"""The train job: checks everything that can be checked, then hands the loop to Ray Train."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import yaml
from ray.train import CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.schema import FEATURE_GROUPS, INCOMING, MANIFEST, hash_of
from acestep_ray.cache.songs import Recipe, Settings
from acestep_ray.config import PrecomputeConfig, TrainConfig
from acestep_ray.data.lyrics import LyricTokenizer
from acestep_ray.data.songs import SongTable
from acestep_ray.device import check_device_name
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.export.lora import LORA_FILE
from acestep_ray.models.checkpoint import CheckpointDir, file_sha256
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.ray_runtime import Console, connect, has_gpus
from acestep_ray.storage import Store
from acestep_ray.tracking import end_mlflow_run, mlflow_uri, start_mlflow_run
from acestep_ray.training.experiment import (
    check_unchanged,
    make_folder,
    note_identity,
    only_run,
    run_identity,
)
from acestep_ray.training.lora import add_lora, read_lora_config
from acestep_ray.training.scan import SONGS, read_songs, scan
from acestep_ray.training.state import Checkpoints
from acestep_ray.training.streaming import Stream
from acestep_ray.training.worker import (
    TrainingDivergedError,
    WorkerPlace,
    WorkerSettings,
    build_plan,
    train_worker,
)

PRECISIONS = {"bf16-mixed": "bf16-mixed", "32": "32", "32-true": "32", "fp32": "32"}
LIMITS = (
    (
        (
            "max_steps",
            "batch_size",
            "accumulate_grad_batches",
            "devices",
            "every_n_train_steps",
            "every_plot_step",
        ),
        lambda value: value >= 1,
        "at least 1",
    ),
    (("learning_rate", "gradient_clip_val", "shift"), lambda value: value > 0, "above 0"),
    (
        ("weight_decay", "ssl_coeff", "warmup_steps", "num_workers", "seed", "keep_last"),
        lambda value: value >= 0,
        "0 or more",
    ),
    (
        ("text_dropout", "speaker_dropout", "lyric_dropout"),
        lambda value: 0 <= value <= 1,
        "a probability, 0 to 1",
    ),
)
# A worker that dies is started again this often, from the last checkpoint.
MAX_FAILURES = 3


@dataclass
class TrainSummary:
    """What a run made."""

    steps: int
    first_loss: float
    last_loss: float
    fixed_noise: dict[str, float]
    """Fixed-noise loss by step."""
    lora: Path
    samples: list[Path]
    experiment: Path
    tracking_uri: str | None
    wall_seconds: float
    finished_before: bool
    """Whether there was nothing left to do."""

    def render(self) -> str:
        """The summary as text."""
        lines = []
        if self.finished_before:
            lines.append(
                f"already finished at step {self.steps}; raise --max_steps or use another --exp_name"
            )
        lines.append(f"steps     {self.steps} in {self.wall_seconds:.1f} s")
        lines.append(f"loss      {self.first_loss:.4f} → {self.last_loss:.4f} (first to last step)")
        if len(self.fixed_noise) > 1:
            values = list(self.fixed_noise.values())
            lines.append(
                f"fixed     {values[0]:.4f} → {values[-1]:.4f} (same songs, same noise, before and after)"
            )
        lines.append(f"LoRA      {self.lora}")
        lines += [f"sample    {path}" for path in self.samples[-1:]]
        if self.tracking_uri is not None:
            lines.append(f"MLflow    mlflow ui --backend-store-uri {self.tracking_uri}")
        return "\n".join(lines)


def train(config: TrainConfig) -> TrainSummary:
    """Train a LoRA, from its last checkpoint if there is one. Raises InputError before work starts."""
    started = time.monotonic()
    config = check_train_config(config)
    checkpoint = CheckpointDir.open(config.checkpoint_dir)
    lora = read_lora_config(config.lora_config_path)
    check_lora_fits(lora, checkpoint, config.lora_config_path)
    tracking_uri = mlflow_uri(config.tracking_uri, Path(config.logger_dir))

    experiment = Path(config.exp_dir).resolve() / config.exp_name
    songs = open_songs(config, checkpoint)
    if isinstance(songs, CacheIndex):
        count_steps(songs.latent_frames, config)  # refuses a batch that is too small for a song
    log_dir = Path(config.logger_dir).resolve() / config.exp_name
    make_folder(experiment, "--exp_dir")
    make_folder(log_dir, "--logger_dir")
    with only_run(experiment):
        connect()
        use_gpu = resolve_training_device(config)
        lengths, fingerprint, stream = find_songs(songs, checkpoint, config, Store.at(experiment), use_gpu)
        settings = WorkerSettings(
            config=config,
            lora=lora,
            checkpoints=Store.at(experiment / "checkpoints"),
            samples=experiment / "samples",
            log_dir=log_dir,
            mlflow_run=None,
            total_steps=count_steps(lengths, config),
            stream=stream,
        )
        identity = run_identity(
            config, lora, songs=fingerprint, transformer=checkpoint.fingerprint("transformer")
        )
        if Checkpoints(settings.checkpoints).steps():
            check_unchanged(experiment, identity, allow_changes=config.allow_changes)
        done = finished_losses(settings)
        if done is None:
            note_identity(experiment, identity)
            losses = run_workers(prepare_experiment(experiment, settings, tracking_uri), use_gpu)
        else:
            losses = done
    return TrainSummary(
        steps=losses["step"],
        first_loss=losses.get("first", math.nan),
        last_loss=losses.get("last", math.nan),
        fixed_noise=losses["fixed_noise"],
        lora=Checkpoints(settings.checkpoints).folder(losses["step"]).path / LORA_FILE,
        samples=sorted(settings.samples.rglob("*.wav"), key=lambda path: path.stat().st_mtime),
        experiment=experiment,
        tracking_uri=tracking_uri,
        wall_seconds=time.monotonic() - started,
        finished_before=done is not None,
    )


def check_train_config(config: TrainConfig) -> TrainConfig:
    """Raise InputError for values that cannot be trained with; returns the settings with one name per precision."""
    for names, allowed, rule in LIMITS:
        for name in names:
            if not allowed(getattr(config, name)):
                raise InputError(f"must be {rule}", where=f"--{name} {getattr(config, name)}")
    if config.precision not in PRECISIONS:
        raise InputError("unknown precision", where=f"--precision {config.precision}", fix="bf16-mixed or 32")
    if config.gradient_clip_algorithm not in ("norm", "value"):
        where = f"--gradient_clip_algorithm {config.gradient_clip_algorithm}"
        raise InputError("unknown way to clip gradients", where=where, fix="norm or value")
    if Path(config.exp_name).name != config.exp_name or config.exp_name in (".", ".."):
        raise InputError("not a plain name", where=f"--exp_name {config.exp_name!r}", fix="use no slashes")
    if config.lora_config_path is None:
        raise InputError(
            "no LoRA configuration",
            where="--lora_config_path",
            fix="give lora_config.json; training all weights is not there yet",
        )
    check_device_name(config.device)
    return replace(
        config,
        precision=PRECISIONS[config.precision],
        # Workers have a working directory of their own.
        checkpoint_dir=str(Path(config.checkpoint_dir).resolve()),
        dataset_path=Store.at(config.dataset_path).url,
    )


def check_lora_fits(lora: dict, checkpoint: CheckpointDir, where: str) -> None:
    """Raise InputError when the LoRA configuration names modules that the model lacks; needs no weights."""
    with torch.device("meta"):
        add_lora(ACEStepTransformer(checkpoint.transformer_config), lora, where)


def resolve_training_device(config: TrainConfig) -> bool:
    """Whether the workers take a GPU each. Raises InputError when there are too few of them."""
    use_gpu = config.device == "cuda" or (config.device == "auto" and has_gpus())
    resource = "GPU" if use_gpu else "CPU"
    available = int(ray.cluster_resources().get(resource, 0))
    if available < config.devices:
        raise InputError(
            f"{config.devices} workers need a {resource} each, and there are {available}",
            where=f"--devices {config.devices}",
            fix="use fewer devices, or a larger cluster",
        )
    return use_gpu


def open_songs(config: TrainConfig, checkpoint: CheckpointDir) -> CacheIndex | SongTable:
    """The feature cache, or the songs themselves. Raises InputError for what the model cannot be trained on."""
    place = Store.at(config.dataset_path)
    if place.status(MANIFEST) is not None or place.names(INCOMING):
        index = CacheIndex.open(place)
        check_cache_fits(index, checkpoint, config)
        return index
    songs = SongTable.open(config.dataset_path)
    missing = [name for name in checkpoint.transformer_config.ssl_names if name not in checkpoint.ssl_names]
    if config.ssl_coeff > 0 and missing:
        raise InputError(
            f"the SSL losses need the features of {' and '.join(missing)}, the checkpoint has no such encoder",
            where=config.checkpoint_dir,
            fix="give a checkpoint that holds mert/ and mhubert/, or train with --ssl_coeff 0",
        )
    checkpoint.lyric_vocab_path()
    return songs


def find_songs(
    songs: CacheIndex | SongTable,
    checkpoint: CheckpointDir,
    config: TrainConfig,
    experiment: Store,
    use_gpu: bool,
) -> tuple[np.ndarray, str, Stream | None]:
    """Latent frames of the usable songs (songs,), their fingerprint, and the stream where there is no cache."""
    if isinstance(songs, CacheIndex):
        return songs.latent_frames, songs.fingerprint, None
    stream = scan_for_stream(songs, checkpoint, config, experiment, use_gpu)
    encoders = [checkpoint.fingerprint(part) for part in ("codec", "text_encoder", *checkpoint.ssl_names)]
    fingerprint = hash_of(encoders, stream.recipe.models, file_sha256(experiment.path / SONGS))
    return read_songs(stream.scan)["latent_frames"].to_numpy(), fingerprint, stream


def scan_for_stream(
    songs: SongTable, checkpoint: CheckpointDir, config: TrainConfig, experiment: Store, use_gpu: bool
) -> Stream:
    """Find out which songs can be used, with the settings of a cache that was computed without any flags."""
    print(
        f"{config.dataset_path} is no feature cache: every epoch decodes and encodes its songs again. "
        "`acestep-ray precompute` does that once, and training on its cache gives the same numbers.",
        flush=True,
    )
    defaults = PrecomputeConfig(dataset_path="", checkpoint_dir="", output_dir="")
    tokenizer = LyricTokenizer.from_file(checkpoint.lyric_vocab_path())
    settings = Settings(
        window=defaults.window,
        window_seconds=defaults.window_seconds,
        loudness_lufs=defaults.loudness_lufs,
        tag_shuffles=defaults.tag_shuffles,
        ssl_frame_stride=defaults.ssl_frame_stride,
        seed=defaults.seed,
        speaker_dim=checkpoint.transformer_config.speaker_embedding_dim,
    )
    recipe = Recipe(settings, {"lyric_tokenizer": tokenizer.fingerprint})
    print(scan(songs, recipe, tokenizer, experiment).render(), flush=True)
    features = FEATURE_GROUPS if config.ssl_coeff > 0 else tuple(g for g in FEATURE_GROUPS if g != "ssl")
    encoding = replace(settings, features=features, precision="16" if use_gpu else "32")
    return Stream(songs.root, experiment, str(checkpoint.path), replace(recipe, settings=encoding))


def count_steps(latent_frames: np.ndarray, config: TrainConfig) -> int:
    """Steps of the run over songs of these lengths, (songs,). Raises InputError where a song fits into no batch."""
    plan = build_plan(latent_frames, config)
    if config.epochs > 0:
        return min(config.max_steps, plan.steps_in_epochs(config.epochs))
    return config.max_steps


def check_cache_fits(index: CacheIndex, checkpoint: CheckpointDir, config: TrainConfig) -> None:
    """Raise InputError when the cache was computed for a model of other sizes, or lacks what the losses need."""
    model = checkpoint.transformer_config
    where = config.dataset_path
    fix = "run precompute with this checkpoint"
    if index.text_dim != model.text_embedding_dim:
        raise InputError(
            f"the cache's prompts have width {index.text_dim}, the model reads {model.text_embedding_dim}",
            where=where,
            fix=fix,
        )
    if config.ssl_coeff == 0:
        return
    wanted = dict(zip(model.ssl_names, model.ssl_latent_dims, strict=True))
    if index.ssl_dims != wanted:
        raise InputError(
            f"the SSL losses need the features {wanted}, the cache has {index.ssl_dims or 'none'}",
            where=where,
            fix="run precompute with a checkpoint that holds mert/ and mhubert/, or train with --ssl_coeff 0",
        )


def finished_losses(settings: WorkerSettings) -> dict | None:
    """The losses of a run that has done all its steps; None for one that has not."""
    state = Checkpoints(settings.checkpoints).latest_state()
    if state is None or state["step"] < settings.total_steps:
        return None
    return {"step": state["step"], **state["losses"]}


def prepare_experiment(
    experiment: Path, settings: WorkerSettings, tracking_uri: str | None
) -> WorkerSettings:
    """Note the run's settings, and begin or continue its MLflow run."""
    values = asdict(settings.config)
    (experiment / "train.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    if tracking_uri is None:
        return settings
    noted = experiment / "mlflow.json"
    known = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    run_id = known.get("run_id") if known.get("tracking_uri") == tracking_uri else None
    run = start_mlflow_run(tracking_uri, "acestep-ray", settings.config.exp_name, values, run_id)
    noted.write_text(json.dumps(asdict(run), indent=1), encoding="utf-8")
    return replace(settings, mlflow_run=run)


def run_workers(settings: WorkerSettings, use_gpu: bool) -> dict:
    """Run the loop on Ray Train's workers; returns the first worker's losses."""
    console = Console()
    trainer = TorchTrainer(
        # Not as `train_loop_config`, which Ray Train's controller would unpickle too, seconds of imports for nothing.
        partial(run_worker, settings, console.say),
        scaling_config=ScalingConfig(
            num_workers=settings.config.devices,
            use_gpu=use_gpu,
            resources_per_worker=reserved_by_worker(settings, use_gpu),
        ),
        run_config=RunConfig(
            # Ray keeps its book of checkpoints in the folder where we write them.
            storage_path=str(settings.checkpoints.path.parent),
            name=settings.checkpoints.path.name,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    status = "FAILED"
    try:
        with console, interruptible():
            outcome = trainer.fit().return_value
        if isinstance(outcome, AceStepError):
            raise outcome
        status = "FINISHED"
        return outcome
    except TrainingFailedError as error:
        ours = [e for e in getattr(error, "worker_failures", {}).values() if isinstance(e, AceStepError)]
        raise ours[0] if ours else AceStepError(f"training failed\n{error}") from error
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if settings.mlflow_run is not None:
            end_mlflow_run(settings.mlflow_run, status)


def reserved_by_worker(settings: WorkerSettings, use_gpu: bool) -> dict[str, float] | None:
    """What each worker reserves, None for Ray's default: where songs are streamed, half of the CPUs decode."""
    if settings.stream is None or use_gpu:
        return None
    share = ray.cluster_resources()["CPU"] / 2 / settings.config.devices
    return {"CPU": min(1.0, math.floor(share * 1000) / 1000)}


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C as a KeyboardInterrupt: Ray Train takes the signal over, ends the run in order, and calls `sys.exit`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, handler)


def run_worker(settings: WorkerSettings, say: Callable[[str], None]) -> dict | AceStepError:
    """What Ray Train runs in each worker.

    Our own errors come back as a value, for starting again would not mend them; but not one that the other workers may
    not have met: they would wait for this one without end.
    """
    context = ray.train.get_context()
    place = WorkerPlace(
        rank=context.get_world_rank(),
        workers=context.get_world_size(),
        device=ray.train.torch.get_device(),
    )
    try:
        return train_worker(settings, place, report_to_ray, say)
    except AceStepError as error:
        if place.workers > 1 and not isinstance(error, TrainingDivergedError):
            raise
        return error


def report_to_ray(metrics: dict[str, float], checkpoint: Store | None) -> None:
    """Tell Ray Train of a checkpoint; all workers meet here."""
    ray.train.report(
        metrics,
        checkpoint=None if checkpoint is None else ray.train.Checkpoint(str(checkpoint.path)),
        # It is written where it belongs already.
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
    )
