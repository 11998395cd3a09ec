"""The page of a run, a search and a quickstart, whatever is left of them."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import pytest

from acestep_ray import cli
from acestep_ray.cache.schema import MANIFEST
from acestep_ray.config import GenerateConfig
from acestep_ray.data.lyrics import LyricTokenizer
from acestep_ray.data.lyrics.tokenizer import build_tiny_vocabulary
from acestep_ray.errors import InputError
from acestep_ray.export.card import read_run as read_run_for_its_card
from acestep_ray.generation.job import MadeSong
from acestep_ray.quickstart import note_music
from acestep_ray.reporting.curves import read_events
from acestep_ray.reporting.job import PAGE_FILE, report
from acestep_ray.reporting.page import Page
from acestep_ray.reporting.run import read_run
from acestep_ray.reporting.run_page import find_warnings, state_of
from acestep_ray.reporting.samples import find_vocabulary, lyrics_text, spread
from acestep_ray.reporting.sections import add_settings
from acestep_ray.storage import Store, StoredFile, upload_folder
from acestep_ray.tracking import MLflowRun, Tracker
from acestep_ray.training.experiment import only_run
from acestep_ray.training.scan import SONGS
from acestep_ray.training.state import STATE_FILE
from acestep_ray.tuning.records import DONE, FAILED, Records
from tests.browser import NARROW, WIDE, visit
from tests.reporting.conftest import write_log


def facts_of(page: str) -> dict[str, str]:
    """Names and values of a page's lists."""
    found = re.findall(r"<dt>(.*?)</dt><dd[^>]*>(.*?)</dd>", page, re.DOTALL)
    return {html.unescape(name): html.unescape(value) for name, value in found}


def page_of(folder) -> str:
    return Path(report(str(folder)).page).read_text(encoding="utf-8")


def test_the_page_of_a_run_tells_all_there_is_of_it(tmp_path, write_run, browser, capsys):
    run = write_run()
    assert cli.main(["report", str(run)]) == 0
    path = run / PAGE_FILE
    assert f"report   {path}" in capsys.readouterr().out
    page = path.read_text(encoding="utf-8")
    facts = facts_of(page)
    assert facts["state"] == "finished"
    assert facts["steps"] == "40 of 40"
    assert facts["loss, training"] == "3.0000 → 2.2200"
    assert facts["loss, fixed noise"] == "2.0000 → 1.6000"
    assert facts["loss, held-out songs"] == "2.1000 → 1.9000"
    assert facts["best checkpoint"] == "step 40, 1.9000"
    assert (facts["songs"], facts["not usable"]) == ("2", "1 missing")
    assert facts["prompt"] == "<script>soft</script> piano"
    assert facts["seed"] == "11"
    assert facts["rank"] == "2"
    assert "3 tokens of lyrics" in page
    assert "broken &lt;song&gt;" in page
    assert '<tr class="marked"><td class="right">40</td>' in page
    assert "4,158" in page
    assert "<td>learning_rate</td><td>0.0003</td>" in page
    assert page.count("<svg") >= 7
    for width in (WIDE, NARROW):
        with visit(browser, path, width=width) as found:
            assert found.overflow() <= 0
            assert found.screenshot().std() > 5
            if width == WIDE:
                assert found.play() > 0.1
            assert not found.errors
            assert not found.requests


def test_a_run_that_is_under_way_and_one_that_was_interrupted_are_told_apart(write_run):
    folder = write_run(steps=20)
    with only_run(folder):
        assert state_of(read_run(folder)) == "under way"
    run = read_run(folder)
    assert state_of(run) == "not finished; the same command goes on from step 20"
    assert (run.step, run.total_steps) == (20, 40)


@pytest.mark.parametrize(
    ("gone", "told", "there"),
    [
        (
            ["exps/logs", "exps/my_run/samples", "cache"],
            [
                "neither TensorBoard&#x27;s events nor MLflow&#x27;s metrics",
                "This run has made no samples (yet)",
                "The songs are not at hand",
            ],
            ["Loss by step", "<td>learning_rate</td>", "attn.to_q", 'class="marked"'],
        ),
        (
            ["exps/my_run/train.yaml", "exps/my_run/run.json", "exps/my_run/checkpoints"],
            ["train.yaml is not there", "run.json is not there", "There is no checkpoint (yet)"],
            ["Loss by step", "<audio", "4,158"],
        ),
    ],
)
def test_what_is_gone_is_said_and_the_rest_is_shown(tmp_path, write_run, gone, told, there):
    run = write_run()
    for place in (tmp_path / name for name in gone):
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    page = page_of(run)
    for text in [*told, *there]:
        assert text in page, text


@pytest.mark.parametrize(
    "damaged",
    [
        {
            "exps/my_run/train.yaml": "train.yaml cannot be read",
            f"exps/my_run/checkpoints/step=40/{STATE_FILE}": "The checkpoint of step 40 does not read",
            "exps/my_run/samples/step=40/a.wav": "no sound that can be played",
            "exps/my_run/mlflow.json": "what is noted of MLflow&#x27;s run cannot be read",
        },
        {
            "exps/my_run/run.json": "run.json cannot be read",
            "exps/my_run/checkpoints/step=40/pytorch_lora_weights.safetensors": "No LoRA is at hand",
            "exps/my_run/samples/step=40/a.json": "what this sample was made from cannot be read",
            f"cache/{MANIFEST}": "The songs are not at hand",
        },
        {
            "exps/my_run/samples/step=40/a.png": "the picture cannot be read",
            f"exps/my_run/{SONGS}": "what the run noted of its songs cannot be read",
        },
    ],
)
def test_what_is_damaged_is_said_and_the_rest_is_shown(tmp_path, write_run, damaged):
    run = write_run()
    for name in damaged:
        (tmp_path / name).write_text("{ this is: no, [file\x00", encoding="utf-8")
    page = page_of(run)
    for told in damaged.values():
        assert told in page, told
    assert "Loss by step" in page


def test_warnings_are_what_the_run_itself_tells(write_run):
    folder = write_run()
    assert find_warnings(read_run(folder)) == []
    tracker = Tracker(folder.parent / "logs" / "my_run", None, first_step=30)
    tracker.log({30: {"loss": float("nan"), "skipped_steps": 1.0}, 40: {"loss/validation": 9.0}})
    tracker.close()
    skipped, broken, risen = find_warnings(read_run(folder))
    assert skipped.endswith("not finite: 1.")
    assert broken.endswith("not finite: 1, the first of them 30.")
    assert "lowest at step 20 (2) and has risen to 9 since" in risen


def test_passwords_in_settings_stay_out_of_the_page():
    page = Page("settings")
    add_settings(page, {"tracking_uri": "https://me:secret@mlflow.example/", "max_steps": 3})
    assert "https://mlflow.example/" in page.render()
    assert "secret" not in page.render()


def test_of_a_step_that_was_done_again_the_later_value_counts(tmp_path):
    write_log(tmp_path, 40)
    tracker = Tracker(tmp_path, None, first_step=20)
    tracker.log({step: {"loss": 7.0} for step in range(20, 25)})
    tracker.close()
    loss = read_events(tmp_path)["loss"]
    assert list(loss) == list(range(25))
    assert loss[19] == pytest.approx(3.0 - 19 / 50)
    assert loss[20] == 7.0


def test_where_tensorboards_events_are_gone_the_curves_are_mlflows(tmp_path, write_run, monkeypatch):
    run = write_run()
    shutil.rmtree(run.parent / "logs")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (run / "mlflow.json").write_text(json.dumps({"tracking_uri": uri, "run_id": "1"}))
    assert "MLflow&#x27;s database is not there" in page_of(run)
    assert not (tmp_path / "mlflow.db").exists()
    _make_mlflow_run(uri, run)
    facts = facts_of(page_of(run))
    assert facts["loss, training"] == "5.0000 → 4.0000"
    assert facts["device"] == "a GPU"
    assert facts["curves from"] == f"MLflow at {uri}"


def _make_mlflow_run(uri: str, run) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    made = client.create_run(client.create_experiment("e"), tags={"device": "a GPU"})
    for step in (0, 1):
        client.log_metric(made.info.run_id, "loss", 5.0 - step, step=step)
    (run / "mlflow.json").write_text(json.dumps(vars(MLflowRun(uri, made.info.run_id))))


def test_a_quickstarts_folder_gives_its_music_and_its_run(tmp_path, write_run, write_sound):
    write_run()
    music, picture = write_sound(tmp_path / "music.wav"), tmp_path / "music.png"
    made = MadeSong(StoredFile.at(music), StoredFile.at(picture), seconds=2.5)
    note_music(made, GenerateConfig("checkpoint", prompt="calm, harp", lyrics="[verse]\nsing & play", seed=7))
    summary = report(str(tmp_path), str(tmp_path / "elsewhere" / "page.html"))
    page = Path(summary.page).read_text(encoding="utf-8")
    assert summary.page == str(tmp_path / "elsewhere" / "page.html")
    assert summary.num_bytes == len(page.encode())
    assert page.count("<audio") == 2
    music = page[: page.index(">The run</h2>")]
    assert facts_of(music) == {
        "prompt": "calm, harp",
        "seed": "7",
        "seconds": "2.5",
        "steps": "60",
        "guidance scale": "15",
        "omega": "10",
        "shift": "3",
    }
    assert "[verse]\nsing &amp; play" in music
    assert facts_of(page[len(music) :])["steps"] == "40 of 40"


def test_the_page_of_a_search_has_its_trials_and_the_winner(tmp_path, browser):
    records = Records(tmp_path / "search")
    for rank, losses in ((4, [0.9, 0.8]), (64, [0.7, 0.4]), (8, [])):
        record = records.add({"rank": rank, "learning_rate": 1e-4 * rank})
        for number, value in enumerate(losses):
            records.note(record.name, {"step": 4 * number, "validation": value, "train": value})
        records.end(record.name, DONE if losses else FAILED, None if losses else "out of <memory>")
    (tmp_path / "search" / "search.json").write_text(json.dumps({"space": {"rank": "log2int(4, 64)"}}))
    page = page_of(tmp_path / "search")
    facts = facts_of(page)
    assert facts["trials"] == "2 done, 1 failed"
    assert facts["rank"] == "log2int(4, 64)"
    assert "trial-0002: out of &lt;memory&gt;" in page
    assert '<tr class="marked"><td>trial-0001</td>' in page
    assert page.count("data:image/") >= 2
    assert "the best, trial-0001, comes to 0.4" in page
    with visit(browser, tmp_path / "search" / PAGE_FILE, width=NARROW) as found:
        assert found.overflow() <= 0
        assert not found.errors


def test_where_nothing_of_a_run_is_no_page_is_written(tmp_path, write_run, capsys):
    write_run()
    (tmp_path / "empty").mkdir()
    for place, told in (
        (tmp_path / "empty", "nothing of a run is here"),
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "exps", "in it are the experiments my_run"),
    ):
        assert cli.main(["report", str(place)]) == 2
        assert told in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html"))


def test_the_lyrics_of_a_sample_are_read_back_from_their_tokens(tmp_path):
    vocabulary = tmp_path / "vocab.json"
    build_tiny_vocabulary(vocabulary)
    ids = LyricTokenizer.from_file(vocabulary).encode("[verse]\nwe walk home\n\nle chat dort", None).ids
    lines = lyrics_text(ids, vocabulary).splitlines()
    assert lines[:2] == ["[verse]", "we walk home"]
    assert lines[-1] == "le chat dort"
    assert lyrics_text([], vocabulary) == "(no lyrics)"
    assert "tokens of lyrics" in lyrics_text(ids, find_vocabulary(str(tmp_path / "gone")))


def test_of_many_samples_the_first_and_the_last_are_shown():
    assert spread(list(range(100)), 5) == [0, 25, 50, 74, 99]
    assert spread([1, 2], 5) == [1, 2]


def test_of_a_run_in_object_storage_a_copy_is_read_and_the_page_is_put_beside_it(tmp_path, write_run):
    folder = write_run(logger_dir="memory://bucket/logs")
    store = Store.at("memory://bucket/exps/my_run")
    upload_folder(folder, store)
    upload_folder(folder.parent / "logs", Store.at("memory://bucket/logs"))
    shutil.rmtree(folder.parent)
    summary = report(store.url)
    assert summary.page == f"{store.url}/{PAGE_FILE}"
    page = store.read_bytes(PAGE_FILE).decode()
    facts = facts_of(page)
    assert facts["folder"] == store.url
    assert facts["loss, training"] == "3.0000 → 2.2200"
    assert facts["rank"] == "2"
    assert "<audio" in page
    with pytest.raises(InputError, match="nothing of a run is here"):
        report("memory://bucket/nowhere")


def test_logs_in_object_storage_of_a_run_on_this_machine_are_read_there(write_run):
    folder = write_run(logger_dir="memory://bucket/of-logs")
    upload_folder(folder.parent / "logs", Store.at("memory://bucket/of-logs"))
    shutil.rmtree(folder.parent / "logs")
    assert facts_of(page_of(folder))["loss, training"] == "3.0000 → 2.2200"
    assert list(read_run_for_its_card(folder, 40).losses["training"].values())[-1] == pytest.approx(2.22)
