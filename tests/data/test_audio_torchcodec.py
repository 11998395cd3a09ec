"""Audio that FFmpeg reads through torchcodec."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import fsspec
import numpy as np
import pytest
import soundfile

from acestep_ray.data import audio, audio_decoders
from acestep_ray.data.audio import AudioError, AudioFile, decode_window, probe_seconds
from acestep_ray.data.schema import RejectReason
from acestep_ray.storage import StoredFile

RATE = 44_100
# Options of the ffmpeg program for each kind of file.
KINDS = {
    "m4a": ["-c:a", "aac"],
    "fragmented.m4a": ["-c:a", "aac", "-movflags", "frag_keyframe+empty_moov", "-f", "mp4"],
    "alac.m4a": ["-c:a", "alac"],
    "aac": ["-c:a", "aac"],
    "wma": ["-c:a", "wmav2"],
    "webm": ["-c:a", "libopus"],
    "mka": ["-c:a", "libvorbis"],
    "wv": ["-c:a", "wavpack"],
    "tta": ["-c:a", "tta"],
    "ac3": ["-c:a", "ac3"],
}
LOSSLESS = ("alac.m4a", "wv", "tta")

needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None or importlib.util.find_spec("torchcodec") is None,
    reason="needs the ffmpeg program and torchcodec",
)


def song(seconds: float) -> np.ndarray:
    """A tone that rises, so that every moment differs, and noise: (n, 2)."""
    t = np.arange(round(seconds * RATE)) / RATE
    noise = 0.02 * np.random.default_rng(0).standard_normal(len(t))
    return np.stack([0.4 * np.sin(2 * np.pi * (200 + 100 * t) * t), 0.2 * np.cos(2600 * t) + noise], axis=1)


@pytest.fixture
def encode(tmp_path):
    """A function that writes a song of some seconds with the ffmpeg program: (kind, seconds) → its path."""

    def write(kind, seconds=6.0, *options):
        soundfile.write(tmp_path / "source.wav", song(seconds), RATE)
        path = tmp_path / f"song.{kind}"
        command = ["ffmpeg", "-v", "error", "-y", "-i", str(tmp_path / "source.wav")]
        done = subprocess.run([*command, *KINDS[kind], *options, str(path)], capture_output=True, text=True)
        if "Unknown encoder" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        return path

    return write


def refusal(path, start_seconds=0.0) -> AudioError:
    with pytest.raises(AudioError) as caught:
        decode_window(path, 240.0, start_seconds)
    return caught.value


def delay_between(samples: np.ndarray, expected: np.ndarray) -> int:
    """Samples by which one signal lags behind another of the same length."""
    size = 2 * len(samples)
    product = np.fft.rfft(samples, size) * np.conj(np.fft.rfft(expected, size))
    lag = int(np.fft.irfft(product).argmax())
    return lag if lag < len(samples) else lag - size


@needs_ffmpeg
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_decodes_to_its_samples(encode, kind):
    with AudioFile(encode(kind)) as file:
        samples = file.read(0, 240)
        rate = file.sample_rate
    assert (samples.dtype, samples.shape[0]) == (np.float32, 2)
    assert rate == (48_000 if kind == "webm" else RATE)
    assert samples.shape[1] / rate == pytest.approx(6.0, abs=0.15)
    if kind in LOSSLESS:
        np.testing.assert_allclose(samples, song(6).T, atol=2**-15)
    assert np.std(samples[0]) == pytest.approx(np.std(song(6)[:, 0]), rel=0.05)


@needs_ffmpeg
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("webm", "ac3")])
def test_only_the_window_is_decoded_and_lies_at_its_place(encode, kind):
    path = encode(kind, 12.0)
    window, rate = decode_window(path, 2.0, start_seconds=7.3)
    assert window.shape == (2, 2 * RATE)
    expected = song(12)[round(7.3 * rate) : round(9.3 * rate), 0]
    # A few encoders' delays are not in their files.
    assert abs(delay_between(window[0], expected)) < 0.06 * rate
    if kind in LOSSLESS:
        np.testing.assert_allclose(window[0], expected, atol=2**-15)


@needs_ffmpeg
@pytest.mark.parametrize("kind", KINDS)
def test_past_the_end_there_is_nothing(encode, kind):
    with AudioFile(encode(kind)) as file:
        assert file.read(20, 5).shape == (2, 0)
        assert file.read(5.5, 20).shape[1] == pytest.approx(
            0.5 * file.sample_rate, abs=0.2 * file.sample_rate
        )


@needs_ffmpeg
def test_the_length_is_known_where_the_container_says_it(encode):
    for kind in ("m4a", "wma", "webm", "wv"):
        assert probe_seconds(encode(kind)) == pytest.approx(6.0, abs=0.1)
    assert probe_seconds(encode("aac")) is None


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["mp3", "wav", "bin"])
def test_the_content_decides_and_not_the_suffix(encode, suffix):
    path = encode("m4a")
    samples, _ = decode_window(path.rename(path.with_suffix(f".{suffix}")), 240.0)
    assert samples.shape[1] == pytest.approx(6 * RATE, rel=0.01)


@needs_ffmpeg
@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "aiff"])
def test_what_soundfile_reads_is_not_given_to_ffmpeg(tmp_path, monkeypatch, suffix):
    def never():
        raise AssertionError("FFmpeg was asked")

    monkeypatch.setattr(audio_decoders, "_torchcodec", never)
    path = tmp_path / f"song.{suffix}"
    soundfile.write(path, song(1.0), RATE)
    assert decode_window(path.rename(tmp_path / "song.m4a"), 240.0)[0].shape == (2, RATE)
    cut_off = (tmp_path / "song.m4a").read_bytes()[:20]
    (tmp_path / "song.m4a").write_bytes(cut_off)
    assert refusal(tmp_path / "song.m4a").reason is RejectReason.CORRUPT


@needs_ffmpeg
@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", "ffconcat version 1.0\nfile secret.wav\n", "no music"]
)
def test_playlists_are_not_followed(tmp_path, monkeypatch, text):
    soundfile.write(tmp_path / "secret.wav", song(1.0), RATE)
    (tmp_path / "song.m4a").write_text(text)
    assert refusal(tmp_path / "song.m4a").reason is RejectReason.UNSUPPORTED


@needs_ffmpeg
def test_a_name_is_no_instruction(encode, monkeypatch):
    path = encode("m4a")
    monkeypatch.chdir(path.parent)
    path.rename("concat:song.m4a")
    assert decode_window("concat:song.m4a", 1.0)[0].shape == (2, RATE)


@needs_ffmpeg
@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [("m4a", ["-ar", "7350"], "7350 Hz"), ("mka", ["-ac", "16", "-c:a", "pcm_s16le"], "16 channels")],
)
def test_unusual_rates_and_channels_are_unsupported(encode, kind, options, named):
    error = refusal(encode(kind, 1.0, *options))
    assert error.reason is RejectReason.UNSUPPORTED
    assert named in str(error)


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["m4a", "wma", "webm"])
def test_a_file_without_its_index_or_header_is_corrupt(encode, kind):
    path = encode(kind)
    path.write_bytes(path.read_bytes()[:60])
    error = refusal(path)
    assert error.reason is RejectReason.CORRUPT
    assert ".cpp" not in str(error)
    assert "\n" not in str(error)


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["fragmented.m4a", "webm", "wv"])
def test_a_file_cut_off_late_is_used_as_far_as_it_goes(encode, kind):
    path = encode(kind, 30.0)
    content = path.read_bytes()
    path.write_bytes(content[: int(0.7 * len(content))])
    samples, rate = decode_window(path, 240.0)
    assert 18 < samples.shape[1] / rate < 23
    path.write_bytes(content[: int(0.3 * len(content))])
    error = refusal(path)
    assert error.reason is RejectReason.CORRUPT
    assert "30.0 s that the header promises" in str(error)


@needs_ffmpeg
def test_an_object_in_storage_is_fetched_once_or_read_by_ranges(encode, monkeypatch):
    path = encode("m4a", 12.0)
    fsspec.filesystem("memory").pipe_file("/songs/song.m4a", path.read_bytes())
    file = StoredFile.at("memory://songs/song.m4a")
    expected, _ = decode_window(path, 2.0, 7.3)
    np.testing.assert_array_equal(decode_window(file, 2.0, 7.3)[0], expected)
    monkeypatch.setattr(audio, "WHOLE_FETCH_BYTES", 1000)
    monkeypatch.delattr(StoredFile, "read_bytes")
    np.testing.assert_array_equal(decode_window(file, 2.0, 7.3)[0], expected)


@pytest.mark.parametrize(
    ("modules", "why"),
    [
        ({"torchcodec": None, "torchcodec.decoders": None}, "torchcodec is not installed"),
        ({"torchcodec": object(), "torchcodec.decoders": None}, "torchcodec is not installed"),
    ],
)
def test_without_torchcodec_the_message_says_what_to_install(tmp_path, monkeypatch, modules, why):
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    audio_decoders._torchcodec.cache_clear()
    path = tmp_path / "song.m4a"
    path.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(200))
    error = refusal(path)
    audio_decoders._torchcodec.cache_clear()
    assert error.reason is RejectReason.UNSUPPORTED
    assert why in str(error)
    assert "pip install 'acestep-ray[torchcodec]'" in str(error)
    assert str(path) in str(error)


def test_without_ffmpeg_the_message_says_so(tmp_path, monkeypatch):
    class Unloadable:
        def __getattr__(self, name):
            raise RuntimeError("Could not load libtorchcodec. Likely causes: …\n" * 20)

    monkeypatch.setitem(sys.modules, "torchcodec.decoders", Unloadable())
    audio_decoders._torchcodec.cache_clear()
    path = tmp_path / "song.m4a"
    path.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(200))
    error = refusal(path)
    audio_decoders._torchcodec.cache_clear()
    assert "finds no FFmpeg" in str(error)
    assert "\n" not in str(error)


def test_torchcodec_is_imported_when_it_is_needed():
    code = "import sys, acestep_ray.data.audio; sys.exit('torchcodec' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
