"""Every reader of foreign bytes: how it is called, what it may raise, and files to begin with.

Anything else that it raises, a time above `SECONDS`, or memory above the child's limit is a finding.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from safetensors.torch import save

from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.parts import CacheDamagedError, ledger_of_part
from acestep_ray.cache.reader import CacheReader
from acestep_ray.cache.schema import MANIFEST
from acestep_ray.cache.stored import find_rows
from acestep_ray.data.audio import AudioError, AudioFile
from acestep_ray.data.findings import Findings
from acestep_ray.data.sources import songs_of_table
from acestep_ray.data.speaker import SpeakerEmbeddingError, load_speaker_embedding
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.export.adapter_config import PEFT_CONFIG
from acestep_ray.export.info import InfoSummary
from acestep_ray.export.reading import METADATA_KEY, PEFT_FILE, open_lora
from acestep_ray.export.source import checkpoint_folder, open_source
from acestep_ray.models.text_encoder import load_tokenizer
from acestep_ray.storage import Store, StoredFile
from acestep_ray.training.experiment import IDENTITY_FILE, check_unchanged
from acestep_ray.training.state import (
    FORMAT,
    STATE_FILE,
    WEIGHTS_FILE,
    Checkpoints,
    DamagedCheckpointError,
    Snapshot,
    TrainingState,
    best_step,
)
from tests.cache.rows import song_row, write_rows

SECONDS = 10.0
"""Of one file: far more than any takes, far less than a hang."""

MODULE = "transformer_blocks.0.attn.to_q"


@dataclass(frozen=True)
class Reader:
    """One reader."""

    read: Callable[[str, bytes], None]
    """Takes the name and the content of a file."""
    seeds: Callable[[], dict[str, bytes]]
    """Whole files by name, which are changed; what a case is called decides how it is read."""


# --- LoRA --------------------------------------------------------------------------------------------------


def _read_lora(name: str, content: bytes) -> None:
    with TemporaryDirectory() as folder:
        if name == PEFT_CONFIG:
            path = Path(folder, PEFT_FILE)
            path.write_bytes(_lora({}))
            Path(folder, PEFT_CONFIG).write_bytes(content)
        else:
            path = Path(folder, "lora.safetensors")
            path.write_bytes(content)
        try:
            lora = open_lora(path)
        except InputError:
            return
        for as_json in (False, True):
            InfoSummary({"lora_adapter": lora}, as_json).render()


def _lora(metadata: dict[str, str], **tensors: torch.Tensor) -> bytes:
    pair = {f"{MODULE}.lora_A.weight": torch.ones(2, 3), f"{MODULE}.lora_B.weight": torch.ones(4, 2)}
    return save(pair | tensors, metadata)


def _loras() -> dict[str, bytes]:
    config = {
        "r": 2,
        "lora_alpha": 4,
        "alpha_pattern": {"attn.to_q": 8},
        "use_rslora": False,
        "use_dora": False,
    }
    described = json.dumps(config)
    return {
        "plain.safetensors": _lora({}),
        "described.safetensors": _lora({METADATA_KEY: described, "acestep_ray_training": '{"steps": 3}'}),
        "alpha.safetensors": _lora({}, **{f"{MODULE}.alpha": torch.tensor(4.0)}),
        "dora.safetensors": _lora({}, **{f"{MODULE}.lora_magnitude_vector": torch.ones(4)}),
        PEFT_CONFIG: described.encode(),
    }


# --- speaker embeddings ------------------------------------------------------------------------------------

DIM = 6


def _read_speaker(name: str, content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, f"voice{Path(name).suffix}")
        path.write_bytes(content)
        try:
            embedding = load_speaker_embedding(path, DIM)
        except SpeakerEmbeddingError:
            return
        assert (embedding.shape, embedding.dtype) == ((DIM,), np.float32)
        assert np.isfinite(embedding).all()


def _speakers() -> dict[str, bytes]:
    values = torch.linspace(-1, 1, DIM)
    crow, columns = torch.tensor([0, DIM]), torch.arange(DIM)
    tensors = {
        "plain": values,
        "view": torch.zeros(100)[:DIM],
        "parameter": torch.nn.Parameter(values.half()),
        "sparse": values.to_sparse(),
        "csr": torch.sparse_csr_tensor(crow, columns, values, (1, DIM)),
        "csc": torch.eye(DIM)[:1].to_sparse_csc(),
        "meta": torch.empty(DIM, device="meta"),
        "nested": torch.nested.nested_tensor([values]),
        "quantised": torch.quantize_per_tensor(values, 0.1, 0, torch.qint8),
        "float8": values.to(torch.float8_e4m3fn),
        "float4": torch.zeros(DIM, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "complex": values.to(torch.complex64),
        "conjugate": values.to(torch.complex64).conj(),
        "negated": torch.complex(values, values).conj().imag,
        "dict": {"a": values},
        "batch": torch.zeros(3, DIM),
    }
    files = {}
    for name, tensor in tensors.items():
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        files[f"{name}.pt"] = buffer.getvalue()
    buffer = io.BytesIO()
    torch.save(values, buffer, _use_new_zipfile_serialization=False)
    files["legacy.pt"] = buffer.getvalue()
    for dtype in ("<f4", ">f8", "<f2", "<c8", "<i8"):
        buffer = io.BytesIO()
        np.save(buffer, values.numpy().astype(dtype))
        files[f"{dtype[1:]}.npy"] = buffer.getvalue()
    files["plain.safetensors"] = save({"voice": values})
    files["float8.safetensors"] = save({"voice": values.to(torch.float8_e5m2)})
    return files


# --- audio -------------------------------------------------------------------------------------------------


def _read_audio(name: str, content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, f"song{Path(name).suffix}")
        path.write_bytes(content)
        try:
            with AudioFile(str(path)) as audio:
                samples = audio.read(0.0, 2.0)
        except AudioError:
            return
        assert samples.ndim == 2
        assert samples.dtype == np.float32


def _songs() -> dict[str, bytes]:
    rate = 8_000
    wave = (0.2 * np.random.default_rng(0).standard_normal((rate // 2, 2))).astype(np.float32)
    files = {}
    kinds = {
        "wav": "WAV",
        "flac": "FLAC",
        "ogg": "OGG",
        "mp3": "MP3",
        "aiff": "AIFF",
        "au": "AU",
        "caf": "CAF",
    }
    for suffix, kind in kinds.items():
        buffer = io.BytesIO()
        soundfile.write(buffer, wave, rate, format=kind)
        files[f"song.{suffix}"] = buffer.getvalue()
    return files


# --- tables ------------------------------------------------------------------------------------------------


def _read_table(name: str, content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, f"songs{Path(name).suffix}")
        path.write_bytes(content)
        findings = Findings()
        try:
            for song in songs_of_table(StoredFile.at(path), findings):
                json.dumps([song.key, song.filename, song.problems])
        except InputError:
            return


def _tables() -> dict[str, bytes]:
    rows = [
        {"filename": "a.wav", "key": "C major", "bpm": 120, "tags": ["pop", "slow"], "lyrics": "[verse]\nla"},
        {"filename": "b.wav", "key": "Am", "bpm": 90.5, "tags": "rock, fast", "lyrics": ""},
    ]
    flat = [{**row, "tags": str(row["tags"])} for row in rows]
    sink, stream = io.BytesIO(), io.BytesIO()
    table = pa.Table.from_pylist(flat)
    pq.write_table(table, sink)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    lines = "\n".join(json.dumps(row) for row in rows)
    return {
        "songs.csv": b'filename,key,bpm,tags,lyrics\na.wav,C major,120,"pop, slow","la\nla"\nb.wav,Am,90,rock,\n',
        "songs.tsv": b"filename\tkey\ttags\na.wav\tx\tpop\n",
        "songs.json": json.dumps({"samples": rows, "metadata": {"genre_ratio": 50}}).encode(),
        "list.json": json.dumps(rows).encode(),
        "songs.jsonl": lines.encode(),
        "songs.parquet": sink.getvalue(),
        "songs.arrow": stream.getvalue(),
    }


# --- feature caches ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _cache_files() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        store = write_rows(Store.at(folder), [song_row("a"), song_row("b", speaker=True)])
        return {name: store.read_bytes(name) for name in store.names()}


def _read_cache(name: str, content: bytes) -> None:
    with TemporaryDirectory() as folder:
        store = Store.at(folder)
        for other, whole in _cache_files().items():
            store.write_bytes(other, content if _kind_in_cache(other) == name else whole)
        try:
            index = CacheIndex.open(store)
            reader = CacheReader(index)
            for i in range(min(len(index), 4)):
                reader.read(i)
        except (InputError, CacheDamagedError):
            pass
        find_rows(store)
        for part in store.names("samples"):
            ledger_of_part(store, part)


def _kind_in_cache(name: str) -> str:
    return "manifest" if name == MANIFEST else name.split("-")[0].split("/")[0].split(".")[0]


def _caches() -> dict[str, bytes]:
    return {_kind_in_cache(name): content for name, content in _cache_files().items()}


# --- runs and training checkpoints -------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _run_files() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Store.at(folder))
        tensors = {"a": torch.ones(2)}
        snapshot = Snapshot(tensors, tensors, {"pytorch_lora_weights.safetensors": _lora({})})
        checkpoints.save(snapshot, TrainingState(3, {"fixed_noise": {"3": 0.5}}))
        checkpoints.finish()
        return {name: checkpoints.store.read_bytes(name) for name in checkpoints.store.names()}


def _read_checkpoint(name: str, content: bytes) -> None:
    with TemporaryDirectory() as folder:
        run = Store.at(folder)
        for other, whole in _run_files().items():
            run.write_bytes(f"checkpoints/{other}", content if other.endswith(name) else whole)
        run.write_bytes(IDENTITY_FILE, content if name == IDENTITY_FILE else b'{"--shift": 3.0}')
        model = torch.nn.Module()
        model.a = torch.nn.Parameter(torch.zeros(2))
        checkpoints = Checkpoints(run.child("checkpoints"))
        for read in (
            lambda: checkpoints.read_weights(3),
            lambda: checkpoints.read_latest(model, lambda _: None),
            lambda: best_step((checkpoints.latest_state() or {"losses": {}})["losses"], [3]),
            lambda: checkpoint_folder(Path(folder), "best"),
            lambda: open_source(folder, where="info"),
            lambda: check_unchanged(run, {"--shift": 3.0}, allow_changes=False),
        ):
            try:
                read()
            except (AceStepError, DamagedCheckpointError):
                continue


def _checkpoints() -> dict[str, bytes]:
    files = {name.rpartition("/")[2]: content for name, content in _run_files().items()}
    state = {"format": FORMAT, "step": 3, "losses": {}, "files": {WEIGHTS_FILE: {"bytes": 1, "sha256": ""}}}
    return files | {IDENTITY_FILE: b'{"--shift": 3.0, "--seed": 1}', STATE_FILE: json.dumps(state).encode()}


# --- tokenizers --------------------------------------------------------------------------------------------


def _read_tokenizer(name: str, content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        path.write_bytes(content)
        try:
            tokenizer = load_tokenizer(path, 0)
        except InputError:
            return
        for text in ("pop, slow", "a" * 3000 + "!", " ".join(["la"] * 1000)):
            assert len(tokenizer.encode(text).ids) <= 256


def _tokenizers() -> dict[str, bytes]:
    def of(**parts: object) -> bytes:
        vocabulary = [
            ["<pad>", 0.0],
            ["</s>", 0.0],
            ["<unk>", 0.0],
            ["▁", -2.0],
            *([c, -3.0] for c in "abcdl"),
        ]
        model = {"type": "Unigram", "unk_id": 2, "vocab": vocabulary, "byte_fallback": False}
        empty = dict.fromkeys(
            ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
        )
        return json.dumps({"version": "1.0", **empty, "added_tokens": [], "model": model, **parts}).encode()

    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    return {
        "plain.json": of(),
        "t5.json": of(pre_tokenizer=metaspace, normalizer={"type": "Sequence", "normalizers": [spaces]}),
    }


READERS = {
    "lora": Reader(_read_lora, _loras),
    "speaker": Reader(_read_speaker, _speakers),
    "audio": Reader(_read_audio, _songs),
    "table": Reader(_read_table, _tables),
    "cache": Reader(_read_cache, _caches),
    "checkpoint": Reader(_read_checkpoint, _checkpoints),
    "tokenizer": Reader(_read_tokenizer, _tokenizers),
}

# Values that strangers' JSON has in the place of others.
ODD_VALUES = [
    *(None, True, False, 0, -1, 2**63, 10**400, -0.5, 1e308, math.nan, math.inf, "", "a" * 300),
    *("(a+)+$", "[", "\ud800", "\x00", [], {}, [[]], {"": 0}, "../../x", "http://169.254.169.254/x"),
]
