"""A search under way: its trials on Ray Tune, and the files that it leaves."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import ray
from ray import tune as ray_tune
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from acestep_ray.config import TrainConfig, TuneConfig
from acestep_ray.errors import InputError
from acestep_ray.ray_runtime import Console
from acestep_ray.storage import Store, scratch_folder, updated_folder
from acestep_ray.terminal import Progress, is_verbose, show_line
from acestep_ray.terminal.numbers import number_text
from acestep_ray.training.launch import fit_interruptibly
from acestep_ray.tuning.records import Records, TrialRecord
from acestep_ray.tuning.report import (
    BEST,
    REPORT,
    TABLE_FILE,
    trial_rows,
    write_best,
    write_report,
    write_table,
)
from acestep_ray.tuning.resources import Reserved
from acestep_ray.tuning.runs import SearchRuns
from acestep_ray.tuning.search import OptunaTPE, Recorder, StopWhenAsked, TrialSearch, build_scheduler, teach
from acestep_ray.tuning.space import Space, apply_params, default_params
from acestep_ray.tuning.trainable import TrialActor
from acestep_ray.tuning.trial import TrialPlan

if TYPE_CHECKING:
    from acestep_ray.tuning.host import SharedBaseHost

VALIDATIONS = 8
"""Of a trial, where the settings do not say."""
BEST_CHECKPOINTS = 3
"""How many of the best trials have their checkpoint in MLflow."""
# Ray Tune's own book, of no use after a sitting.
_RAY_FOLDER = "ray"


@dataclass
class Search:
    """A search under way."""

    config: TuneConfig
    base: TrainConfig
    """Settings of its trials' runs."""
    lora: dict[str, Any]
    space: Space
    folder: Store
    records: Records
    total_steps: int
    grace_steps: int
    """Steps before which no trial is stopped."""

    @classmethod
    def prepare(
        cls,
        config: TuneConfig,
        base: TrainConfig,
        lora: dict[str, Any],
        space: Space,
        folder: Store,
        total_steps: int,
    ) -> Search:
        """With the trials that there are already. Raises InputError for a grace that is longer than a trial."""
        pace = base.val_check_interval or max(1, total_steps // VALIDATIONS)
        grace = config.grace_steps or pace
        if grace > total_steps:
            raise InputError(
                f"a trial has {total_steps} steps, and would never be stopped",
                where=f"--grace_steps {grace}",
                fix="give less, or --scheduler none",
            )
        paced = replace(
            base,
            val_check_interval=pace,
            every_n_train_steps=pace,
            keep_last=1,
            exp_name=f"{base.exp_name}_best",  # of the run that repeats a trial
        )
        return cls(config, paced, lora, space, folder, Records(folder), total_steps, grace)

    def render(self, plan: TrialPlan, reserved: Reserved, songs: int) -> str:
        """What is about to be done, as text."""
        config = self.config
        over = sum(record.is_over for record in self.records)
        shared = f", on {len(reserved.hosts)} shared base models" if reserved.hosts else ""
        scheduler = {
            "asha": f"ASHA from step {self.grace_steps}, reduction factor {number_text(config.reduction_factor)}",
            "median": f"the median stopping rule from step {self.grace_steps}",
            "none": "no early stopping",
        }[config.scheduler]
        return "\n".join(
            [
                "search space",
                self.space.render(),
                f"{config.trials} trials of {self.total_steps} steps"
                + (f", {over} of them done already" if over else "")
                + f", {min(reserved.at_once, config.trials)} at a time{shared}; {config.searcher} search, {scheduler}",
                f"compared by the loss of {len(plan.held_out)} of {songs} songs, which are held out, "
                f"every {self.base.val_check_interval} steps",
            ]
        )

    def run(self, plan: TrialPlan, reserved: Reserved, runs: SearchRuns) -> bool:
        """Run the trials that are left; returns whether the user ended it."""
        left = sum(not r.is_over for r in self.records) + max(0, self.config.trials - len(self.records))
        if left == 0:
            return False
        optuna = None
        if self.config.searcher == "optuna":
            optuna = OptunaTPE(self.space, self.records, self.config.seed)
        scheduler = build_scheduler(
            self.config.scheduler,
            total_steps=self.total_steps,
            grace_steps=self.grace_steps,
            reduction_factor=self.config.reduction_factor,
        )
        teach(scheduler, self.records)
        searcher = TrialSearch(
            self.space,
            self.records,
            trials=self.config.trials,
            first=self.space.nearest(default_params(self.base, self.lora)),
            seed=self.config.seed,
            start=runs.start_trial,
            optuna=optuna,
        )
        if not is_verbose():
            quieten_tune()
        progress = Progress("searching", self.config.trials, "trials")

        def tell() -> None:
            over = sum(record.is_over for record in self.records)
            ranked = self.records.ranked()
            best = f"best {ranked[0].lowest:.4f}" if ranked else "no validation yet"
            progress.update(over, f"{len(searcher.running)} running", best)

        console, stopper = Console(), StopWhenAsked()
        stack = contextlib.ExitStack()
        plan = replace(plan, say=console.say)
        hosts = start_hosts(plan, reserved)
        actor = ray_tune.with_parameters(
            TrialActor,
            plan=[ray.put(plan)],
            stop=plan.stop,
            total_steps=plan.total_steps,
            hosts=hosts,
            workers=self.config.workers_per_trial,
        )
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(actor, reserved.per_trial),
            tune_config=ray_tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=left,
                max_concurrent_trials=reserved.at_once,  # without it, Tune starts one actor after another
                reuse_actors=True,  # a trial's process has loaded its libraries for the next one
            ),
            run_config=ray_tune.RunConfig(
                storage_path=stack.enter_context(rays_folder(self.folder)),
                name=_RAY_FOLDER,
                stop=stopper,
                callbacks=[Recorder(self.records, partial(self._ended, runs), tell)],
                failure_config=ray_tune.FailureConfig(max_failures=self.config.max_failures),
                # A trial's run writes its own.
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=int(is_verbose()),
            ),
        )

        def stop() -> None:
            plan.stop.request()
            stopper.is_asked = True

        try:
            with stack, progress, console:
                _, interrupted = fit_interruptibly(tuner.fit, stop)
        finally:
            for host in hosts:
                ray.kill(host)
        return interrupted

    def _ended(self, runs: SearchRuns, record: TrialRecord) -> None:
        runs.end_trial(record)
        loss = "" if record.best is None else f", lowest validation loss {record.lowest:.4f}"
        error = f": {record.error}" if record.error else ""
        show_line(f"{record.name} {record.state} at step {record.steps}{loss}{error}")

    def write_results(self, runs: SearchRuns, interrupted: bool) -> Store | None:
        """Write the table, the report and the winner, and give them to MLflow; returns the winner's folder."""
        for record in self.records:
            if not record.is_over:
                runs.interrupt_trial(record)
        rows = trial_rows(self.records)
        ranked = self.records.ranked()
        best = ranked[0] if ranked else None
        winner = self.folder.child(BEST)
        if best is not None:
            write_best(winner, best, self.records, *apply_params(best.params, self.base, self.lora))
        for record in ranked[:BEST_CHECKPOINTS]:
            checkpoint = self.records.best_checkpoint(record)
            if checkpoint is not None and not interrupted:
                runs.add_checkpoint(record, checkpoint)
        with updated_folder(self.folder) as folder:
            if rows:
                write_table(rows, folder / TABLE_FILE)
                write_report(folder / REPORT, rows, self.records, self.space.render())
            runs.finish("KILLED" if interrupted or not rows else "FINISHED", best, folder / REPORT)
        return None if best is None else winner


@contextlib.contextmanager
def rays_folder(search: Store) -> Iterator[str]:
    """A folder for Ray Tune's own book, in that of the search, or of this machine where that is in object storage."""
    if not search.is_local:
        with scratch_folder() as folder:
            yield str(folder)
        return
    shutil.rmtree(search.path / _RAY_FOLDER, ignore_errors=True)
    yield search.url
    shutil.rmtree(search.path / _RAY_FOLDER, ignore_errors=True)


def start_hosts(plan: TrialPlan, reserved: Reserved) -> list[ActorHandle[SharedBaseHost]]:
    """The actors that hold a shared base model each."""
    if not reserved.hosts:
        return []
    from acestep_ray.tuning.host import SharedBaseHost

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    hosts = []
    for host in reserved.hosts:
        actor = ray.remote(SharedBaseHost).options(
            num_cpus=host.cpus,
            num_gpus=host.gpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(nodes[host.node], soft=False),
            # Each trial may wait in one call while others begin and leave.
            max_concurrency=2 * host.seats + 2,
            max_restarts=plan.config.max_failures,
        )
        # Ray's type also has the class itself, for the sake of its methods.
        hosts.append(cast("ActorHandle[SharedBaseHost]", actor.remote(host.seats)))
    return hosts


def quieten_tune() -> None:
    """Let Tune write no tables, logs and working directories of its own: what becomes of a trial is told by us."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the newer one is never quiet
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
