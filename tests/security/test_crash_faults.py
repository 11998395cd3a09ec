"""Six commands killed at ten random moments each, on a disk that is really full, and two at a time at one place."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile

from acestep_ray.cache.index import CacheIndex
from acestep_ray.data.schema import open_dataset
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.storage import Store
from acestep_ray.training.experiment import SETTINGS_FILE
from acestep_ray.tuning.records import Records
from acestep_ray.tuning.report import BEST, TABLE_FILE
from tests.cache.rows import song_row, write_rows
from tests.security.crashes import Commands, hidden, write_lora, write_search, write_songs
from tests.tuning.problem import write_problem

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(1800)]

MOMENTS = 10
SONGS = 3
JOBS = ("prepare", "merge", "generate", "report", "prune", "tune")
ROOM = {"prepare": "64k", "merge": "400k", "generate": "300k", "report": "60k", "prune": "2m", "tune": "900k"}
"""A disk that holds what is there before, and less than what the job writes."""


class Case:
    """A job with what it reads, in `sources`, and its output in `disk`."""

    def __init__(self, name: str, sources: Path, disk: Path):
        self.name, self.sources, self.disk = name, sources, disk
        self.output = disk / "out"
        getattr(self, f"set_up_{name}")()

    def arguments(self) -> list[str]:
        inputs = {
            "prepare": ["prepare", "--data_dir", self.sources / "songs", "--output_dir", self.output],
            "merge": ["export", "merge", "--lora_path", self.sources / "lora.safetensors"],
            "generate": ["generate", "--batch_path", self.sources / "songs.jsonl", "--infer_steps", 2],
            "report": ["report", self.sources / "search", "--output_path", self.output / "page.html"],
            "prune": ["cache", "prune", self.output],
            "tune": ["tune", "--dataset_path", self.sources / "cache", "--exp_name", "out"],
        }[self.name]
        if self.name in ("merge", "generate"):
            inputs += ["--output_dir", self.output]
        if self.name in ("merge", "generate", "tune"):
            inputs += ["--checkpoint_dir", self.sources / "tiny"]
        if self.name in ("generate", "tune"):
            inputs += ["--device", "cpu"]
        if self.name == "tune":
            inputs += [
                "--exp_dir",
                self.disk,
                "--logger_dir",
                self.disk / "logs",
                "--search_rank",
                "choice(2, 4)",
            ]
            inputs += ["--trials", 2, "--max_steps", 2, "--grace_steps", 1, "--val_songs", 2]
            inputs += ["--tracking_uri", "none", "--num_workers", 0]
        return [str(one) for one in inputs]

    def set_up_prepare(self) -> None:
        write_songs(self.sources / "songs", *"abcdef")

    def set_up_merge(self) -> None:
        write_lora(self.sources / "lora.safetensors", self.sources / "tiny")

    def set_up_generate(self) -> None:
        rows = [{"name": f"song-{n}", "prompt": "piano", "duration": 1, "seed": n} for n in range(SONGS)]
        (self.sources / "songs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def set_up_report(self) -> None:
        write_search(self.sources / "search")
        self.output.mkdir()

    def set_up_prune(self) -> None:
        cache = write_rows(Store.at(self.output), [song_row("a")])
        for number in range(200):
            cache.write_bytes(f"samples/part-{number:016x}.parquet", b"of a killed run")

    def set_up_tune(self) -> None:
        write_problem(self.sources / "cache", songs=6)

    def check_readable(self) -> None:
        """What a reader finds is whole, or is not there."""
        if self.name == "prepare" and self.output.exists():
            assert len(open_dataset(self.output)) == 6
        elif self.name == "merge" and self.output.exists():
            CheckpointDir.open(self.output)
        elif self.name == "generate":
            for audio in self.output.glob("*.wav"):
                assert abs(soundfile.info(audio).duration - 1) < 0.2
            for note in self.output.glob("song-*.json"):
                assert json.loads(note.read_text())["bytes"] == note.with_suffix(".wav").stat().st_size
        elif self.name == "report" and (page := self.output / "page.html").exists():
            assert page.read_bytes().endswith(b"</html>\n")
        elif self.name == "prune":
            assert list(CacheIndex.open(self.output).keys) == ["a"]
        elif self.name == "tune" and self.output.exists():
            records = Records(self.output)
            for record in records:
                for step in records.checkpoints(record).steps():
                    records.checkpoints(record).read_state(step)
            if (self.output / TABLE_FILE).exists():
                pq.read_table(self.output / TABLE_FILE)
            if (self.output / BEST).exists():
                assert (self.output / BEST / SETTINGS_FILE).read_text()

    def check_done(self) -> None:
        """The output is complete, and nothing of a killed process is left."""
        self.check_readable()
        place = self.output / {"report": "page.html"}.get(self.name, "")
        assert place.exists()
        if self.name == "generate":
            rows = [json.loads(line) for line in (self.output / "results.jsonl").read_text().splitlines()]
            assert [row["error"] for row in rows] == [None] * SONGS
        if self.name == "prune":
            assert len(list((self.output / "samples").iterdir())) == 1
        if self.name == "tune":
            assert [record.state for record in Records(self.output)] == ["done", "done"]
        assert hidden(self.disk) == []
        assert hidden(self.output) == []

    def clear(self) -> None:
        """Put things as they were before the job."""
        if self.name == "prune":
            self.set_up_prune()
        elif self.name != "tune":  # a search is continued
            subprocess.run(["rm", "-rf", str(self.output)], check=True)
            if self.name == "report":
                self.output.mkdir()

    def start(self, address: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "acestep_ray", *self.arguments()],
            env={**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, address: str) -> tuple[int, str]:
        process = self.start(address)
        text, _ = process.communicate(timeout=300)
        return process.returncode, text


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    server = Commands()
    yield server
    server.close()


@pytest.fixture
def case(tmp_path, tiny) -> Callable[..., Case]:
    def make(name: str, disk: Path | None = None) -> Case:
        (tmp_path / "sources").mkdir()
        (tmp_path / "sources" / "tiny").symlink_to(tiny)
        if disk is None:
            disk = tmp_path / "disk"
            disk.mkdir()
        return Case(name, tmp_path / "sources", disk)

    return make


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    from acestep_ray.tiny_checkpoint import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny").path


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a size; again with another size makes it larger."""
    place = tmp_path / "small"
    place.mkdir()
    options = iter(["size={}", "remount,size={}"])

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", next(options).format(size), "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this user may not mount a tmpfs")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True)


@pytest.mark.parametrize("name", ["prepare", "merge", "report", "prune"])
def test_killed_at_random_moments_nothing_half_written_is_read_and_the_rerun_is_right(name, case, commands):
    """Moments are changes of the file system: the work takes a tenth of a second, after imports of seconds."""
    job = case(name)
    ended = commands(*job.arguments())
    assert ended.code == 0, ended.text
    job.check_done()
    chance = random.Random()
    for _ in range(MOMENTS):
        job.clear()
        at = chance.randint(1, ended.count)
        commands(*job.arguments(), at=at)
        job.check_readable()
        if name == "merge" and job.output.exists():
            continue  # killed after its work: a folder that is there is not written again
        again = commands(*job.arguments())
        assert again.code == 0, (at, again.text)
        job.check_done()


@pytest.mark.parametrize("name", ["generate", "tune"])
def test_killed_at_random_seconds_a_job_on_ray_is_continued(name, case, two_cpus):
    job = case(name)
    started = time.monotonic()
    code, text = job.run(two_cpus)
    seconds = time.monotonic() - started
    assert code == 0, text
    job.check_done()
    subprocess.run(["rm", "-rf", str(job.output)], check=True)
    chance = random.Random()
    for _ in range(MOMENTS):
        job.clear()
        process = job.start(two_cpus)
        time.sleep(chance.uniform(0.3, 1.0) * seconds)
        process.kill()
        process.communicate()
        job.check_readable()
        if name == "generate":
            code, text = job.run(two_cpus)
            assert code == 0, text
            job.check_done()
    if name == "tune":  # it was continued and killed again and again
        before = {record.name: record for record in Records(job.output) if record.is_over}
        code, text = job.run(two_cpus)
        assert code == 0, text
        job.check_done()
        for record in Records(job.output):
            assert record.validations == before.get(record.name, record).validations


def fill(filler: Path) -> None:
    """Write until the disk takes no more."""
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.mark.parametrize("name", JOBS)
def test_on_a_full_disk_there_is_one_message_and_once_there_is_room_the_rerun_is_right(
    name, case, small_disk, two_cpus
):
    job = case(name, small_disk(ROOM[name]))
    if name == "prune":
        fill(job.disk / "filler")
    code, text = job.run(two_cpus)
    assert "Traceback" not in text
    job.check_readable()
    if name == "prune":
        assert code == 0, text
        (job.disk / "filler").unlink()
    else:
        assert code in (1, 2), text
        assert "no room on the disk" in text or "not enough space on the disk" in text
        assert str(job.disk) in text
    small_disk("60m")
    code, text = job.run(two_cpus)
    assert code == 0, text
    job.check_done()


@pytest.mark.parametrize("name", JOBS)
def test_of_two_at_one_place_one_is_done_and_the_other_refused(name, case, two_cpus):
    job = case(name)
    for _ in range(3):  # the first may have ended before the second looks
        both = [job.start(two_cpus) for _ in range(2)]
        ended = [(*process.communicate(timeout=300), process.returncode) for process in both]
        codes = sorted(code for _, _, code in ended)
        assert codes in ([0, 2], [0, 0]), ended
        job.check_done()
        if codes == [0, 2]:
            break
        job.clear()
    refused = [text for text, _, code in ended if code == 2]
    if name not in ("report", "prune"):  # these may be too short to meet
        assert refused, ended
    for text in refused:
        errors = [line for line in text.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert str(job.disk) in errors[0]
