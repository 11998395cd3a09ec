from __future__ import annotations

import os

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from acestep_ray.data.speaker import SpeakerEmbeddingError, load_speaker_embedding
from acestep_ray.storage import StoredFile

DIM = 6
VALUES = torch.linspace(-1, 1, DIM)


def write(path, tensor):
    if path.suffix == ".pt":
        torch.save(tensor, path)
    elif path.suffix == ".npy":
        np.save(path, tensor.numpy())
    else:
        save_file({"embedding": tensor}, path)
    return path


def refusal(path) -> str:
    with pytest.raises(SpeakerEmbeddingError) as caught:
        load_speaker_embedding(path, DIM)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".safetensors", ".PT"])
@pytest.mark.parametrize("shape", [(DIM,), (1, DIM)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_embeddings_are_read_from_every_kind_of_file(tmp_path, suffix, shape, dtype):
    path = write(tmp_path / f"voice{suffix.lower()}", VALUES.reshape(shape).to(dtype))
    embedding = load_speaker_embedding(path.rename(path.with_suffix(suffix)), DIM)
    assert (embedding.shape, embedding.dtype) == ((DIM,), np.float32)
    np.testing.assert_array_equal(embedding, VALUES.to(dtype).float().numpy())


def test_a_bfloat16_tensor_with_gradient_is_read(tmp_path):
    path = write(tmp_path / "voice.pt", VALUES.to(torch.bfloat16).requires_grad_())
    np.testing.assert_array_equal(
        load_speaker_embedding(path, DIM), VALUES.to(torch.bfloat16).float().numpy()
    )


@pytest.mark.parametrize("shape", [(DIM + 1,), (2, DIM), (DIM, 1), (1, 1, DIM), ()])
def test_other_shapes_are_refused(tmp_path, shape):
    assert f"not ({DIM},)" in refusal(write(tmp_path / "voice.pt", torch.zeros(shape)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    values = VALUES.clone()
    values[2] = value
    assert "NaN or infinite" in refusal(write(tmp_path / "voice.npy", values))


@pytest.mark.parametrize("content", [{"embedding": VALUES}, [0.5] * DIM, torch.zeros(DIM, dtype=torch.int64)])
def test_other_content_is_refused(tmp_path, content):
    assert "not a tensor of floats" in refusal(write(tmp_path / "voice.pt", content))


def test_several_tensors_are_refused(tmp_path):
    save_file({"a": VALUES, "b": VALUES.clone()}, tmp_path / "voice.safetensors")
    assert "2 tensors" in refusal(tmp_path / "voice.safetensors")


class RunsCode:
    def __reduce__(self):
        return exec, ("open(__import__('os').environ['PROBE'], 'w').close()",)


@pytest.mark.parametrize("suffix", [".pt", ".npy"])
def test_code_in_a_file_is_not_run(tmp_path, monkeypatch, suffix):
    monkeypatch.setenv("PROBE", str(tmp_path / "probe"))
    path = tmp_path / f"voice{suffix}"
    if suffix == ".pt":
        torch.save(RunsCode(), path)
    else:
        np.save(path, np.array([RunsCode()], dtype=object), allow_pickle=True)
    assert "cannot be read" in refusal(path)
    assert not (tmp_path / "probe").exists()


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no embedding at all", b"\x93NUMPY\x01\0"])
def test_damaged_files_are_refused_in_one_line(tmp_path, suffix, content):
    path = tmp_path / f"voice{suffix}"
    path.write_bytes(content)
    assert "\n" not in refusal(path)


def test_missing_files_and_unknown_suffixes_are_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.pt")
    (tmp_path / "voice.bin").write_bytes(b"x")
    assert ".safetensors" in refusal(tmp_path / "voice.bin")


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".safetensors"])
def test_embeddings_are_read_from_object_storage(tmp_path, suffix):
    content = write(tmp_path / f"voice{suffix}", VALUES).read_bytes()
    fsspec.filesystem("memory").pipe_file(f"/voices/voice{suffix}", content)
    url = f"memory://voices/voice{suffix}"
    for file in (url, StoredFile.at(url)):
        np.testing.assert_array_equal(load_speaker_embedding(file, DIM), VALUES.numpy())
    with pytest.raises(SpeakerEmbeddingError, match="does not exist: memory://voices/none"):
        load_speaker_embedding("memory://voices/none.pt", DIM)


def test_numbers_of_the_other_byte_order_are_read(tmp_path):
    np.save(tmp_path / "voice.npy", VALUES.numpy().astype(">f4"))
    np.testing.assert_array_equal(load_speaker_embedding(tmp_path / "voice.npy", DIM), VALUES.numpy())


def test_a_file_far_too_large_is_refused_unread(tmp_path):
    with open(tmp_path / "voice.npy", "wb") as file:
        file.truncate(1 << 40)
    assert "bytes are no speaker embedding" in refusal(tmp_path / "voice.npy")


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "broken.pt").symlink_to(tmp_path / "none.pt")
    for name in ("folder.pt", "pipe.pt", "broken.pt"):
        assert "does not exist" in refusal(tmp_path / name)
