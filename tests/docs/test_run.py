"""The commands of the guide, the README and others, run one after another as their reader runs them."""

from __future__ import annotations

import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from acestep_ray import cli
from acestep_ray.data.demo import write_demo_songs
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint
from tests.docs.pages import ROOT, commands
from tests.docs.test_migrating import convert, original_lora

pytestmark = [pytest.mark.docs, pytest.mark.ray, pytest.mark.timeout(1800)]

# Pages that are read in one folder, where a command finds what those before it have made.
FOLDERS = {
    "the guide": [
        *("README.md", "docs/guide.md", "docs/export.md", "docs/precompute.md", "docs/generate.md"),
        *("docs/evaluate.md", "docs/report.md"),
    ],
    "the move": ["docs/migrating.md"],
}
# What is only parsed, and why.
NOT_RUN = {
    r"(git|cd|source|make|mlflow|tensorboard|ray) ": "no command of ours, or one with tests of its own",
    r"\.venv/bin/acestep-ray train": "for PowerShell, of a run that is there already",
    r"acestep-ray checkpoint fetch": "10 GB; the folder has a tiny one",
    r"acestep-ray tune": "minutes; tests/tuning",
    r"acestep-ray train .*cache_of_voices": "the same as the LoRA before it, of other songs",
    r"acestep-ray train .*--init_lora_path original_lora": "test_migrating does it without Ray",
    r"acestep-ray .* s3://|acestep-ray report s3://": "tests of each job do it, with a server",
    r"acestep-ray report (exps/search|quickstart)": "of what others make; tests/reporting and tests/pipelines",
}
# What makes a command small; steps in such numbers that a run that is to go on has some left.
SMALL = {
    "--max_steps": {"2000": "2", "4000": "3", "50000": "2"},
    "--every_n_train_steps": {"500": "1", "1000": "1"},
    "--every_plot_step": {"500": "2", "1000": "2"},
    "--duration": {"60": "3"},
}


def is_run(words: tuple[str, ...]) -> bool:
    return not any(re.match(pattern, shlex.join(words) + " ") for pattern in NOT_RUN)


def made_small(words: tuple[str, ...]) -> list[str]:
    """The command with few steps, short music, on the CPU."""
    small = [words[0]]
    for flag, value in pairwise(words):
        small.append(SMALL[flag][value] if flag in SMALL else value.replace("step=2000", "step=2"))
    small = ["cache" if word == "DIR" else word for word in small]
    if words[1] == "generate":
        small += ["--infer_steps", "2"] + ["--duration", "3"] * ("--duration" not in words)
    if words[1] == "train":
        small += ["--plot_seconds", "2"]
    if words[1] == "evaluate" and "--models" in words:
        small += ["--infer_steps", "2", "--duration", "3", "--songs", "2"]
    if words[1] in ("precompute", "train", "generate", "evaluate"):
        small += ["--device", "cpu"]
    return small


def furnish(folder: Path) -> None:
    """What a reader has at hand before the first command."""
    checkpoint: CheckpointDir = write_tiny_checkpoint(folder / "checkpoint")
    write_demo_songs(folder / "songs")
    shutil.copy(ROOT / "lora_config.json", folder)
    (folder / "lyrics.txt").write_text("[verse]\nhello there\n", encoding="utf-8")
    original_lora(checkpoint, folder)
    (folder / "epoch=0-step=2000_lora").rename(folder / "original_lora")
    for name in ("other", "other_lora"):
        shutil.copytree(folder / "original_lora", folder / name)
    for name in ("music/held_out", "music/trained_on", "clips"):
        for unusable in write_demo_songs(folder / name)[-2:]:
            unusable.unlink()
    convert(folder, "data", repeat_count=3)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_commands_of_the_pages_work_one_after_another(name, tmp_path, monkeypatch, two_cpus, capfd):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    done: list[list[str]] = []
    for page in FOLDERS[name]:
        whole = [command for command in commands(ROOT / page) if command.is_whole and is_run(command.words)]
        assert whole, page
        for command in whole:
            words = made_small(command.words)
            if words in done:
                continue
            assert words[0] == "acestep-ray"
            code = cli.main(words[1:])
            said = capfd.readouterr()
            assert code == 0, (
                f"{command.page}:{command.line}\n{shlex.join(words)}\n{said.out[-2000:]}{said.err[-2000:]}"
            )
            for flag in ("--output_dir", "--output_path"):
                if flag in words:
                    assert Path(words[words.index(flag) + 1]).exists()
            done.append(words)
    if name == "the guide":
        assert Path("exps/my_lora/checkpoints/step=3/pytorch_lora_weights.safetensors").is_file()
        assert Path("exps/my_finetuning/ace_step_transformer").is_dir()


def test_what_is_not_run_is_in_the_pages():
    """A command that is gone leaves no excuse behind."""
    texts = [
        shlex.join(c.words) + " "
        for pages in FOLDERS.values()
        for page in pages
        for c in commands(ROOT / page)
    ]
    for pattern in NOT_RUN:
        assert any(re.match(pattern, text) for text in texts), pattern
