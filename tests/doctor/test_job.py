from __future__ import annotations

import json
import threading

import pytest

from acestep_ray import cli
from acestep_ray.doctor import job
from acestep_ray.doctor.finding import ok, problem, warning
from acestep_ray.doctor.job import DoctorReport, doctor
from acestep_ray.errors import InputError
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def report_of(*findings, as_json=False) -> DoctorReport:
    return DoctorReport(list(findings), as_json)


GOOD, WARNED, WRONG = (
    ok("disk", "100 GB"),
    warning("GPU", "none", "buy one"),
    problem("cache", "gone", "make it"),
)


@pytest.mark.parametrize(
    ("findings", "code"), [([GOOD], 0), ([GOOD, WARNED], 0), ([GOOD, WRONG, WARNED], 1), ([WRONG, WRONG], 1)]
)
def test_the_exit_code_counts_problems_and_not_warnings(monkeypatch, capsys, findings, code):
    monkeypatch.setattr(cli, "load", lambda target: lambda **_: report_of(*findings))
    assert cli.main(["doctor"]) == code
    said = capsys.readouterr()
    assert said.out.count("\n") == len(findings) + 1
    assert ("problem" in said.err) == (code == 1)


def test_json_is_one_object(monkeypatch, capsys):
    given = {}

    def fake(**settings):
        given.update(settings)
        return report_of(GOOD, WRONG, as_json=settings["as_json"])

    monkeypatch.setattr(cli, "load", lambda target: fake)
    assert cli.main(["doctor", "--json", "--exp-dir", "exps"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == 1
    assert report["findings"][1] == {
        "check": "cache",
        "level": "problem",
        "found": "gone",
        "remedy": "make it",
    }
    assert (given["exp_dir"], given["fingerprint"], given["address"]) == ("exps", False, None)


def test_a_check_that_hangs_is_given_up_and_one_that_fails_is_told():
    released = threading.Event()
    (hung,) = job._guarded("tracking", released.wait, 0.05)
    released.set()
    assert (hung.level, "no answer" in hung.found) == ("problem", True)
    (failed,) = job._guarded("GPU", lambda: 1 / 0, None)
    assert (failed.level, "ZeroDivisionError" in failed.found) == ("problem", True)

    def mistaken():
        yield GOOD
        raise InputError("no such file", where="song.wav", fix="look again")

    first, second = job._guarded("dataset", mistaken, None)
    assert first == GOOD
    assert (second.level, second.found, second.remedy) == ("problem", "no such file: song.wav", "look again")


def test_only_what_is_named_is_looked_at(tmp_path):
    checks = [finding.check for finding in doctor().findings]
    assert not {"checkpoint", "dataset", "cache", "tracking", "output", "disk"} & set(checks)
    assert {"python", "packages", "extras", "open files", "audio", "torch", "GPU", "cluster"} <= set(checks)


def test_everything_that_is_named_is_looked_at(tmp_path):
    write_tiny_checkpoint(tmp_path / "tiny")
    report = doctor(
        checkpoint_dir=str(tmp_path / "tiny"),
        dataset_path=str(tmp_path / "songs"),
        cache=str(tmp_path / "cache"),
        exp_dir=str(tmp_path / "exps"),
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        address="127.0.0.1:9",
    )
    levels = {finding.check: finding.level for finding in report.findings}
    assert levels["checkpoint"] == levels["tracking"] == "ok"
    assert levels["dataset"] == levels["cache"] == levels["cluster"] == "problem"
    assert "disk" in levels
    assert report.unfinished == "the doctor found 3 problems"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_a_checkpoint_that_is_not_whole_is_one_line(tmp_path):
    write_tiny_checkpoint(tmp_path / "tiny")
    (tmp_path / "tiny/umt5-base/tokenizer.json").unlink()
    (finding,) = [
        finding
        for finding in doctor(checkpoint_dir=str(tmp_path / "tiny")).findings
        if finding.check == "checkpoint"
    ]
    assert finding.level == "problem"
    assert "umt5-base/tokenizer.json: missing file" in finding.found
    assert "\n" not in finding.render()
