"""What comes next, who is stopped, and what is noted, without a cluster."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher

from acestep_ray.errors import InputError
from acestep_ray.storage import Store
from acestep_ray.tuning.records import (
    DONE,
    FAILED,
    STOPPED,
    UNFINISHED,
    Records,
    check_same_search,
)
from acestep_ray.tuning.report import TuneSummary, trial_rows
from acestep_ray.tuning.search import OptunaTPE, Recorder, TrialSearch, build_scheduler, last_error, teach
from acestep_ray.tuning.space import read_space

SPACE = read_space(None, {"targets": "attention", "alpha": "2r", "dropout": "0", "ssl_coeff": "0"})
FIRST = {
    "rank": 16,
    "alpha": "2r",
    "learning_rate": 1e-4,
    "targets": "attention",
    "dropout": 0.0,
    "ssl_coeff": 0.0,
}


def search_in(folder, trials=6, space=SPACE, **options) -> TrialSearch:
    return TrialSearch(
        space,
        Records(folder),
        trials=trials,
        first=FIRST,
        seed=3,
        start=lambda record: None,
        **options,
    )


def measured(step: int, validation: float) -> dict:
    return {"step": step, "validation": validation, "train": validation - 0.1}


def all_params(search: TrialSearch) -> list[dict]:
    found = []
    while (suggested := search.suggest(f"id-{len(found)}")) != Searcher.FINISHED:
        found.append(suggested["params"])
    return found


def test_the_first_trial_is_a_run_without_a_search_and_the_others_are_drawn(tmp_path):
    params = all_params(search_in(tmp_path / "one"))
    assert params[0] == FIRST
    assert len(params) == 6
    assert all(params.count(one) == 1 for one in params)
    assert all_params(search_in(tmp_path / "two")) == params


def test_an_interrupted_search_goes_on_with_what_is_unfinished_and_draws_what_it_would_have(tmp_path):
    unbroken = all_params(search_in(tmp_path / "unbroken"))
    search = search_in(tmp_path / "broken")
    names = [search.suggest(f"id-{number}")["name"] for number in range(3)]
    search.records.note(names[0], measured(8, 0.5))
    search.records.end(names[0], DONE)
    search.records.end(names[2], FAILED, "out of memory")
    again = search_in(tmp_path / "broken")
    first = again.suggest("other-0")
    assert first["name"] == names[1]
    assert first["params"] == unbroken[1]
    assert [again.suggest(f"other-{number}")["params"] for number in (1, 2, 3)] == unbroken[3:]
    assert again.suggest("other-4") == Searcher.FINISHED


def test_no_more_trials_run_than_tune_has_room_for(tmp_path):
    search = ConcurrencyLimiter(search_in(tmp_path, trials=3), max_concurrent=2)
    assert search.suggest("a")["name"] == "trial-0000"
    assert search.suggest("b")["name"] == "trial-0001"
    assert search.suggest("c") is None
    search.on_trial_complete("a", {})
    assert search.suggest("c")["name"] == "trial-0002"
    search.on_trial_complete("b", {})
    assert search.suggest("d") == Searcher.FINISHED


def test_a_space_of_few_values_is_searched_once(tmp_path):
    space = read_space(
        None,
        {
            "rank": "choice(4, 16)",
            "learning_rate": "1e-4",
            "targets": "attention",
            "alpha": "2r",
            "dropout": "0",
            "ssl_coeff": "0",
        },
    )
    params = all_params(search_in(tmp_path, trials=6, space=space))
    assert sorted(one["rank"] for one in params) == [4, 16]


def test_optuna_learns_from_trials_of_this_sitting_and_of_earlier_ones(tmp_path):
    def loss(params):
        return abs(math.log10(params["learning_rate"]) + 3)

    def sitting(trials):
        records = Records(tmp_path)
        search = search_in(tmp_path, trials=trials, optuna=OptunaTPE(SPACE, records, seed=0))
        search.records = records
        number = 0
        while (suggested := search.suggest(f"id-{number}")) != Searcher.FINISHED:
            records.note(suggested["name"], measured(8, loss(suggested["params"])))
            records.end(suggested["name"], DONE)
            search.on_trial_complete(f"id-{number}", {})
            number += 1
        return [record.params for record in records]

    sitting(20)
    params = sitting(40)
    assert {one["rank"] for one in params} <= {4, 8, 16, 32, 64, 128, 256}
    early = sum(map(loss, params[:10])) / 10
    late = sum(map(loss, params[-10:])) / 10
    assert late < early / 2


def test_asha_lets_the_best_pass_and_stops_the_rest_at_a_rung():
    scheduler = build_scheduler("asha", total_steps=16, grace_steps=4, reduction_factor=2)
    good, bad = SimpleNamespace(trial_id="good"), SimpleNamespace(trial_id="bad")
    for trial in (good, bad):
        scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, good, measured(4, 0.5)) == TrialScheduler.CONTINUE
    assert scheduler.on_trial_result(None, bad, measured(4, 0.9)) == TrialScheduler.STOP


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_scheduler_compares_with_trials_of_earlier_sittings(tmp_path, name):
    records = Records(tmp_path)
    for number in range(4):
        record = records.add({**FIRST, "rank": 4 << number})
        for step in (4, 8):
            records.note(record.name, measured(step, 0.5 - 0.01 * number))
        records.end(record.name, DONE)

    class Trial:
        trial_id = "new"

    trial = Trial()

    def decision(known):
        scheduler = build_scheduler(name, total_steps=16, grace_steps=4, reduction_factor=2)
        teach(scheduler, known)
        scheduler.on_trial_add(None, trial)
        controller = SimpleNamespace(get_live_trials=list)
        return scheduler.on_trial_result(controller, trial, measured(4, 0.9))

    assert decision(records) == TrialScheduler.STOP
    assert decision([]) == TrialScheduler.CONTINUE


def trial_of(name: str, **last_result) -> SimpleNamespace:
    return SimpleNamespace(
        config={"name": name}, last_result=last_result, get_error=lambda: "Trace\nKilled: -9\n"
    )


def test_what_becomes_of_trials_is_noted_and_read_back(tmp_path):
    records, ended = Records(tmp_path), []
    recorder = Recorder(records, lambda record: ended.append(record.name))
    for rank in (4, 8, 16, 32, 64):
        records.add({**FIRST, "rank": rank})
    events = {
        "trial-0000": {**measured(16, 0.4), "is_last": True, "done": True},
        # Tune itself sets `done` on what its scheduler stops.
        "trial-0001": {**measured(4, 0.6), "is_last": False, "done": True},
        "trial-0002": {"step": 0, "validation": math.nan, "error": "diverged", "done": True},
        "trial-0003": {"step": 0, "validation": math.nan, "interrupted": True},
    }
    for name, result in events.items():
        recorder.on_trial_start(0, [], trial_of(name))
        recorder.on_trial_result(0, [], trial_of(name), result)
        recorder.on_trial_complete(0, [], trial_of(name, **result))
    recorder.on_trial_recover(0, [], trial_of("trial-0004"))
    recorder.on_trial_error(0, [], trial_of("trial-0004"))
    assert [record.state for record in Records(tmp_path)] == [DONE, STOPPED, FAILED, UNFINISHED, FAILED]
    found = {record.name: record for record in Records(tmp_path)}
    assert found["trial-0002"].error == "diverged"
    assert (found["trial-0004"].failures, found["trial-0004"].error) == (1, "Killed: -9")
    assert found["trial-0000"].validations == [measured(16, 0.4)]
    assert ended == ["trial-0000", "trial-0001", "trial-0002", "trial-0004"]


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        ("its process ended", "its process ended"),
        ("Trace\nKilled: -9\n", "Killed: -9"),
        (
            "ray.exceptions.RayTaskError: step()\n  File 'x.py', line 1: y\n"
            "acestep_ray.errors.GpuMemoryError: too small\n  → --share_base",
            "too small\n  → --share_base",
        ),
        (
            "Trace\n  File 'x.py'\ntorch.OutOfMemoryError: CUDA out of memory. GPU 0: full",
            "torch.OutOfMemoryError: CUDA out of memory. GPU 0: full",
        ),
    ],
)
def test_a_trials_error_is_told_whole_and_without_its_trace(trace, expected):
    assert last_error(trace) == expected


def test_a_trial_whose_disk_was_full_is_unfinished_and_the_command_says_so(tmp_path):
    records = Records(tmp_path)
    full, failed = (records.add({"rank": rank}) for rank in (2, 4))
    recorder = Recorder(records, lambda record: None)
    for record, is_full in ((full, True), (failed, False)):
        trial = SimpleNamespace(
            config={"name": record.name},
            last_result={"error": "no room on the disk", "is_disk_full": is_full},
        )
        recorder.on_trial_complete(1, [], trial)
    assert [record.state for record in Records(tmp_path)] == [UNFINISHED, FAILED]
    summary = TuneSummary(trial_rows(records), ["rank"], None, Store.at(tmp_path), None, 1.0, None)
    assert "1 of 2 trials are not finished: no room on the disk" in summary.unfinished
    records.end(full.name, DONE)
    assert TuneSummary(trial_rows(records), [], None, records.folder, None, 1.0, None).unfinished is None


def test_trials_are_ranked_by_their_lowest_validation_and_failed_ones_are_none(tmp_path):
    records = Records(tmp_path)
    for values, state in (
        ((0.5, 0.3, 0.6, math.nan), DONE),
        ((0.2,), FAILED),
        ((0.4, 0.35), STOPPED),
        ((), UNFINISHED),
    ):
        record = records.add({**FIRST, "rank": 4 << len(records)})
        for number, value in enumerate(values):
            records.note(record.name, measured(4 * (number + 1), value))
        records.end(record.name, state)
    assert [record.name for record in records.ranked()] == ["trial-0000", "trial-0002"]
    assert records["trial-0000"].best["step"] == 8


def test_a_trial_that_goes_on_from_its_checkpoint_replaces_what_it_had_reported_after(tmp_path):
    records = Records(tmp_path)
    name = records.add(FIRST).name
    for step in (4, 8, 12, 8):
        records.note(name, measured(step, 1 / step))
    assert [one["step"] for one in records[name].validations] == [4, 8]


def test_a_search_is_gone_on_with_only_as_it_was_begun(tmp_path):
    check_same_search(Store.at(tmp_path), {"space": {"rank": "log2int(4, 8)"}, "--max_steps": 8})
    check_same_search(Store.at(tmp_path), {"space": {"rank": "log2int(4, 8)"}, "--max_steps": 8})
    with pytest.raises(InputError, match=r"another space(?s:.*)log2int\(4, 8\)(?s:.*)log2int\(4, 16\)"):
        check_same_search(Store.at(tmp_path), {"space": {"rank": "log2int(4, 16)"}, "--max_steps": 8})


def test_a_damaged_record_is_named(tmp_path):
    name = Records(tmp_path).add(FIRST).name
    path = tmp_path / "trials" / name / "trial.json"
    path.write_text(json.dumps({"name": name, "colour": "red"}))
    with pytest.raises(InputError, match=r"trial\.json"):
        Records(tmp_path)
