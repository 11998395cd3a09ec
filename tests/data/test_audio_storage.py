"""Audio files in object storage."""

from __future__ import annotations

import hashlib
import io

import fsspec
import numpy as np
import pytest
import soundfile

from acestep_ray.data import audio
from acestep_ray.data.audio import AudioError, AudioFile, audio_sha256, decode_window, probe_seconds
from acestep_ray.data.audio_source import WatchedFile
from acestep_ray.data.schema import RejectReason
from acestep_ray.storage import StorageError, StoredFile

RATE = 44_100
FORMATS = {
    "wav": {},
    "flac": {},
    "mp3": {},
    "ogg": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "aiff": {},
}


class CountedReads(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        type(self).count += count
        return count

    def read(self, size=-1):
        content = super().read(size)
        type(self).count += len(content)
        return content


@pytest.fixture
def requests(monkeypatch):
    """Names of the requests that stored files were asked."""
    asked = []

    def counted(name):
        method = getattr(StoredFile, name)
        monkeypatch.setattr(StoredFile, name, lambda file: asked.append(name) or method(file))

    counted("read_bytes")
    counted("open")
    return asked


@pytest.fixture
def store(tmp_path):
    """A function that stores a song of some seconds: (suffix, seconds) → its path and its object."""

    def put(suffix, seconds=4.0):
        rate = 48_000 if suffix == "opus" else RATE
        rng = np.random.default_rng(0)
        path = tmp_path / f"song.{suffix}"
        samples = 0.2 * rng.standard_normal((round(seconds * rate), 2))
        soundfile.write(path, samples, rate, **FORMATS[suffix])
        fsspec.filesystem("memory").pipe_file(f"/songs/{path.name}", path.read_bytes())
        return path, StoredFile.at(f"memory://songs/{path.name}")

    return put


def refusal(file) -> AudioError:
    with pytest.raises(AudioError) as caught:
        decode_window(file, 240.0)
    return caught.value


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_small_object_is_fetched_once_for_its_audio_and_its_hash(store, requests, suffix):
    path, file = store(suffix)
    with AudioFile(path) as local, AudioFile(file) as audio_file:
        np.testing.assert_array_equal(audio_file.read(0, 240), local.read(0, 240))
        np.testing.assert_array_equal(audio_file.read(2.5, 1), local.read(2.5, 1))
        assert audio_file.duration_seconds == local.duration_seconds
        assert audio_file.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert requests == ["read_bytes"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_large_object_is_read_by_ranges(store, requests, monkeypatch, suffix):
    monkeypatch.setattr(audio, "WHOLE_FETCH_BYTES", 10_000)
    path, file = store(suffix)
    with AudioFile(path) as local, AudioFile(file) as audio_file:
        np.testing.assert_array_equal(audio_file.read(2.5, 1), local.read(2.5, 1))
        np.testing.assert_array_equal(audio_file.read(0, 240), local.read(0, 240))
        assert audio_file.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert requests == ["open", "open"]


@pytest.mark.parametrize(("suffix", "share"), [("wav", 0.05), ("flac", 0.15), ("ogg", 0.3), ("aiff", 0.05)])
def test_of_a_large_object_only_the_window_is_read(store, monkeypatch, suffix, share):
    monkeypatch.setattr(audio, "WHOLE_FETCH_BYTES", 10_000)
    path, file = store(suffix, seconds=40.0)
    content = path.read_bytes()
    monkeypatch.setattr(StoredFile, "open", lambda file: CountedReads(content))
    monkeypatch.setattr(CountedReads, "count", 0)
    window, _ = decode_window(file, 1.0, start_seconds=30.0)
    assert window.shape == (2, RATE)
    assert CountedReads.count < share * len(content)


@pytest.mark.parametrize("suffix", ["mp3", "flac", "ogg", "opus"])
def test_a_large_object_of_several_files_is_read_to_its_end(store, monkeypatch, suffix):
    monkeypatch.setattr(audio, "WHOLE_FETCH_BYTES", 10_000)
    path, _ = store(suffix)
    path.write_bytes(path.read_bytes() * 2)
    fsspec.filesystem("memory").pipe_file("/songs/twice", path.read_bytes())
    file = StoredFile.at("memory://songs/twice")
    with AudioFile(path) as local, AudioFile(file) as audio_file:
        expected = local.read(0, 240)
        rate = local.sample_rate
        np.testing.assert_array_equal(audio_file.read(1, 1), expected[:, rate : 2 * rate])
        np.testing.assert_allclose(audio_file.read(3, 2), expected[:, 3 * rate : 5 * rate], atol=2e-3)
        np.testing.assert_array_equal(audio_file.read(0, 240), expected)
        assert audio_file.duration_seconds == local.duration_seconds == pytest.approx(8, abs=0.01)
        assert audio_file.warnings == local.warnings


def test_the_header_of_an_object_is_looked_at_without_fetching_it(store, requests):
    _, file = store("flac")
    assert probe_seconds(file) == 4.0
    assert requests == ["open"]


def test_a_url_is_an_object(store):
    path, file = store("wav")
    assert audio_sha256(file.url) == audio_sha256(path)
    assert decode_window(file.url, 1.0)[0].shape == (2, RATE)


def test_objects_that_are_not_there_or_empty_are_told_apart(store):
    fsspec.filesystem("memory").pipe_file("/songs/empty.wav", b"")
    missing = refusal(StoredFile.at("memory://songs/none.wav"))
    assert missing.reason is RejectReason.MISSING
    assert "memory://songs/none.wav" in str(missing)
    assert refusal(StoredFile.at("memory://songs/empty.wav")).reason is RejectReason.EMPTY
    fsspec.filesystem("memory").pipe_file("/songs/folder/song.wav", b"x")
    assert refusal(StoredFile.at("memory://songs/folder")).reason is RejectReason.MISSING


@pytest.mark.parametrize("request_name", ["status", "read_bytes"])
def test_a_failure_of_storage_is_no_damage(store, monkeypatch, request_name):
    _, file = store("wav")

    def fail(file):
        raise StorageError("the bucket is on fire")

    monkeypatch.setattr(StoredFile, request_name, fail)
    error = refusal(file)
    assert error.reason is RejectReason.UNREADABLE
    assert "the bucket is on fire" in str(error)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("after", [0, 60_000])
def test_a_failure_of_storage_within_a_file_is_no_damage(store, monkeypatch, capfd, suffix, after):
    monkeypatch.setattr(audio, "WHOLE_FETCH_BYTES", 10_000)
    path, file = store(suffix, seconds=20.0)

    class Fails(io.BytesIO):
        def readinto(self, buffer):
            if self.tell() + len(buffer) > after:
                raise StorageError("the bucket is on fire")
            return super().readinto(buffer)

        def read(self, size=-1):
            if self.tell() + size > after:
                raise StorageError("the bucket is on fire")
            return super().read(size)

    content = path.read_bytes()
    monkeypatch.setattr(StoredFile, "open", lambda file: Fails(content))
    error = refusal(file)
    assert error.reason is RejectReason.UNREADABLE
    assert "the bucket is on fire" in str(error)
    assert "Traceback" not in capfd.readouterr().err


def test_a_damaged_object_is_refused_like_a_file(store, capfd):
    path, file = store("flac")
    fsspec.filesystem("memory").pipe_file("/songs/song.flac", path.read_bytes()[:2000])
    assert refusal(file).reason is RejectReason.CORRUPT
    fsspec.filesystem("memory").pipe_file("/songs/song.flac", b"no music at all")
    assert refusal(file).reason is RejectReason.UNSUPPORTED
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("place", [-5, -(1 << 63), 1 << 70])
def test_a_place_that_no_file_has_is_not_gone_to(place):
    file = WatchedFile(io.BytesIO(b"abcdef"))
    file.seek(2)
    assert file.seek(place) == file.tell() == 2
    assert file.read(2) == b"cd"
