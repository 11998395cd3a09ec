"""The folder of a run: one run at a time, and no other run than the one that was started in it."""

from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from acestep_ray.config import TrainConfig
from acestep_ray.errors import InputError
from acestep_ray.training import experiment
from acestep_ray.training.experiment import (
    check_unchanged,
    make_folder,
    note_identity,
    only_run,
    run_identity,
)
from acestep_ray.training.lora_config import DEFAULT_LORA

CONFIG = TrainConfig(dataset_path="cache", checkpoint_dir="checkpoint")
# Settings that change neither the batches nor what is learned from them.
OF_NO_MATTER = {
    "dataset_path", "checkpoint_dir", "lora_config_path",  # by fingerprint and content, not by place
    "exp_name", "exp_dir", "logger_dir", "checkpoints_dir", "tracking_uri", "device", "activation_checkpointing",
    "num_workers",
    "every_n_train_steps", "every_plot_step", "plot_seconds", "keep_last", "allow_changes", "max_skipped_steps",
    "max_steps", "epochs",  # make a run longer
    "devices", "num_nodes", "accumulate_grad_batches",  # their product matters
    "min_devices", "worker_resource", "max_failures", "cpu_offload", "val_check_interval", "early_stopping_patience",
    "ckpt_path", "init_lora_path",
    "tracking_experiment", "restore_experiment",
    "texts", "tag_metas", "min_decoded", "keep_unknown_lyrics",  # which songs there are is in their fingerprint
    "cuda_graphs",  # the same numbers as far as bfloat16 goes
    "fused",  # likewise
}  # fmt: skip


def identity(config: TrainConfig = CONFIG, lora=DEFAULT_LORA, songs="s", transformer="t"):
    return run_identity(config, lora, songs=songs, transformer=transformer)


def test_the_same_run_goes_on(tmp_path):
    note_identity(tmp_path, identity())
    check_unchanged(tmp_path, identity(), allow_changes=False)
    longer = replace(CONFIG, max_steps=5, epochs=3, exp_name="moved")
    check_unchanged(tmp_path, identity(longer), allow_changes=False)


def test_more_workers_that_share_the_same_step_are_no_change(tmp_path):
    note_identity(tmp_path, identity(replace(CONFIG, accumulate_grad_batches=4)))
    shared = replace(CONFIG, devices=2, accumulate_grad_batches=2)
    check_unchanged(tmp_path, identity(shared), allow_changes=False)
    with pytest.raises(InputError, match="accumulate_grad_batches: 4 → 8"):
        check_unchanged(tmp_path, identity(replace(shared, devices=4)), allow_changes=False)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (identity(replace(CONFIG, learning_rate=1e-3)), "--learning_rate: 0.0001 → 0.001"),
        (identity(replace(CONFIG, batch_frames=500)), "--batch_frames: None → 500"),
        (identity(songs="other"), "songs of --dataset_path: not the same"),
        (identity(transformer="other"), "transformer of --checkpoint_dir: not the same"),
        (identity(lora={**DEFAULT_LORA, "r": 8}), "LoRA r: 16 → 8"),
        (identity(lora={**DEFAULT_LORA, "use_dora": True}), "LoRA use_dora: None → True"),
    ],
)
def test_a_change_is_refused_by_name_unless_it_is_allowed(tmp_path, changed, told):
    note_identity(tmp_path, identity())
    with pytest.raises(InputError) as refused:
        check_unchanged(tmp_path, changed, allow_changes=False)
    assert f"\n  - {told}\n" in str(refused.value)
    assert str(refused.value).count("\n  - ") == 1
    assert "--allow_changes" in str(refused.value)
    check_unchanged(tmp_path, changed, allow_changes=True)


def test_every_setting_is_part_of_the_identity_or_of_no_matter():
    names = {field.name for field in fields(TrainConfig)}
    assert names == OF_NO_MATTER | set(experiment._SETTINGS)
    assert not OF_NO_MATTER & set(experiment._SETTINGS)


def test_a_folder_from_before_identities_were_noted_goes_on(tmp_path):
    check_unchanged(tmp_path, identity(), allow_changes=False)


def test_two_runs_in_one_folder_are_refused_until_the_first_has_ended_or_was_killed(tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from acestep_ray.training.experiment import only_run\n"
        f"with only_run(Path({str(tmp_path)!r})):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="under way"), only_run(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    with only_run(tmp_path):
        pass
    with only_run(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_to_is_named_with_its_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write here(?s:.*)--logger_dir"):
        make_folder(tmp_path / "file" / "logs", "--logger_dir")
    make_folder(tmp_path / "new" / "logs", "--logger_dir")
    assert list((tmp_path / "new" / "logs").iterdir()) == []


def test_a_folder_that_is_read_only_is_named_with_its_flag(tmp_path, monkeypatch):
    def touch(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")  # as root, permissions alone stop nothing

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(InputError, match=r"\(Read-only file system\)(?s:.*)--logger_dir"):
        make_folder(tmp_path, "--logger_dir")
