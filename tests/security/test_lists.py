"""Lists of songs and files with songs inside that ask for far more memory, time or room than they have bytes."""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from acestep_ray.data.schema import splits_of
from acestep_ray.errors import InputError
from tests.security.bounded import run_bounded

SECONDS = 60
MEMORY = 4 << 30


def repeated_value(path):
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * (20 << 20)]))
    table = pa.table({"filename": pa.array(["a.wav"] * 2000), "lyrics": value})
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False)


def repeated_audio(path):
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array([b"x" * (2 << 20)]))
    pq.write_table(
        pa.table({"audio": value}),
        path,
        compression="zstd",
        dictionary_pagesize_limit=1 << 30,
        store_schema=False,
    )


def page_of_gigabytes(path):
    table = pa.table({"filename": ["a.wav"], "lyrics": ["y" * (500 << 20)]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)


def deep_lists(path):
    kind, value = pa.int32(), 1
    for _ in range(150):
        kind, value = pa.list_(kind), [value]
    pq.write_table(pa.table({"filename": ["a.wav"], "x": pa.array([value], kind)}), path)


def false_offsets(path):
    """A file whose strings end far outside their buffer."""
    with pa.ipc.new_file(str(path), pa.schema([("filename", pa.string())])) as writer:
        writer.write_batch(pa.record_batch([pa.array(["a.wav", "b.wav"])], names=["filename"]))
    content = path.read_bytes()
    right, false = struct.pack("<3i", 0, 5, 10), struct.pack("<3i", 0, 5, 1 << 30)
    assert content.count(right) == 1
    path.write_bytes(content.replace(right, false))


def text(content):
    return lambda path: path.write_text(content() if callable(content) else content)


def not_ending_line(path):
    with open(path, "wb") as file:
        file.write(b"filename,lyrics\n")
        file.truncate(3 << 30)


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content, more in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in more.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))


def header_of_gigabytes(path):
    """A compressed tar whose long name has 8 GB."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(64):
            file.write(bytes(1 << 20))


def gzip_bomb(path):
    """3 GB of zeros, as members of one compressed stream each."""
    info = tarfile.TarInfo("a.wav")
    info.size = 3 << 30
    block = gzip.compress(bytes(64 << 20))
    path.write_bytes(gzip.compress(info.tobuf()) + block * 48)


def endless_map(path):
    """A sparse member whose map has no line end."""
    tar(
        path,
        [
            (
                "a.wav",
                b"1000000\n" + b"9" * (40 << 20),
                {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}},
            )
        ],
    )


BOMBS = {
    "value.parquet": (repeated_value, "longer than 4 MB"),
    "audio.parquet": (repeated_audio, "unpacks"),
    "page.parquet": (page_of_gigabytes, "unpacks from"),
    "deep.parquet": (deep_lists, ""),
    "offsets.arrow": (false_offsets, "is damaged"),
    "nested.json": (text("[" * 100_000), "nested too deep"),
    "digits.json": (text(lambda: f'[{{"filename": "a.wav", "bpm": {"1" * 1_000_000}}}]'), "digits"),
    "floats.json": (
        text('[{"filename": "a.wav", "bpm": 1e999, "title": 1e-999, "caption": ' + "9" * 400 + "}]"),
        "",
    ),
    "twice.json": (text('[{"filename": "b.wav", "filename": "a.wav"}]'), ""),
    "many.json": (text(lambda: "[" + "1," * 3_000_000 + "1]"), "are not read|not a JSON object"),
    "lines.jsonl": (text(lambda: "x\n" * 3_000_000), "not JSON"),
    "long.jsonl": (text(lambda: '{"filename": "' + "a" * (5 << 20)), "longer than 4 MB"),
    "cell.csv": (text(lambda: f'filename,lyrics\na.wav,"{"x" * (100 << 20)}"\n'), "longer than 4 MB"),
    "columns.csv": (text(lambda: "filename," + ",".join(map(str, range(500_000))) + "\na.wav\n"), "columns"),
    "open.csv": (text(lambda: 'filename,lyrics\na.wav,"' + "la\n" * 5_000_000), "longer than 4 MB"),
    "zeros.csv": (not_ending_line, "NUL|longer"),
    "cells.csv": (text(lambda: "filename\n" + "a.wav,b\n" * 300_000), "more cells"),
    "name.tar.gz": (header_of_gigabytes, "larger than any name"),
    "zeros.tar.gz": (gzip_bomb, "unpacks to more than 100 times"),
    "map.tar": (endless_map, "is damaged"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_or_read_within_memory_and_time(tmp_path, name):
    make, message = BOMBS[name]
    folder = tmp_path / "songs"
    folder.mkdir()
    soundfile.write(folder / "a.wav", np.zeros(44_100), 44_100)
    make(folder / name)
    program = f"""
from pathlib import Path
from acestep_ray import cli
code = cli.main(["prepare", "--data_dir", {str(folder / name)!r}, "--output_dir", {str(tmp_path / "set")!r}])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print("code", code, peak.split()[1])
"""
    done = run_bounded(["-c", program], memory=MEMORY, seconds=SECONDS)
    code, peak = done.stdout.split()[-2:] if done.returncode == 0 else (None, 0)
    assert code in ("0", "2"), done.stdout[-2000:] + done.stderr[-2000:]
    assert int(peak) < 1.8 * (1 << 20), "KiB at the peak"
    assert len(done.stderr) < 1 << 20
    if message:
        assert code == "2"
        assert re.search(message, done.stderr), done.stderr[-2000:]


def test_a_tar_gives_regular_files_below_the_folder_alone(tmp_path):
    wav = io.BytesIO()
    soundfile.write(wav, np.zeros(44_100), 44_100, format="WAV")
    song = wav.getvalue()
    link = {"linkname": "/etc/passwd"}
    members = [
        ("a.wav", song, {}),
        ("a.wav/b.wav", song, {}),
        ("../out.wav", song, {}),
        ("x/../../out.wav", song, {}),
        ("/abs.wav", song, {}),
        ("A.WAV", song, {}),
        ("n" * 100_000 + ".wav", song, {}),
        ("d/" * 5_000 + "deep.wav", song, {}),
        ("nul.wav", song, {"pax_headers": {"path": "nul\0.wav"}}),
        ("a_prompt.txt", b"", {"type": tarfile.SYMTYPE, **link}),
        ("hard.wav", b"", {"type": tarfile.LNKTYPE, **link}),
        ("zero.wav", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}),
        ("pipe.wav", b"", {"type": tarfile.FIFOTYPE}),
        ("a. ", b"x", {}),
    ]
    (tmp_path / "in").mkdir()
    tar(tmp_path / "in/songs.tar", members)
    program = f"""
from acestep_ray import cli
arguments = ["--data_dir", {str(tmp_path / "in/songs.tar")!r}, "--output_dir", {str(tmp_path / "set")!r}]
print("code", cli.main(["prepare", *arguments]))
"""
    done = run_bounded(["-c", program], seconds=SECONDS)
    assert "code 0" in done.stdout, done.stderr
    assert sorted(path.name for path in (tmp_path / "set/audio").rglob("*") if path.is_file()) == [
        "A.WAV",
        "a.wav",
        "abs.wav",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "set"]
    assert not [path for path in (tmp_path / "set").rglob("*") if path.is_symlink()]


def test_json_beside_a_song(tmp_path):
    folder = tmp_path / "songs"
    folder.mkdir()
    contents = {
        "nested": '{"caption": ' + "[" * 900 + "]" * 900 + "}",
        "deep": '{"caption": ' + "[" * 100_000,
        "digits": '{"caption": "x", "bpm": ' + "1" * 5000 + "}",
        "large": '{"caption": "x", "bpm": ' + "1" * 4000 + "}",
        "infinite": '{"caption": "x", "bpm": 1e999, "keyscale": NaN}',
        "objects": json.dumps({"caption": {"a": 1}, "bpm": [[1]], "lyrics": {}}),
        "tag": '{"caption": "x", "custom_tag": ' + "[" * 900 + "]" * 900 + "}",
    }
    for name, content in contents.items():
        soundfile.write(folder / f"{name}.wav", np.zeros(44_100), 44_100)
        (folder / f"{name}.json").write_text(content)
    program = f"""
from acestep_ray import cli
print("code", cli.main(["prepare", "--data_dir", {str(folder)!r}, "--output_dir", {str(tmp_path / "set")!r}]))
"""
    done = run_bounded(["-c", program], seconds=SECONDS)
    assert "code 2" in done.stdout, done.stderr
    assert "deep.json: not JSON" in done.stderr


def test_names_within_parquet_become_plain_names(tmp_path):
    wav = io.BytesIO()
    soundfile.write(wav, np.zeros(44_100), 44_100, format="WAV")
    names = [
        "../up.wav",
        "..\\back.wav",
        "/abs/a.wav",
        "A.WAV",
        "nul\0\x1b.wav",
        "n" * 5000 + ".wav",
        "...",
        None,
    ]
    audio = [{"bytes": wav.getvalue(), "path": name} for name in names]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"audio": audio}), tmp_path / "in/songs.parquet", use_dictionary=False)
    program = f"""
from acestep_ray import cli
arguments = ["--data_dir", {str(tmp_path / "in/songs.parquet")!r}, "--output_dir", {str(tmp_path / "set")!r}]
print("code", cli.main(["prepare", *arguments]))
"""
    done = run_bounded(["-c", program], seconds=SECONDS)
    assert "code 0" in done.stdout, done.stderr
    written = [path.name for path in (tmp_path / "set/audio").rglob("*") if path.is_file()]
    assert len(written) == len(names)
    assert all(name.isprintable() and len(name) < 256 and not name.startswith(".") for name in written)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "set"]


@pytest.mark.parametrize("split", ["../other", "a/b", "..", ""])
def test_splits_of_a_dataset_are_plain_names(tmp_path, split):
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
    with pytest.raises(InputError, match="no plain names"):
        splits_of(tmp_path, "set")


def test_readers_of_texts_take_no_square_of_time():
    """Inputs for which they took seconds at a fiftieth of this length; the limit of CPU time ends the child."""
    program = """
from acestep_ray.data import languages, layouts, metas
from acestep_ray.errors import InputError
for blank in (" \\n", "\\t\\n", "\\u3000\\n"):
    layouts.looks_like_lyrics(blank * 500_000)
for read in (languages.language_code, metas.read_bpm, metas.read_keyscale, metas.read_timesignature):
    for text in ("\\u00e1" * 1_000_000, "1" * 1_000_000, "A" + " " * 1_000_000 + "!"):
        try:
            read(text)
        except (InputError, ValueError):
            print("refused")
"""
    done = run_bounded(["-c", program], seconds=30)
    assert done.stdout.count("refused") == 12, done.stderr
