"""Files of PyTorch and NumPy from strangers: only dense tensors, and no more memory than the file is large."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import soundfile
import torch

from acestep_ray.cache.decoding import decode_song, file_versions
from acestep_ray.cache.songs import Recipe, Reject, Settings, Song
from acestep_ray.data.speaker import SpeakerEmbeddingError, load_speaker_embedding
from acestep_ray.errors import InputError
from acestep_ray.models.weights import read_weights
from acestep_ray.storage import Store
from tests.fuzz.readers import READERS
from tests.security.bounded import run

DIM = 6
TAKEN = {"plain.pt", "view.pt", "parameter.pt", "f4.npy", "f8.npy", "f2.npy", "plain.safetensors"}


class Allocates:
    """Unpickled, it takes 6 GiB; torch allows it."""

    def __reduce__(self):
        return bytearray, (6 << 30,)


def archive(
    path, pickled: bytes, storage: bytes = bytes(24), method: int = zipfile.ZIP_STORED, **entries: bytes
):
    """A file as torch.save writes it, with this pickle."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in {
            "data.pkl": pickled,
            "version": b"3\n",
            "byteorder": b"little",
            **entries,
        }.items():
            file.writestr(f"archive/{name}", content)
        file.writestr("archive/data/0", storage)
    return path


def pickled_tensor(numel: int = DIM, size: int = DIM) -> bytes:
    """What torch.save writes for a tensor that claims so many numbers."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(DIM), buffer)
    content = zipfile.ZipFile(buffer).read("archive/data.pkl")
    content = content.replace(b"K\x06t", b"J" + struct.pack("<i", numel) + b"t", 1)
    return content.replace(b"K\x06\x85", b"J" + struct.pack("<i", size) + b"\x85", 1)


def test_only_dense_tensors_of_floats_are_embeddings(tmp_path):
    """Sparse, CSR, CSC, meta, nested, quantised, packed, complex, negated: a reject of the song, nothing else."""
    settings = Settings(tag_shuffles=1, ssl_frame_stride=1, seed=0, speaker_dim=DIM)
    root, taken = Store.at(tmp_path), set()
    rate = 8_000
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(2 * rate), rate)
    for name, content in READERS["speaker"].seeds().items():
        (tmp_path / name).write_bytes(content)
        song = Song("a", "a.wav", ["pop"], {}, "la", "en", name)
        (outcome,) = decode_song(root, song, Recipe(settings, {}), file_versions(root, song))
        if isinstance(outcome, Reject):
            assert outcome.reason == "bad_speaker", name
        else:
            taken.add(name)
    assert taken == TAKEN


def test_no_pickle_of_a_few_bytes_takes_gigabytes(tmp_path):
    legacy = tmp_path / "legacy.pt"
    torch.save(Allocates(), legacy, _use_new_zipfile_serialization=False)
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps(Allocates(), 2))
    zipped = archive(tmp_path / "zipped.pt", pickle.dumps(Allocates(), 2))
    huge = archive(tmp_path / "tensor.pt", b"\x80\x02ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R.")
    array = tmp_path / "array.npy"
    with open(array, "wb") as file:
        np.lib.format.write_array_header_2_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (2**40,)}
        )
        file.write(bytes(24))
    folder = tmp_path / "model"
    folder.mkdir()
    archive(folder / "pytorch_model.bin", pickle.dumps({"a": Allocates()}, 2))
    code = """
        for path in sys.argv[1:-1]:
            try:
                load_speaker_embedding(path, 6)
            except SpeakerEmbeddingError:
                print("refused")
        try:
            list(read_weights(Path(sys.argv[-1])))
        except InputError:
            print("refused")
    """
    imports = """
        from pathlib import Path
        from acestep_ray.data.speaker import SpeakerEmbeddingError, load_speaker_embedding
        from acestep_ray.errors import InputError
        from acestep_ray.models.weights import read_weights
    """
    told = run(code, legacy, plain, zipped, huge, array, folder, imports=imports)
    assert told.split() == ["refused"] * 6


@pytest.mark.parametrize(("numel", "size"), [(2**30, DIM), (2**30, 2**30), (DIM, 2**30), (1, DIM)])
def test_storages_that_declare_more_than_the_file_has_are_refused(tmp_path, numel, size):
    path = archive(tmp_path / "voice.pt", pickled_tensor(numel, size))
    with pytest.raises(SpeakerEmbeddingError):
        load_speaker_embedding(path, DIM)
    with pytest.raises(InputError):
        list(read_weights(archive(tmp_path / "pytorch_model.bin", pickled_tensor(numel, size)).parent))


def nested(levels: int) -> bytes:
    """A tuple that holds itself twice, thirty times over, as a key: to hash it takes 2^levels steps."""
    levels_of_two = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))
    return b"\x80\x02})" + levels_of_two + b"K\x01s."


@pytest.mark.parametrize(
    ("pickled", "entries", "method"),
    [
        (nested(60), {}, zipfile.ZIP_STORED),
        (pickled_tensor(), {"x": bytes(1 << 20)}, zipfile.ZIP_DEFLATED),
        (pickled_tensor(), {"data.pkl.": b"", "DATA.pkl": b"\x80\x02N."}, zipfile.ZIP_STORED),
        (b"\x80\x02" + b"(" * 100_000 + b".", {}, zipfile.ZIP_STORED),
        (b"\x80\x02X\xff\xff\xff\x7f.", {}, zipfile.ZIP_STORED),
        (b"\x80\x02K\x01r\xff\xff\xff\x7f.", {}, zipfile.ZIP_STORED),
        (b"", {}, zipfile.ZIP_STORED),
    ],
)
def test_archives_that_are_not_as_torch_writes_them_are_refused(tmp_path, pickled, entries, method):
    path = archive(tmp_path / "voice.pt", pickled, method=method, **entries)
    with pytest.raises(SpeakerEmbeddingError):
        load_speaker_embedding(path, DIM)


def test_entries_that_overlap_are_refused(tmp_path):
    content = archive(tmp_path / "voice.pt", pickled_tensor()).read_bytes()
    start = content.index(b"PK\x01\x02")
    # Every entry of the directory begins where the first one does.
    places = [i for i in range(start, len(content)) if content[i : i + 4] == b"PK\x01\x02"]
    changed = bytearray(content)
    for place in places:
        changed[place + 42 : place + 46] = bytes(4)
    (tmp_path / "voice.pt").write_bytes(changed)
    with pytest.raises(SpeakerEmbeddingError):
        load_speaker_embedding(tmp_path / "voice.pt", DIM)


def test_weights_of_a_model_are_read_as_before(tmp_path):
    tied = torch.nn.Parameter(torch.ones(3))
    module = torch.nn.Module()
    module.a, module.b = tied, tied
    torch.save(
        {**module.state_dict(), "c": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "pytorch_model.bin"
    )
    found = {name: tensor for name, tensor, _ in read_weights(tmp_path)}
    assert found.keys() == {"a", "b", "c"}
    assert torch.equal(found["b"], torch.ones(3))
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "pytorch_model.bin")
    assert len(list(read_weights(tmp_path))) == 2
