"""Ray Tune's side of a search: which parameters come next, which trials are stopped, and what is noted of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from acestep_ray.errors import InputError
from acestep_ray.training.settings import nobody
from acestep_ray.tuning.records import DONE, FAILED, STOPPED, UNFINISHED, Records, TrialRecord
from acestep_ray.tuning.space import Params, Space

OBJECTIVE = "validation"
SCHEDULERS = ("asha", "median", "none")
SEARCHERS = ("random", "optuna")
# How often a draw is repeated before a space of few values counts as searched.
_DRAWS = 200


class TrialSearch(Searcher):
    """Gives Tune the trials: unfinished ones first, then the settings without a search, then drawn ones."""

    def __init__(
        self,
        space: Space,
        records: Records,
        *,
        trials: int,
        first: Params,
        seed: int,
        start: Callable[[TrialRecord], Any],
        optuna: OptunaTPE | None = None,
    ):
        """`trials` in all, those of earlier sittings included; `first` are the parameters of the first one.

        `start` is called with every trial before it begins and returns its MLflow run.
        """
        super().__init__(metric=OBJECTIVE, mode="min")
        self.space, self.records, self.optuna = space, records, optuna
        self.trials, self.first, self.seed, self.start = trials, first, seed, start
        self.unfinished = [record for record in records if not record.is_over]
        self.running: dict[str, str] = {}
        """Name of the trial by Tune's id."""

    def suggest(  # type: ignore[override]  # `Searcher.FINISHED` is a text, which Ray's own type leaves out
        self, trial_id: str
    ) -> dict[str, Any] | str:
        """The configuration of the next trial."""
        record = self._next()
        if record is None:
            return Searcher.FINISHED
        self.running[trial_id] = record.name
        return {"name": record.name, "params": record.params, "mlflow_run": self.start(record)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Learn from a trial that is over."""
        name = self.running.pop(trial_id, None)
        if name is not None and self.optuna is not None:
            self.optuna.learn(self.records[name])

    def _next(self) -> TrialRecord | None:
        if self.unfinished:
            return self.unfinished.pop(0)
        if len(self.records) >= self.trials:
            return None
        if not len(self.records):
            return self.records.add(self.first)
        known = [record.params for record in self.records]
        for draw in range(_DRAWS):
            if self.optuna is not None and draw == 0:
                params = self.optuna.ask(f"trial-{len(self.records):04d}")
            else:
                params = self.space.sample(self.seed, len(self.records), draw)
            if params not in known:
                return self.records.add(params)
        return None

    def save(self, checkpoint_path: str) -> None:
        """The records are what a search goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """Likewise."""


class OptunaTPE:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., 2011) behind Ray Tune's `OptunaSearch`."""

    def __init__(self, space: Space, records: Iterable[TrialRecord], seed: int):
        """Knows the trials that are over already. Raises InputError where Optuna is missing."""
        try:
            import optuna
        except ImportError:
            raise InputError(
                "Optuna is not installed",
                where="--searcher optuna",
                fix="pip install 'acestep-ray[search]', or --searcher random",
            ) from None
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = space
        records = list(records)
        self.search = OptunaSearch(
            {name: one.optuna() for name, one in space.dimensions.items()},
            metric=OBJECTIVE,
            mode="min",
            seed=seed + len(records),  # a later sitting does not draw what an earlier one has drawn
        )
        self.asked: set[str] = set()
        for record in records:
            if record.is_over:
                self.learn(record)

    def ask(self, name: str) -> Params:
        """The parameters that Optuna would try next."""
        self.asked.add(name)
        found = self.search.suggest(name)
        assert found is not None, "this search has no end of its own"
        return {key: one.from_optuna(found[key]) for key, one in self.space.dimensions.items()}

    def learn(self, record: TrialRecord) -> None:
        """Tell Optuna how well a trial did; one that failed, that it failed."""
        best = None if record.state == FAILED else record.best
        if record.name in self.asked:
            result = None if best is None else {OBJECTIVE: best["validation"]}
            self.search.on_trial_complete(record.name, result, error=best is None)
        elif best is not None:
            params = {key: one.to_optuna(record.params[key]) for key, one in self.space.dimensions.items()}
            self.search.add_evaluated_point(params, best["validation"])


def build_scheduler(
    name: str, *, total_steps: int, grace_steps: int, reduction_factor: float
) -> TrialScheduler:
    """The scheduler of this name, of `SCHEDULERS`.

    ASHA (Li et al., 2018, arXiv:1810.05934) lets the best 1 / `reduction_factor` of the trials pass a rung, from
    `grace_steps` on; the median rule (Golovin et al., 2017) stops a trial that is worse than the others' median.
    """
    if name == "asha":
        return ASHAScheduler(
            time_attr="step",
            metric=OBJECTIVE,
            mode="min",
            max_t=total_steps,
            grace_period=grace_steps,
            reduction_factor=reduction_factor,
        )
    if name == "median":
        return MedianStoppingRule(time_attr="step", metric=OBJECTIVE, mode="min", grace_period=grace_steps)
    return FIFOScheduler()


def teach(scheduler: TrialScheduler, records: Iterable[TrialRecord]) -> None:
    """Show a scheduler how far the trials of earlier sittings came, which it would compare others with."""
    # Of Tune's controller and its trials, schedulers ask no more than this.
    controller: Any = SimpleNamespace(get_live_trials=list)
    for record in records:
        if record.validations and record.is_over:
            trial: Any = _Known(record.name)
            scheduler.on_trial_add(controller, trial)
            for measured in record.validations:
                scheduler.on_trial_result(controller, trial, dict(measured))


class _Known:
    """Stands for a trial that is over, in a scheduler's books."""

    def __init__(self, name: str):
        self.trial_id = name

    def __str__(self) -> str:
        return self.trial_id


class Recorder(Callback):
    """Notes what becomes of the trials."""

    def __init__(
        self, records: Records, ended: Callable[[TrialRecord], None], changed: Callable[[], None] = nobody
    ):
        """`ended` is called with every trial that is over, `changed` whenever something is noted."""
        self.records = records
        self.ended = ended
        self.changed = changed

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a pickle of it, which no terminal goes into.
        return {**self.__dict__, "changed": nobody}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Begin to count its time."""
        self.records.begin(trial.config["name"])
        self.changed()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Note a validation."""
        if "error" not in result and "interrupted" not in result:
            self.records.note(trial.config["name"], result)
            self.changed()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note whether it came to its end or was stopped."""
        name, result = trial.config["name"], trial.last_result
        if "interrupted" in result:
            return
        if "error" in result:
            # Once there is room the same command continues the trial.
            self._end(name, UNFINISHED if result.get("is_disk_full") else FAILED, result["error"])
        else:
            self._end(name, DONE if result.get("is_last") else STOPPED)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note a failure after which it is started again."""
        self.records.fail(trial.config["name"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note a failure that was one too many."""
        self._end(trial.config["name"], FAILED, last_error(trial.get_error() or "its process ended"))

    def _end(self, name: str, state: str, error: str | None = None) -> None:
        self.records.end(name, state, error)
        self.ended(self.records[name])
        self.changed()


def last_error(trace: str) -> str:
    """What a traceback ends with: the error's message, without a type of ours before it."""
    lines = trace.strip().splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*: ", line)]
    message = "\n".join(lines[starts[-1] :] if starts else lines[-1:])
    return re.sub(r"^acestep_ray\.[\w.]+: ", "", message)


class StopWhenAsked(Stopper):
    """Ends all trials once it was asked to; `stop_all` is looked at in every round of Tune."""

    def __init__(self) -> None:
        self.is_asked = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is ended for its own sake."""
        return False

    def stop_all(self) -> bool:
        """Whether it was asked."""
        return self.is_asked
