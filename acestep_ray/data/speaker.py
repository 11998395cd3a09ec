"""Reads speaker embeddings from files. Nothing is ever unpickled as code."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


class SpeakerEmbeddingError(ValueError):
    """A speaker embedding that cannot be used; the text says which file and why."""


def load_speaker_embedding(path: str | os.PathLike[str], dim: int) -> np.ndarray:
    """The embedding in a `.pt`, `.npy` or `.safetensors` file: float32 (dim,).

    The file holds one tensor of floats, (dim,) or (1, dim); a `.safetensors` file exactly one.

    Raises SpeakerEmbeddingError for any other content.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise SpeakerEmbeddingError(f"the speaker embedding does not exist: {path}")
    readers = {".pt": _read_pt, ".npy": _read_npy, ".safetensors": _read_safetensors}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SpeakerEmbeddingError(f"a speaker embedding is a {', '.join(readers)} file, unlike {path}")
    try:
        tensor = reader(path)
    except SpeakerEmbeddingError:
        raise
    except Exception as error:
        # The readers raise errors of many kinds for damaged files, some with pages of advice.
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


def _read_pt(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_npy(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))


def _read_safetensors(path: Path) -> torch.Tensor:
    tensors = load_file(path)
    if len(tensors) != 1:
        raise SpeakerEmbeddingError(f"the file holds {len(tensors)} tensors, not one: {path}")
    return next(iter(tensors.values()))
