"""The page of a stranger's run or search: bounded memory and time, and a note in place of what cannot be shown."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

import pytest
import soundfile
from PIL import Image

from acestep_ray.errors import InputError
from acestep_ray.reporting import curves
from acestep_ray.reporting.job import report
from acestep_ray.tracking.event_file import _record
from tests.reporting.conftest import draw, write_run, write_sound  # noqa: F401
from tests.security.limits import run_limited

MEGABYTES, SECONDS = 700, 60


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *others: bytes, bits: int = 8, colours: int = 2, data: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(others) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """`count` zero bytes, compressed piece by piece."""
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    return b"".join(
        [*(packer.compress(block[:left]) for left in range(count, 0, -len(block))), packer.flush()]
    )


def animated() -> bytes:
    """200 frames in few bytes."""
    frames = [Image.new("RGB", (64, 64), (number, 0, 0)) for number in range(200)]
    file = BytesIO()
    frames[0].save(file, format="png", save_all=True, append_images=frames[1:])
    return file.getvalue()


def photo(kind: str, pixels: bytes = bytes(3 * 64 * 64)) -> bytes:
    file = BytesIO()
    Image.frombytes("RGB", (64, 64), pixels).save(file, format=kind)
    return file.getvalue()


SVG = b"""<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>"""
NOISE = photo("png", os.urandom(3 * 64 * 64))
PICTURES = {
    "13,000 pixels square": (lambda: png(13_000, 13_000, data=zeros(13_000 * 39_001)), "pixels are more"),
    "20,000 pixels square": (lambda: png(20_000, 20_000), "pixels are more"),
    "a line of pixels": (lambda: png(2**31 - 1, 1), "pixels are more"),
    "a long line": (lambda: png(60_000, 100, data=zeros(100 * 180_001)), "pixels are more"),
    "no pixels": (lambda: png(0, 0), "picture cannot be read"),
    "truncated": (lambda: NOISE[: len(NOISE) // 2], "it is damaged"),
    "damaged": (lambda: png(64, 64, data=b"no zlib"), "it is damaged"),
    "JPEG as PNG": (lambda: photo("jpeg"), "it is no PNG picture"),
    "GIF as PNG": (lambda: photo("gif"), "it is no PNG picture"),
    "SVG as PNG": (lambda: SVG, "it is no PNG picture"),
    "text that unpacks to 128 MB": (
        lambda: png(8, 8, chunk(b"zTXt", b"note\0\0" + zeros(1 << 27)), data=zeros(8 * 25)),
        "it is damaged",
    ),
    "a profile that unpacks to 128 MB": (
        lambda: png(8, 8, chunk(b"iCCP", b"note\0\0" + zeros(1 << 27)), data=zeros(8 * 25)),
        "it is damaged",
    ),
    "many texts": (lambda: png(8, 8, *[chunk(b"tEXt", b"k\0" + b"v" * 900_000)] * 17, data=zeros(200)), None),
    "40 MB": (lambda: png(8, 8, chunk(b"prVt", bytes(40 << 20)), data=zeros(8 * 25)), "more than the 16 MB"),
    "empty": (lambda: b"", "it is no PNG picture"),
}


def test_pictures_that_would_take_the_memory_are_notes(write_run, monkeypatch):  # noqa: F811
    run = write_run()
    sound = (run / "samples/step=40/a.wav").read_bytes()
    for number, (make, _) in enumerate(PICTURES.values()):
        folder = run / f"samples/step={100 + number}"
        folder.mkdir()
        (folder / "a.wav").write_bytes(sound)
        (folder / "a.png").write_bytes(make())
    ended = run_limited(
        "report", run, "--debug", megabytes=MEGABYTES, seconds=SECONDS, clips=len(PICTURES) + 1
    )
    assert ended.code == 0, ended.output
    assert "Traceback" not in ended.output
    assert ended.megabytes < 500
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<audio") == len(PICTURES) + 1
    assert len(page) < 60 << 20
    for number, (name, (_, told)) in enumerate(PICTURES.items()):
        notes = [
            note
            for note in re.findall(r"the picture cannot be read[^<]*", page)
            if f"step={100 + number}/" in note
        ]
        assert bool(notes) == (told is not None), (name, notes)
        assert told is None or told in notes[0], (name, notes)


def test_of_an_animated_picture_the_first_frame_is_shown(write_run):  # noqa: F811
    run = write_run()
    (run / "samples/step=40/a.png").write_bytes(animated())
    report(str(run))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "data:image/webp" in page
    assert "acTL" not in page


def make_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def test_pipes_and_events_of_gigabytes_in_a_run_s_folder_do_not_hang_its_page(write_run, tmp_path):  # noqa: F811
    run = write_run()
    sound = (run / "samples/step=40/a.wav").read_bytes()
    (run / "samples/step=50").mkdir()
    (run / "samples/step=50/b.wav").write_bytes(sound)
    for place in ("step=50/b.png", "step=40/a.wav"):
        make_fifo(run / "samples" / place)
    with open(tmp_path / "exps/logs/my_run/events.out.tfevents.9.x", "wb") as file:
        file.truncate(20 << 30)
    ended = run_limited("report", run, megabytes=MEGABYTES, seconds=SECONDS)
    assert ended.code == 0, ended.output
    page = (run / "report.html").read_text(encoding="utf-8")
    for told in ("it is not a regular file", "no sound that can be played", "TensorBoard&#x27;s events have"):
        assert told in page, told
    make_fifo(tmp_path / "exps/logs/my_run/events.out.tfevents.9.x")
    with pytest.raises(InputError, match="not a regular file"):
        curves.read_events(tmp_path / "exps/logs/my_run")


def damaged_record(content: bytes) -> bytes:
    """A record whose sums are right, and whose content is no event."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = BytesIO()
    RecordWriter(file).write(content)
    return file.getvalue()


def events(*values: tuple[float, int, str, float]) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    return b"".join(
        _record(
            Event(
                wall_time=time, step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            )
        )
        for time, step, tag, value in values
    )


EVENTS = {
    "no event": damaged_record(b"\xff" * 64),
    "noise": os.urandom(4096),
    "empty": b"",
    "moments that no calendar has": events(
        (float("nan"), 0, "loss", 1.0), (1e300, 1, "loss", 1.0), (-1e300, 2, "loss", 2.0)
    ),
    "steps and values at the end of their range": events(
        (1.0, 2**63 - 1, "loss", 3e38),
        (2.0, -(2**63), "loss", float("inf")),
        (3.0, 0, "grad_norm", float("nan")),
    ),
    "names": events(*((1.0, 0, f"loss/<script>{number}$\\frac{{", 1.0) for number in range(3000))),
}


@pytest.mark.parametrize("name", EVENTS)
def test_damaged_events_leave_the_rest_of_the_page(name, write_run, tmp_path):  # noqa: F811
    run = write_run()
    logs = tmp_path / "exps/logs/my_run"
    for path in logs.iterdir():
        path.unlink()
    (logs / "events.out.tfevents.1.x").write_bytes(EVENTS[name])
    report(str(run))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Checkpoints" in page
    assert "<script>" not in page


HOSTILE = ["\0", -1, 1e400, [], None, {"a": {"b": 1}}, "$\\frac{"]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_any_value_in_a_run_s_files_gives_a_page(value, write_run, tmp_path):  # noqa: F811
    run = write_run()
    sample = dict.fromkeys(["key", "prompt", "lyrics", "seed", "seconds", "steps", "guidance_scale"], value)
    (run / "samples/step=40/a.json").write_text(json.dumps(sample))
    identity = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(dict.fromkeys(identity, value)))
    settings = dict.fromkeys(
        ["dataset_path", "checkpoint_dir", "logger_dir", "lora_config_path", "max_steps", "epochs"], value
    )
    (run / "train.yaml").write_text(json.dumps(settings))
    for step in (20, 40):
        path = run / f"checkpoints/step={step}/state.json"
        state = json.loads(path.read_text())
        state["losses"] = value if step == 20 else dict.fromkeys(state["losses"], value)
        state["files"] = {name: {"bytes": value, "sha256": value} for name in state["files"]}
        path.write_text(json.dumps(state))
    (run / "checkpoints/step=²").mkdir()
    summary = report(str(run))
    assert summary.num_bytes > 1000


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_any_value_in_a_search_s_files_gives_a_page_or_one_message(value, tmp_path):
    trial = tmp_path / "search/trials/trial-0000"
    trial.mkdir(parents=True)
    (tmp_path / "search/search.json").write_text(json.dumps({"space": value}))
    record = {"name": "trial-0000", "params": {"rank": value, "learning_rate": value}}
    record["validations"] = [{"step": 1, "validation": 1.0, "train": 1.0}]
    (trial / "trial.json").write_text(json.dumps(record))
    assert report(str(tmp_path / "search")).num_bytes > 1000
    for name in ("name", "params", "state", "validations", "failures", "error", "seconds"):
        (trial / "trial.json").write_text(json.dumps({**record, name: value}))
        ended = None
        try:
            report(str(tmp_path / "search"))
        except Exception as error:
            ended = error
        assert ended is None or type(ended).__name__ == "InputError", (name, ended)


def wav_header(channels: int, rate: int, frames: int) -> bytes:
    size = channels * 2 * frames
    return (
        b"RIFF"
        + struct.pack("<I", min(size + 36, 2**32 - 1))
        + b"WAVEfmt "
        + struct.pack(
            "<IHHIIHH", 16, 1, channels, rate, rate * channels * 2 & 0xFFFFFFFF, channels * 2 & 0xFFFF, 16
        )
        + b"data"
        + struct.pack("<I", min(size, 2**32 - 1))
    )


SOUNDS = [(65535, 48000, 1), (2, 1, 1), (2, 2**31, 1), (2, 48000, 500), (8, 192000, 1)]


def test_sound_of_any_form_and_size_and_thousands_of_samples_are_played_or_noted(write_run):  # noqa: F811
    run = write_run()
    for step in range(1000):
        (run / f"samples/step={step + 1000}").mkdir()
        (run / f"samples/step={step + 1000}/a.wav").write_bytes(b"")
    # Those that the page takes of all: every 91st, the first and the last.
    for number, (channels, rate, megabytes) in enumerate(SOUNDS):
        with open(run / f"samples/step={1000 + round((number + 1) * 1000 / 11) - 1}/a.wav", "wb") as file:
            file.write(wav_header(channels, rate, 2**30))
            file.truncate(megabytes << 20)
    ended = run_limited("report", run, megabytes=MEGABYTES, seconds=SECONDS)
    assert ended.code == 0, ended.output
    assert "Traceback" not in ended.output
    assert ended.megabytes < 500
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "12 of 1001 samples" in page
    assert page.count("<audio") >= 2
    assert len(page) < 8 << 20


def test_a_quickstart_s_folder_with_a_bomb_gives_its_page(write_run, tmp_path):  # noqa: F811
    write_run()
    soundfile.write(tmp_path / "music.wav", [[0.0, 0.0]] * 4800, 48000)
    (tmp_path / "music.png").write_bytes(png(20_000, 20_000))
    report(str(tmp_path))
    assert "pixels are more" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_mlflow_that_does_not_end_its_answer_is_a_note(monkeypatch):
    monkeypatch.setattr(curves, "_ANSWER_SECONDS", 0.2)
    import time

    with pytest.raises(TimeoutError, match="no whole answer"):
        curves._within(0.2, lambda: time.sleep(5))
    assert curves._within(5.0, lambda: 7) == 7
    with pytest.raises(KeyError):
        curves._within(5.0, lambda: {}["x"])
