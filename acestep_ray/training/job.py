"""The train job: checks everything that can be checked, then hands the loop to Ray Train."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

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
from acestep_ray.export.transformer import export_transformer
from acestep_ray.models.checkpoint import CheckpointDir, file_sha256
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.ray_runtime import Console, StopSignal, connect, has_gpus
from acestep_ray.storage import Store
from acestep_ray.tracking import (
    BUFFER_FILE,
    MLflowRun,
    Tracker,
    end_mlflow_run,
    environment_tags,
    mlflow_uri,
    start_mlflow_run,
)
from acestep_ray.training.experiment import (
    FINGERPRINTS,
    check_unchanged,
    make_folder,
    note_identity,
    only_run,
    run_identity,
)
from acestep_ray.training.holdout import hold_out, recordings_of_cache
from acestep_ray.training.leaving import SavingTorchConfig, leaving
from acestep_ray.training.lora import add_lora, load_lora, read_lora_config
from acestep_ray.training.model import choose_trained, initial_loras
from acestep_ray.training.scan import SONGS, read_songs, scan
from acestep_ray.training.state import Checkpoints, best_step, locate_checkpoint
from acestep_ray.training.streaming import Stream
from acestep_ray.training.worker import (
    TrainingDivergedError,
    WorkerPlace,
    WorkerSettings,
    build_plan,
    train_worker,
)

PRECISIONS = {
    "bf16-mixed": "bf16-mixed",
    "bf16-true": "bf16-true",
    "16-mixed": "16-mixed",
    **dict.fromkeys(("32", "32-true", "fp32"), "32"),
}
LIMITS = (
    (
        (
            "max_steps",
            "batch_size",
            "accumulate_grad_batches",
            "devices",
            "num_nodes",
            "every_n_train_steps",
            "every_plot_step",
        ),
        lambda value: value >= 1,
        "at least 1",
    ),
    (("learning_rate", "gradient_clip_val", "shift"), lambda value: value > 0, "above 0"),
    (
        (
            "weight_decay",
            "ssl_coeff",
            "warmup_steps",
            "num_workers",
            "seed",
            "keep_last",
            "max_failures",
            "early_stopping_patience",
            "reload_dataloaders_every_n_epochs",
        ),
        lambda value: value >= 0,
        "0 or more",
    ),
    (("val_songs",), lambda value: value is None or value >= 0, "0 or more"),
    (("val_check_interval", "min_devices"), lambda value: value is None or value >= 1, "at least 1"),
    (
        ("text_dropout", "speaker_dropout", "lyric_dropout", "activation_checkpointing"),
        lambda value: 0 <= value <= 1,
        "0 to 1",
    ),
)
EXPORT_FOLDER = "ace_step_transformer"
MLFLOW_FILE = "mlflow.json"
_SIGNAL_SECONDS = 0.2


@dataclass
class TrainSummary:
    """What a run made."""

    steps: int
    first_loss: float
    last_loss: float
    fixed_noise: dict[str, float]
    """Fixed-noise loss by step."""
    result: Path
    """The LoRA file of the last checkpoint, its folder where there are several, or the fine-tuned transformer's."""
    samples: list[Path]
    experiment: Path
    tracking_uri: str | None
    wall_seconds: float
    finished_before: bool
    """Whether there was nothing left to do."""
    validation: dict[str, float]
    """Loss of the held-out songs by step."""
    stopped_early: int | None
    """The step at which the validation loss had not fallen for long enough."""
    best: int | None
    """Step of the checkpoint with the lowest validation loss."""

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
        if len(self.validation) > 1:
            values = list(self.validation.values())
            lines.append(f"held out  {values[0]:.4f} → {values[-1]:.4f} (songs that were not trained on)")
        if self.stopped_early is not None:
            lines.append(f"stopped   at step {self.stopped_early}: the validation loss did not fall any more")
        if self.best not in (None, self.steps):
            lines.append(f"best      step {self.best} had the lowest validation loss")
        lines.append(f"result    {self.result}")
        lines += [f"sample    {path}" for path in self.samples[-1:]]
        if self.tracking_uri is not None:
            lines.append(f"MLflow    mlflow ui --backend-store-uri {self.tracking_uri}")
        return "\n".join(lines)


def train(config: TrainConfig) -> TrainSummary:
    """Train a LoRA or the model's own weights, from the last checkpoint if there is one.

    Raises InputError before work starts, and KeyboardInterrupt where the user ended it, with a checkpoint.
    """
    started = time.monotonic()
    config = check_train_config(config)
    checkpoint = CheckpointDir.open(config.checkpoint_dir)
    lora = None if config.lora_config_path is None else read_lora_config(config.lora_config_path)
    check_model(config, lora, checkpoint)
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
        found = find_songs(songs, checkpoint, config, Store.at(experiment), use_gpu)
        held_out = hold_out(found.recordings, config.val_songs)
        if len(held_out):
            print(f"{len(held_out)} of {len(found.recordings)} songs are held out for validation", flush=True)
        settings = WorkerSettings(
            config=config,
            lora=lora,
            checkpoints=Store.at(experiment / "checkpoints"),
            samples=experiment / "samples",
            log_dir=log_dir,
            mlflow_run=None,
            total_steps=count_steps(found.latent_frames, config, held_out),
            stream=found.stream,
            held_out=tuple(held_out.tolist()),
        )
        identity = run_identity(
            config, lora, songs=found.fingerprint, transformer=checkpoint.fingerprint("transformer")
        )
        if Checkpoints(settings.checkpoints).steps():
            check_unchanged(experiment, identity, allow_changes=config.allow_changes)
        done = finished_losses(settings)
        if done is None:
            note_identity(experiment, identity)
            losses = run_workers(prepare_experiment(experiment, settings, tracking_uri, identity), use_gpu)
        else:
            losses = done
            send_what_was_kept(experiment, settings)
    return TrainSummary(
        steps=losses["step"],
        first_loss=losses.get("first", math.nan),
        last_loss=losses.get("last", math.nan),
        fixed_noise=losses["fixed_noise"],
        result=find_result(settings, checkpoint, losses["step"], experiment),
        samples=sorted(settings.samples.rglob("*.wav"), key=lambda path: path.stat().st_mtime),
        experiment=experiment,
        tracking_uri=tracking_uri,
        wall_seconds=time.monotonic() - started,
        finished_before=done is not None,
        validation=losses["validation"],
        stopped_early=losses.get("stopped_early"),
        best=best_step(losses, Checkpoints(settings.checkpoints).steps()),
    )


def check_train_config(config: TrainConfig) -> TrainConfig:
    """Raise InputError for values that cannot be trained with; returns the settings with one name per precision."""
    for names, allowed, rule in LIMITS:
        for name in names:
            if not allowed(getattr(config, name)):
                raise InputError(f"must be {rule}", where=f"--{name} {getattr(config, name)}")
    if config.precision not in PRECISIONS:
        raise InputError(
            "unknown precision",
            where=f"--precision {config.precision}",
            fix=", ".join(sorted(set(PRECISIONS.values()))),
        )
    if config.gradient_clip_algorithm not in ("norm", "value"):
        where = f"--gradient_clip_algorithm {config.gradient_clip_algorithm}"
        raise InputError("unknown way to clip gradients", where=where, fix="norm or value")
    if Path(config.exp_name).name != config.exp_name or config.exp_name in (".", ".."):
        raise InputError("not a plain name", where=f"--exp_name {config.exp_name!r}", fix="use no slashes")
    if config.lora_config_path is None and config.init_lora_path is not None:
        raise InputError(
            "a LoRA to start from needs a configuration of the same size",
            where=f"--init_lora_path {config.init_lora_path}",
            fix="give --lora_config_path",
        )
    for name in ("train_parameters", "cpu_offload"):
        if config.lora_config_path is not None and getattr(config, name):
            raise InputError(
                "this is for training the model's own weights",
                where=f"--{name} {getattr(config, name)}",
                fix="leave it out, or leave out --lora_config_path",
            )
    workers = config.devices * config.num_nodes
    if config.min_devices is not None and config.min_devices > workers:
        raise InputError(
            f"more than the {workers} workers of the run", where=f"--min_devices {config.min_devices}"
        )
    if config.ckpt_path is not None:
        locate_checkpoint(config.ckpt_path)
    check_device_name(config.device)
    return replace(
        config,
        precision=PRECISIONS[config.precision],
        # Workers have a working directory of their own.
        checkpoint_dir=str(Path(config.checkpoint_dir).resolve()),
        dataset_path=Store.at(config.dataset_path).url,
        init_lora_path=config.init_lora_path and str(Path(config.init_lora_path).resolve()),
        ckpt_path=config.ckpt_path and Store.at(config.ckpt_path).url,
    )


def check_model(config: TrainConfig, lora: dict | None, checkpoint: CheckpointDir) -> None:
    """Raise InputError when what is to be trained is nothing that the model has; needs no weights."""
    with torch.device("meta"):
        transformer = ACEStepTransformer(checkpoint.transformer_config)
        if lora is not None:
            add_lora(transformer, lora, config.lora_config_path)
            for adapter, path in initial_loras(config.init_lora_path, lora).items():
                load_lora(transformer, path, adapter)
        else:
            choose_trained(transformer, config.train_parameters, with_ssl=config.ssl_coeff > 0)


def resolve_training_device(config: TrainConfig) -> bool:
    """Whether the workers take a GPU each. Raises InputError when there are too few of them."""
    use_gpu = config.device == "cuda" or (config.device == "auto" and has_gpus())
    resource = "GPU" if use_gpu else "CPU"
    available = int(ray.cluster_resources().get(resource, 0))
    workers = config.devices * config.num_nodes
    if available < (config.min_devices or workers):
        raise InputError(
            f"{workers} workers need a {resource} each, and there are {available}",
            where=f"--devices {config.devices}"
            + (f" --num_nodes {config.num_nodes}" * (config.num_nodes > 1)),
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


@dataclass(frozen=True)
class Songs:
    """The usable songs of a run, sorted by key."""

    latent_frames: np.ndarray
    """(songs,)."""
    recordings: list[str]
    """Which rows are of one recording: equal names."""
    fingerprint: str
    stream: Stream | None
    """Where there is no cache."""


def find_songs(
    songs: CacheIndex | SongTable,
    checkpoint: CheckpointDir,
    config: TrainConfig,
    experiment: Store,
    use_gpu: bool,
) -> Songs:
    """The songs of the cache, or of the scan that finds out which can be used."""
    if isinstance(songs, CacheIndex):
        recordings = recordings_of_cache(songs)
        return Songs(songs.latent_frames, recordings, songs.fingerprint, stream=None)
    stream = scan_for_stream(songs, checkpoint, config, experiment, use_gpu)
    encoders = [checkpoint.fingerprint(part) for part in ("codec", "text_encoder", *checkpoint.ssl_names)]
    fingerprint = hash_of(encoders, stream.recipe.models, file_sha256(experiment.path / SONGS))
    table = read_songs(stream.scan)
    recordings = [json.loads(song)["filename"] for song in table["song"].to_pylist()]
    return Songs(table["latent_frames"].to_numpy(), recordings, fingerprint, stream)


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


def count_steps(latent_frames: np.ndarray, config: TrainConfig, held_out: Sequence[int] = ()) -> int:
    """Steps of the run over songs of these lengths, (songs,). Raises InputError where a song fits into no batch."""
    plan = build_plan(latent_frames, config, held_out)
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
    check_encoders(index, checkpoint, config)
    if config.ssl_coeff == 0:
        return
    wanted = dict(zip(model.ssl_names, model.ssl_latent_dims, strict=True))
    if index.ssl_dims != wanted:
        raise InputError(
            f"the SSL losses need the features {wanted}, the cache has {index.ssl_dims or 'none'}",
            where=where,
            fix="run precompute with a checkpoint that holds mert/ and mhubert/, or train with --ssl_coeff 0",
        )


def check_encoders(index: CacheIndex, checkpoint: CheckpointDir, config: TrainConfig) -> None:
    """Raise InputError when the features come from other models than the checkpoint's, unless that is allowed."""
    noted = index.manifest.get("checkpoint", {})
    parts = ["codec", "text_encoder", *(checkpoint.ssl_names if config.ssl_coeff > 0 else ())]
    others = [part for part in parts if part in noted and noted[part] != checkpoint.fingerprint(part)]
    if others and not config.allow_changes:
        raise InputError(
            f"the cache was computed with another {' and another '.join(others)} than the checkpoint's",
            where=f"{config.dataset_path} and {config.checkpoint_dir}",
            fix="run precompute with this checkpoint, or train all the same with --allow_changes",
        )


def finished_losses(settings: WorkerSettings) -> dict | None:
    """The losses of a run that has done all its steps; None for one that has not."""
    state = Checkpoints(settings.checkpoints).latest_state()
    if state is None or (state["step"] < settings.total_steps and "stopped_early" not in state["losses"]):
        return None
    return {"step": state["step"], **state["losses"]}


def find_result(settings: WorkerSettings, checkpoint: CheckpointDir, step: int, experiment: Path) -> Path:
    """The LoRA file of a checkpoint, or the whole transformer, which is written from it."""
    checkpoints = Checkpoints(settings.checkpoints)
    if settings.lora is not None:
        folder = checkpoints.folder(step).path
        return folder if "adapters" in settings.lora else folder / LORA_FILE
    return export_transformer(checkpoint, checkpoints.read_weights(step), experiment / EXPORT_FOLDER)


def send_what_was_kept(experiment: Path, settings: WorkerSettings) -> None:
    """Send the metrics of a finished run that MLflow did not take while it ran."""
    noted = experiment / MLFLOW_FILE
    if noted.exists() and (settings.log_dir / BUFFER_FILE).exists():
        run = MLflowRun(**json.loads(noted.read_text(encoding="utf-8")))
        Tracker(settings.log_dir, run, first_step=settings.total_steps + 1).close()


def prepare_experiment(
    experiment: Path, settings: WorkerSettings, tracking_uri: str | None, identity: Mapping[str, Any]
) -> WorkerSettings:
    """Note the run's settings, and begin or continue its MLflow run, with what it trains on and with."""
    values = asdict(settings.config)
    (experiment / "train.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    if tracking_uri is None:
        return settings
    noted = experiment / MLFLOW_FILE
    known = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    run_id = known.get("run_id") if known.get("tracking_uri") == tracking_uri else None
    fingerprints = {f"fingerprint.{name}": str(identity[key]) for name, key in FINGERPRINTS.items()}
    tags = {**environment_tags(), **fingerprints}
    run = start_mlflow_run(tracking_uri, "acestep-ray", settings.config.exp_name, values, run_id, tags=tags)
    noted.write_text(json.dumps(asdict(run), indent=1), encoding="utf-8")
    return replace(settings, mlflow_run=run)


def run_workers(settings: WorkerSettings, use_gpu: bool) -> dict:
    """Run the loop on Ray Train's workers; returns the first worker's losses.

    Raises KeyboardInterrupt where the user ended the run.
    """
    config = settings.config
    console, stop = Console(), StopSignal()
    workers = config.devices * config.num_nodes
    trainer = TorchTrainer(
        # Not as `train_loop_config`, which Ray Train's controller would unpickle too, seconds of imports for nothing.
        partial(run_worker, settings, console.say, stop.asked),
        # NCCL moves what is on GPUs; what `cpu_offload` keeps in the host's memory takes gloo.
        torch_config=SavingTorchConfig(
            backend="cpu:gloo,cuda:nccl" if use_gpu and config.cpu_offload else None
        ),
        scaling_config=ScalingConfig(
            num_workers=workers if config.min_devices in (None, workers) else (config.min_devices, workers),
            use_gpu=use_gpu,
            resources_per_worker=reserved_by_worker(settings, use_gpu),
        ),
        run_config=RunConfig(
            # Ray keeps its book of checkpoints in the folder where we write them.
            storage_path=str(settings.checkpoints.path.parent),
            name=settings.checkpoints.path.name,
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    status = "FAILED"
    try:
        with console:
            result, interrupted = fit_interruptibly(trainer.fit, stop.request)
        outcome = result.return_value
        if isinstance(outcome, AceStepError):
            raise outcome
        if interrupted and outcome["step"] < settings.total_steps:
            print(
                f"stopped at step {outcome['step']}, which is saved: the same command goes on from there",
                flush=True,
            )
            raise KeyboardInterrupt
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


def fit_interruptibly(fit: Callable[[], Any], stop: Callable[[], None]) -> tuple[Any, bool]:
    """Call `fit`; returns its result, and whether it was asked to come to an end.

    SIGINT (Ctrl-C) and SIGTERM ask for that through `stop`, so that the last step is saved; a second one raises
    KeyboardInterrupt at once. Away from the main thread, signals are somebody else's.
    """
    if threading.current_thread() is not threading.main_thread():
        return fit(), False
    signals: list[int] = []

    def note(number: int, _frame: object) -> None:
        signals.append(number)
        if len(signals) > 1:
            raise KeyboardInterrupt
        print("stopping after this step, with a checkpoint; once more ends it at once", flush=True)
        stop()

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    # In a thread of its own Ray Train does not take the signals over.
    outcome: Future[Any] = Future()
    thread = threading.Thread(target=_fulfil, args=(outcome, fit), daemon=True)
    try:
        thread.start()
        while not outcome.done():
            thread.join(timeout=_SIGNAL_SECONDS)
        return outcome.result(), bool(signals)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _fulfil(outcome: Future[Any], work: Callable[[], Any]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:
        outcome.set_exception(error)


def reserved_by_worker(settings: WorkerSettings, use_gpu: bool) -> dict[str, float] | None:
    """What each worker reserves, None for Ray's default: where songs are streamed, half of the CPUs decode."""
    if settings.stream is None or use_gpu:
        return None
    workers = settings.config.devices * settings.config.num_nodes
    share = ray.cluster_resources()["CPU"] / 2 / workers
    return {"CPU": min(1.0, math.floor(share * 1000) / 1000)}


def run_worker(
    settings: WorkerSettings, say: Callable[[str], None], asked_to_stop: Callable[[], bool]
) -> dict | AceStepError:
    """What Ray Train runs in each worker.

    Our own errors come back as a value, for starting again would not mend them; but not one that the other workers may
    not have met: they would wait for this one without end.
    """
    context = ray.train.get_context()
    place = WorkerPlace(
        rank=context.get_world_rank(),
        workers=context.get_world_size(),
        device=ray.train.torch.get_device(),
        asked_to_stop=asked_to_stop,
        asked_to_save=leaving.asked,
        saved=leaving.saved.set,
        preempted=lambda: ray.train.get_preemption_info() is not None,
    )
    try:
        with leaving:
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
