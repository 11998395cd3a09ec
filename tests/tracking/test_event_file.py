"""TensorBoard's events survive a resume and a disk that fails."""

from __future__ import annotations

import time

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from acestep_ray.tracking import Tracker, event_file
from tests.tracking.conftest import file_size_limit, log, scalars


def test_tensorboard_has_scalars_and_sound(tmp_path):
    tracker = Tracker(tmp_path, None)
    log(tracker, 0, 2)
    tracker.log_audio("sample/song", np.full((2, 480), 0.5, np.float32), 48_000, step=1)
    tracker.close()
    (sound,) = EventAccumulator(str(tmp_path), {"audio": 0}).Reload().Audio("sample/song")
    assert (sound.step, sound.sample_rate, sound.length_frames) == (1, 48_000, 480)
    assert scalars(tmp_path) == [(0, 0.0), (1, 1.0)]


def test_a_resumed_run_discards_the_steps_of_the_interrupted_one_beyond_its_checkpoint(tmp_path):
    tracker = Tracker(tmp_path, None)
    tracker.log({step: {"loss": 9.0} for step in range(6)})
    Tracker(tmp_path, None, first_step=4).log({4: {"loss": 1.0}})
    assert scalars(tmp_path) == [*[(step, 9.0) for step in range(4)], (4, 1.0)]


def test_a_folder_that_cannot_be_made_is_told_once_and_tried_again(tmp_path, said):
    folder = tmp_path / "logs"
    folder.write_text("a file where the folder should be")
    tracker = Tracker(folder, None, first_step=0, say=said.append)
    for step in range(5):
        log(tracker, step, step + 1)
        time.sleep(0.05)
    assert len(said) == 1
    assert str(folder) in said[0]
    folder.unlink()
    time.sleep(0.1)
    log(tracker, 5, 7)
    assert scalars(folder) == [(step, float(step)) for step in range(7)]
    tracker.close()
    assert len(said) == 2


def test_a_disk_that_fills_up_ends_nothing_and_what_it_did_not_take_is_written_later(tmp_path, said):
    tracker = Tracker(tmp_path, None, say=said.append)
    sound = np.full((1, 48_000), 0.5, np.float32)
    tracker.log({0: {"loss": 0.0}})
    with file_size_limit(64 * 1024):
        tracker.log_audio("sample/song", sound, 48_000, step=0)  # 96 kB: it is cut
        tracker.log({1: {"loss": 1.0}})
    assert len(said) == 1
    time.sleep(0.1)
    tracker.log({2: {"loss": 2.0}})
    tracker.close()
    assert scalars(tmp_path) == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert EventAccumulator(str(tmp_path)).Reload().Audio("sample/song")[-1].length_frames == 48_000
    assert len(said) == 2


def test_of_the_events_that_wait_the_latest_are_kept_and_the_loss_of_others_is_told(
    tmp_path, said, monkeypatch
):
    monkeypatch.setattr(event_file, "MEMORY_EVENT_BYTES", 500)
    folder = tmp_path / "logs"
    folder.write_text("a file where the folder should be")
    tracker = Tracker(folder, None, say=said.append)
    log(tracker, 0, 100)
    folder.unlink()
    time.sleep(0.1)
    log(tracker, 100, 101)
    tracker.close()
    kept = [step for step, _ in scalars(folder)]
    assert 2 < len(kept) < 15
    assert kept == list(range(101 - len(kept), 101))
    assert f"but {101 - len(kept)} for which there was no memory" in said[-1]


def test_events_that_are_never_taken_are_told_as_lost(tmp_path, said):
    folder = tmp_path / "logs"
    folder.write_text("a file where the folder should be")
    tracker = Tracker(folder, None, say=said.append)
    log(tracker, 0, 100)
    tracker.close()
    assert "100 events for TensorBoard are lost" in said[-1]
