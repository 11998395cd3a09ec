"""A mistyped flag, setting, command or value: what was meant, of what this very command takes."""

from __future__ import annotations

import itertools

import pytest

from acestep_ray import cli
from acestep_ray.flags import build_parser
from acestep_ray.hints import nearest, one_of

COMMANDS = build_parser().commands()


def refused(capsys, *arguments) -> str:
    """What the command says of these arguments, which it refuses."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as end:
        code = end.code
    assert code == 2
    return capsys.readouterr().err


def test_no_hint_names_the_flag_that_was_refused_or_one_that_the_command_lacks():
    names = sorted({name for flags in COMMANDS.values() for name in flags} - {"help"})
    for command, name in itertools.product(COMMANDS, names):
        if name in COMMANDS[command]:
            continue
        near = nearest(name, COMMANDS[command])
        assert near != name
        assert near is None or near in COMMANDS[command]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("tune --every_plot_step 4", "`--every_plot_step` is a flag of `train`, not of `tune`"),
        ("tune --every_plot_step=4", "`tune` has --val_check_interval"),
        ("tune --devices 2", "`tune` has --workers_per_trial"),
        ("tune --val_check_intervall 4", "did you mean val_check_interval?"),
        ("prepare --output_path ds", "did you mean output_dir?"),
        ("precompute --dataset_dir ds", "did you mean dataset_path?"),
        ("report exps/a --outputpath a", "did you mean output_path?"),
        ("export --lora_weight 1", "`export merge`"),
        ("export merge --lora_pth a", "did you mean lora_path?"),
        (
            "cache stats c --dry_run",
            "`--dry_run` is a flag of `export lora` and `cache prune`, not of `cache stats`",
        ),
        (
            "checkpoint tiny d --mirror m",
            "`--mirror` is a flag of `checkpoint fetch`, not of `checkpoint tiny`",
        ),
        ("checkpoint fetch d --onl m", "did you mean only?"),
        ("doctor --cach c", "did you mean cache?"),
        ("info --file a", "it is given without a flag: acestep-ray info FILE"),
        ("train -dataset_path c", "flags begin with two hyphens: --dataset_path"),
        ("generate --prompt dark pop", "put quotes around a text with spaces"),
        ("trian", "did you mean train?"),
        ("merge", "there is `acestep-ray export merge`"),
        ("export mergee", "did you mean merge?"),
        ("cache verfy", "did you mean verify?"),
        ("checkpoint download", "there are tiny, fetch"),
        ("", "no command is given"),
        ("cache", "no action is given"),
        ("info", "are required: FILE\n  → acestep-ray info --help"),
        ("export merge", "--lora_path, --output_dir\n  → acestep-ray export merge --help"),
    ],
)
def test_a_mistake_is_told_with_what_was_meant(capsys, arguments, told):
    err = refused(capsys, *arguments.split())
    assert told in err
    given = [word.lstrip("-").partition("=")[0] for word in arguments.split() if word.startswith("--")]
    assert not any(f"did you mean {name}?" in err for name in given)


def test_a_settings_file_with_another_commands_setting_names_the_file_and_the_command(capsys, tmp_path):
    file = tmp_path / "tune.yaml"
    file.write_text("trials: 3\nevery_plot_step: 5\n", encoding="utf-8")
    err = refused(capsys, "tune", "--dataset_path", "c", "--checkpoint_dir", "d", "--config", str(file))
    assert f"`tune` has no setting 'every_plot_step': --config {file}" in err
    assert "`every_plot_step` is a setting of `train`, not of `tune`" in err


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("ACESTEP_TUNE__EVERY_PLOT_STEP", "`every_plot_step` is a setting of `train`, not of `tune`"),
        ("ACESTEP_EXPORT__MERGE__LORA_PTH", "did you mean ACESTEP_EXPORT__MERGE__LORA_PATH?"),
        ("ACESTEP_TRIAN__SEED", "did you mean ACESTEP_TRAIN__SEED?"),
    ],
)
def test_a_variable_of_another_command_or_of_none_is_told(capsys, monkeypatch, variable, told):
    monkeypatch.setenv(variable, "1")
    assert told in refused(capsys, "train", "--dataset_path", "c", "--checkpoint_dir", "d")


@pytest.mark.parametrize(
    ("value", "choices", "meant"),
    [
        ("BF16-mixed", ["16-mixed", "32", "bf16-mixed", "bf16-true"], "bf16-mixed"),
        ("bf16", ["16-mixed", "32", "bf16-mixed", "bf16-true"], "bf16-mixed"),
        ("adamw_8bit", ["adamw", "adamw-8bit"], "adamw-8bit"),
        ("bf16-mixed", ["auto", "32", "bf16"], "bf16"),
        ("wave", ["wav", "flac"], "wav"),
    ],
)
def test_a_mistyped_value_is_told_with_the_choice_that_was_meant(value, choices, meant):
    assert one_of(value, choices).startswith(f"did you mean {meant}? It is one of {choices[0]}")


def test_a_value_that_is_like_no_choice_is_told_with_all_of_them():
    assert one_of("xyz", ["auto", "cpu", "cuda"]) == "one of auto, cpu, cuda"


def test_a_value_that_another_command_takes_is_not_called_mistyped():
    assert one_of("float16", ["float32", "bfloat16"], elsewhere=["float16"]) == "one of float32, bfloat16"


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_writes_is_called_output_path_or_output_dir(command):
    written = [name for name in COMMANDS[command] if name.startswith("out")]
    assert set(written) <= {"output_path", "output_dir", "output"}
    if "output" in written:  # an earlier name, beside the new one
        assert "output_path" in written


def test_the_reports_page_is_named_by_output_path_and_under_its_old_name(monkeypatch, capsys, tmp_path):
    pages = []
    monkeypatch.setattr(
        "acestep_ray.reporting.job.Page.write", lambda self, target: pages.append(target) or 0
    )
    monkeypatch.setattr("acestep_ray.reporting.job.fill", lambda *_: None)
    assert cli.main(["report", str(tmp_path), "--output_path", "a.html"]) == 0
    assert cli.main(["report", str(tmp_path), "--output", "b.html"]) == 0
    monkeypatch.setenv("ACESTEP_REPORT__OUTPUT", "c.html")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert cli.main(["report", str(tmp_path), "--output_path=d.html"]) == 0
    monkeypatch.setenv("ACESTEP_REPORT__OUTPUT_PATH", "e.html")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert pages == ["a.html", "b.html", "c.html", "d.html", "e.html"]
    from acestep_ray.reporting.job import report

    report(str(tmp_path), output="f.html")
    report(str(tmp_path), output_path="g.html")
    assert pages[5:] == ["f.html", "g.html"]
    assert "--output PATH" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    text = capsys.readouterr().out
    assert "--output_path PATH" in text
    assert "--output " not in text


@pytest.mark.parametrize("given", [["d"], ["--output_dir", "d"], ["d", "--output_dir", "d"]])
def test_a_checkpoint_is_written_to_output_dir_or_to_the_argument(monkeypatch, given):
    written = []
    done = type("Done", (), {"path": "d"})
    monkeypatch.setattr(cli, "load", lambda _: lambda place, **_: written.append(place) or done)
    assert cli.main(["checkpoint", "tiny", *given]) == 0
    assert written == ["d"]


@pytest.mark.parametrize("given", [[], ["a", "--output_dir", "b"]])
def test_a_checkpoint_without_a_place_or_with_two_is_a_mistake(capsys, given):
    assert "DIR or --output_dir" in refused(capsys, "checkpoint", "tiny", *given)
