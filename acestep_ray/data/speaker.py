"""Reads speaker embeddings from files. Nothing is ever unpickled as code."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from typing import TYPE_CHECKING

import numpy as np

from acestep_ray.foreign_files import FIRST_BYTES, start_of_impostor
from acestep_ray.storage import StoredFile

if TYPE_CHECKING:
    import torch

# An embedding has a few kilobytes; a tensor that is a view of a larger one may have been saved with all of it.
_MAX_BYTES = 64 << 20


class SpeakerEmbeddingError(ValueError):
    """A speaker embedding that cannot be used; the text says which file and why."""


def load_speaker_embedding(file: StoredFile | str | os.PathLike[str], dim: int) -> np.ndarray:
    """The embedding in a `.pt`, `.npy` or `.safetensors` file, local or in object storage: float32 (dim,).

    The file holds one tensor of floats, (dim,) or (1, dim); a `.safetensors` file exactly one.

    Raises SpeakerEmbeddingError for any other content, and where the file cannot be read.
    """
    import torch  # takes seconds, and most songs have no embedding

    stored = file if isinstance(file, StoredFile) else StoredFile.at(file)
    path = stored.url if isinstance(file, StoredFile) else os.fspath(file)
    readers = {".pt": _read_pt, ".npy": _read_npy, ".safetensors": _read_safetensors}
    reader = readers.get(stored.suffix)
    try:
        status = stored.status()
        if status is None:
            raise SpeakerEmbeddingError(f"the speaker embedding does not exist: {path}")
        if reader is None:
            raise SpeakerEmbeddingError(f"a speaker embedding is a {', '.join(readers)} file, unlike {path}")
        if status.size > _MAX_BYTES:
            raise SpeakerEmbeddingError(f"{status.size} bytes are no speaker embedding: {path}")
        content = stored.read_bytes()
        if found := start_of_impostor(content[:FIRST_BYTES], path):
            raise SpeakerEmbeddingError(f"the speaker embedding is {found.what}: {path}")
        tensor = reader(content)
    except SpeakerEmbeddingError:
        raise
    except Exception as error:
        # The readers raise errors of many kinds for damaged files, some with pages of advice; storage its own.
        detail = (str(error).splitlines() or [""])[0]
        raise SpeakerEmbeddingError(
            f"the speaker embedding cannot be read ({type(error).__name__}: {detail}): {path}"
        ) from None
    if not torch.is_tensor(tensor) or not tensor.is_floating_point():
        held = tensor.dtype if torch.is_tensor(tensor) else type(tensor).__name__
        raise SpeakerEmbeddingError(f"the file holds {held}, not a tensor of floats: {path}")
    if tuple(tensor.shape) not in ((dim,), (1, dim)):
        raise SpeakerEmbeddingError(
            f"the embedding has the shape {tuple(tensor.shape)}, not ({dim},): {path}"
        )
    embedding = tensor.detach().reshape(dim).to(torch.float32).numpy()
    if not np.isfinite(embedding).all():
        raise SpeakerEmbeddingError(f"the embedding holds NaN or infinite values: {path}")
    return embedding


def _read_pt(content: bytes) -> object:
    import torch

    file = io.BytesIO(content)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            num_bytes = sum(entry.file_size for entry in archive.infolist())
        if num_bytes > _MAX_BYTES:
            raise ValueError(f"{num_bytes} bytes, unpacked")
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own message tells how to run what the file holds
        raise ValueError(
            "it holds more than tensors, which could run any program, and is not opened"
        ) from None


def _read_npy(content: bytes) -> torch.Tensor:
    import torch

    values = np.load(io.BytesIO(content), allow_pickle=False)
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))


def _read_safetensors(content: bytes) -> torch.Tensor:
    from safetensors.torch import load

    tensors = load(content)
    if len(tensors) != 1:
        raise ValueError(f"{len(tensors)} tensors, not one")
    return next(iter(tensors.values()))
