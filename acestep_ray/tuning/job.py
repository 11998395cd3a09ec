"""The tune job: checks everything that can be checked, hands the trials to Ray Tune, and writes what was found."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, fields, replace
from typing import Any

import ray

from acestep_ray.cache.index import CacheIndex
from acestep_ray.config import TrainConfig, TuneConfig
from acestep_ray.errors import InputError
from acestep_ray.hints import one_of
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.plain_files import SETTINGS
from acestep_ray.plain_yaml import load_yaml
from acestep_ray.ray_runtime import StopSignal, connect, wait_for_first_node
from acestep_ray.storage import Store
from acestep_ray.terminal import show_summary
from acestep_ray.tracking import check_mlflow, mlflow_uri
from acestep_ray.training.checks import check_model, check_train_config
from acestep_ray.training.experiment import (
    MLFLOW_FILE,
    SETTINGS_FILE,
    known_mlflow_run,
    make_folder,
    only_run,
    run_identity,
    write_json,
)
from acestep_ray.training.holdout import hold_out
from acestep_ray.training.job import TrainSummary, count_steps, train
from acestep_ray.training.lora_config import DEFAULT_LORA, read_lora_config
from acestep_ray.training.songs import Songs, find_songs, open_songs
from acestep_ray.tuning.driver import VALIDATIONS, Search
from acestep_ray.tuning.records import check_same_search
from acestep_ray.tuning.report import TuneSummary, trial_rows
from acestep_ray.tuning.resources import reserve
from acestep_ray.tuning.runs import SearchRuns
from acestep_ray.tuning.search import SCHEDULERS, SEARCHERS
from acestep_ray.tuning.space import DIMENSIONS, Space, apply_params, read_space
from acestep_ray.tuning.trial import TrialPlan


def tune(config: TuneConfig) -> TuneSummary:
    """Search for the parameters with the lowest validation loss, or go on with a search that was interrupted.

    Raises InputError before work starts, and KeyboardInterrupt where the user ended it, with what is finished reported.
    """
    started = time.monotonic()
    folder = Store.at(config.exp_dir).child(config.exp_name)
    check_tune_config(config)
    space = read_space(config.space, {name: getattr(config, f"search_{name}") for name in DIMENSIONS})
    base, lora = base_settings(config, folder)
    checkpoint = CheckpointDir.open(base.checkpoint_dir)
    check_space(space, base, lora, checkpoint)
    tracking_uri = mlflow_uri(base.tracking_uri, base.logger_dir)
    with_ssl = replace(
        base, ssl_coeff=max(apply_params(p, base, lora)[0].ssl_coeff for p in space.extremes())
    )
    songs = open_songs(with_ssl, checkpoint)
    log_dir = Store.at(base.logger_dir).child(base.exp_name)
    make_folder(folder, "--exp_dir")
    make_folder(log_dir, "--logger_dir")
    with only_run(folder):
        if tracking_uri is not None and known_mlflow_run(folder, tracking_uri) is None:
            check_mlflow(tracking_uri, config.tracking_experiment, restore=config.restore_experiment)
        connect()
        wait_for_first_node(config.device, config.worker_resource)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        reserved = reserve(config, nodes, streamed=not isinstance(songs, CacheIndex))
        found = find_songs(songs, checkpoint, with_ssl, folder, reserved.use_gpu)
        held_out = held_out_songs(found, base)
        total_steps = count_steps(found.latent_frames, base, held_out)
        search = Search.prepare(config, base, lora, space, folder, total_steps)
        check_same_search(
            folder,
            {
                "space": space.describe(),
                "--max_steps": total_steps,
                "--val_check_interval": search.base.val_check_interval,
                **run_identity(
                    base, lora, songs=found.fingerprint, transformer=checkpoint.fingerprint("transformer")
                ),
            },
        )
        plan = TrialPlan(
            config=search.base,
            lora=lora,
            folder=folder,
            log_dir=log_dir,
            total_steps=total_steps,
            stream=found.stream,
            held_out=held_out,
            use_gpu=reserved.use_gpu,
            say=print,
            stop=StopSignal(),
            worker_cpus=reserved.worker_cpus,
        )
        show_summary(search.render(plan, reserved, len(found.recordings)))
        runs = SearchRuns(
            tracking_uri,
            search.records,
            base.exp_name,
            experiment=config.tracking_experiment,
            restore=config.restore_experiment,
        )
        begin_parent(runs, config, space, folder)
        interrupted = True
        try:
            interrupted = search.run(plan, reserved, runs)
        finally:
            best = search.write_results(runs, interrupted)
    summary = TuneSummary(
        trials=trial_rows(search.records),
        space=list(space.dimensions),
        best=best,
        folder=folder,
        tracking_uri=tracking_uri,
        wall_seconds=time.monotonic() - started,
        retrained=None,
    )
    if interrupted:
        show_summary(f"{summary.render()}\ninterrupted: the same command goes on from here")
        raise KeyboardInterrupt
    if best is not None and config.retrain_best is not None:
        summary.retrained = retrain(best, config.retrain_best)
    return summary


def check_tune_config(config: TuneConfig) -> None:
    """Raise InputError for values of the search's own settings that make no search."""
    for name in ("trials", "grace_steps", "retrain_best"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError("must be at least 1", where=f"--{name} {value}")
    if config.reduction_factor <= 1:
        raise InputError("must be above 1", where=f"--reduction_factor {config.reduction_factor:g}")
    for name, known in (("scheduler", SCHEDULERS), ("searcher", SEARCHERS)):
        if getattr(config, name) not in known:
            raise InputError(
                f"unknown {name}",
                where=f"--{name} {getattr(config, name)}",
                fix=one_of(getattr(config, name), known),
            )


def base_settings(config: TuneConfig, folder: Store) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings and the LoRA configuration of every trial, but for what is searched. Raises InputError."""
    given = config.lora_config_path
    lora = dict(DEFAULT_LORA) if given is None else read_lora_config(given)
    if "adapters" in lora:
        raise InputError("a search is for one adapter", where=f"--lora_config_path {given}")
    if lora.get("use_dora") and config.share_base:
        raise InputError(
            "DoRA reads the base model's weights, which trials cannot share then",
            where=f"--lora_config_path {given} --share_base",
            fix='set "use_dora" to false, or leave out --share_base',
        )
    if config.float8 and config.share_base:
        raise InputError(
            "weights in float8 hold one trial's LoRA",
            where="--float8 --share_base",
            fix="leave out one of them",
        )
    values = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    base = TrainConfig(**values | {"lora_config_path": given or folder.url_of("lora_config.json")})
    return check_train_config(replace(base, devices=config.workers_per_trial)), lora


def check_space(space: Space, base: TrainConfig, lora: dict[str, Any], checkpoint: CheckpointDir) -> None:
    """Raise InputError where the model has no such modules, or a rank is larger than a layer; needs no weights."""
    checked = set()
    for params in space.extremes():
        config, its = apply_params(params, base, lora)
        model = json.dumps([its["r"], its["target_modules"]])
        if model not in checked:
            checked.add(model)
            try:
                check_model(replace(config, lora_config_path="the search space"), its, checkpoint)
            except InputError as error:  # its remedy is for a file of the LoRA configuration
                raise InputError(
                    error.what,
                    where=error.where,
                    fix="change `rank` or `targets` in the file of --space, or give --search_rank, such as "
                    '"choice(4, 8)", or --search_targets',
                ) from None


def held_out_songs(found: Songs, base: TrainConfig) -> tuple[int, ...]:
    """The songs that the trials are compared on. Raises InputError where there are none."""
    held_out = hold_out(found.recordings, base.val_songs)
    if not len(held_out):
        recordings = len(set(found.recordings))
        raise InputError(
            f"there are no validation songs, which a search compares its trials on: {recordings} recordings, "
            "none of them held out",
            where=base.dataset_path if base.val_songs is None else f"--val_songs {base.val_songs}",
            fix=f"give --val_songs N, such as {max(1, recordings // 5)}",
        )
    return tuple(held_out.tolist())


def begin_parent(runs: SearchRuns, config: TuneConfig, space: Space, folder: Store) -> None:
    """Make or go on with the search's MLflow run, noted in its folder."""
    run_id = known_mlflow_run(folder, runs.uri)
    params = {**asdict(config), **{f"space.{name}": text for name, text in space.describe().items()}}
    run_id = runs.begin(params, run_id)
    if run_id is not None:
        write_json(folder, MLFLOW_FILE, {"tracking_uri": runs.uri, "run_id": run_id})


def retrain(best: Store, steps: int) -> TrainSummary:
    """Train the winner anew with so many steps, as an experiment of its own."""
    values = load_yaml(best.read_bytes(SETTINGS_FILE, SETTINGS))
    pace = max(1, steps // VALIDATIONS)
    return train(
        replace(
            TrainConfig(**values),
            max_steps=steps,
            epochs=-1,
            val_check_interval=pace,
            every_n_train_steps=pace,
        )
    )
