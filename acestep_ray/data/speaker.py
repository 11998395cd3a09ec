"""Reads speaker embeddings from files. Nothing is ever unpickled as code."""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
from typing import TYPE_CHECKING

import numpy as np

from acestep_ray.foreign_files import FIRST_BYTES, start_of_impostor
from acestep_ray.storage import StoredFile
from acestep_ray.torch_archive import NotTensorsError, check_archive

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
    problem = _why_not_plain(tensor)
    if problem is not None:
        raise SpeakerEmbeddingError(f"the file holds {problem}, not a tensor of floats: {path}")
    assert isinstance(tensor, torch.Tensor)
    if tuple(tensor.shape) not in ((dim,), (1, dim)):
        raise SpeakerEmbeddingError(
            f"the embedding has the shape {tuple(tensor.shape)}, not ({dim},): {path}"
        )
    try:
        embedding = tensor.detach().reshape(dim).to(torch.float32).numpy()
    except Exception as error:
        raise SpeakerEmbeddingError(
            f"the speaker embedding cannot be read ({type(error).__name__}): {path}"
        ) from None
    if not np.isfinite(embedding).all():
        raise SpeakerEmbeddingError(f"the embedding holds NaN or infinite values: {path}")
    return embedding


def _why_not_plain(tensor: object) -> str | None:
    """What something is that is no dense tensor of floats in this machine's memory; None for one that is."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return type(tensor).__name__
    assert isinstance(tensor, torch.Tensor)
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"a tensor with the layout {str(tensor.layout).removeprefix('torch.')}"
    if tensor.device.type != "cpu":
        return f"a tensor on the device `{tensor.device}`"
    if tensor.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        return str(tensor.dtype)
    return "a negated view" if tensor.is_neg() else None


def _read_pt(content: bytes) -> object:
    import torch

    file = io.BytesIO(content)
    check_archive(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensor = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own message tells how to run what the file holds
        raise NotTensorsError from None
    # Newer versions of torch compare the two; older ones would read behind the file's end.
    if torch.is_tensor(tensor) and tensor.untyped_storage().nbytes() > len(content):
        raise ValueError("its tensor claims more bytes than the file has")
    return tensor


def _read_npy(content: bytes) -> torch.Tensor:
    import torch

    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version, np.lib.format.read_array_header_2_0)
    shape, _, dtype = read_header(file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError("its header does not describe what the file holds")
    values = np.load(io.BytesIO(content), allow_pickle=False)
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))


def _read_safetensors(content: bytes) -> torch.Tensor:
    from safetensors.torch import load

    tensors = load(content)
    if len(tensors) != 1:
        raise ValueError(f"{len(tensors)} tensors, not one")
    return next(iter(tensors.values()))
