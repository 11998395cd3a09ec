from __future__ import annotations

import hashlib
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
import soxr

from acestep_ray.data import audio_decoders, audio_soundfile
from acestep_ray.data.audio import (
    SAMPLE_RATE,
    AudioError,
    AudioFile,
    audio_sha256,
    decode_window,
    probe_seconds,
    silent_fraction,
    to_training_audio,
)
from acestep_ray.data.schema import RejectReason

FORMATS = {
    "wav": {},
    "flac": {},
    "mp3": {},
    "ogg": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "aiff": {},
}


def noise(seconds: float, rate: int = 44_100, channels: int = 2) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (0.2 * rng.standard_normal((round(seconds * rate), channels))).astype(np.float32)


def write(path, seconds=1.0, rate=44_100, channels=2, **options):
    soundfile.write(path, noise(seconds, rate, channels), rate, **options)
    return path


def keep_share(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def refusal(path, max_seconds=240.0) -> AudioError:
    with pytest.raises(AudioError) as caught:
        decode_window(path, max_seconds)
    assert str(path) in str(caught.value)
    return caught.value


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_decodes_to_its_samples(tmp_path, suffix):
    path = write(tmp_path / f"song.{suffix}", rate=48_000, **FORMATS[suffix])
    samples, rate = decode_window(path, 240.0)
    assert (samples.shape, samples.dtype, rate) == ((2, 48_000), np.float32, 48_000)
    if suffix in ("wav", "flac", "aiff"):
        np.testing.assert_allclose(samples, noise(1, 48_000).T, atol=2**-15)
    else:
        assert np.std(samples) == pytest.approx(0.2, rel=0.3)


@pytest.mark.parametrize("suffix", FORMATS)
def test_only_the_window_is_decoded(tmp_path, suffix):
    path = write(tmp_path / f"song.{suffix}", seconds=3, rate=48_000, **FORMATS[suffix])
    whole, _ = decode_window(path, 240.0)
    window, _ = decode_window(path, 1.5)
    np.testing.assert_array_equal(window, whole[:, :72_000])


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_window_is_a_part_of_the_whole(tmp_path, suffix):
    path = write(tmp_path / f"song.{suffix}", seconds=4, rate=48_000, **FORMATS[suffix])
    with AudioFile(path) as file:
        assert (file.sample_rate, file.channels) == (48_000, 2)
        assert file.duration_seconds == pytest.approx(4, abs=0.1)
        whole = file.read(0, 240)
        for start, seconds in [(2.5, 1), (0.1001, 0.7), (0.8001, 5), (3.99, 0.004), (0, 1)]:
            first = round(start * 48_000)
            expected = whole[:, first : first + round(seconds * 48_000)]
            np.testing.assert_array_equal(file.read(start, seconds), expected)
        assert file.read(4.5, 1).shape == file.read(1e15, 1).shape == (2, 0)


def test_windows_of_an_mp3_without_a_length_are_parts_of_the_whole(tmp_path):
    path = write(tmp_path / "song.mp3", seconds=8)
    path.write_bytes(path.read_bytes()[417:])
    with AudioFile(path, fetch_whole=False) as file:
        assert file.duration_seconds is None
    with AudioFile(path) as file:
        whole = file.read(0, 240)
        assert file.duration_seconds == whole.shape[1] / 44_100
        np.testing.assert_array_equal(file.read(5, 1), whole[:, 5 * 44_100 : 6 * 44_100])
        assert file.read(20, 1).shape == (2, 0)


@pytest.mark.parametrize("lands_elsewhere", [False, True])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_window_is_found_where_seeking_fails(tmp_path, monkeypatch, suffix, lands_elsewhere):
    path = write(tmp_path / f"song.{suffix}", seconds=4, rate=48_000, **FORMATS[suffix])
    whole, _ = decode_window(path, 240)
    monkeypatch.setattr(audio_soundfile, "_BLOCK_SAMPLES", 5000)  # several blocks to discard

    def seek(self, frames, whence=0):
        if whence == 0 and frames == 96_000 and self.tell() == 0:
            if lands_elsewhere:
                return libsndfile_seek(self, 90_000)
            raise soundfile.LibsndfileError(1)
        return libsndfile_seek(self, frames, whence)

    libsndfile_seek = soundfile.SoundFile.seek
    monkeypatch.setattr(soundfile.SoundFile, "seek", seek)
    with AudioFile(path) as file:
        window = file.read(2, 1)
    np.testing.assert_array_equal(window, whole[:, 96_000:144_000])


def test_the_length_comes_from_the_header_alone(tmp_path):
    path = write(tmp_path / "song.flac", seconds=4)
    assert probe_seconds(keep_share(path, 0.5)) == 4
    assert probe_seconds(tmp_path / "none.flac") is None
    path.write_text("no audio")
    assert probe_seconds(path) is None


def test_an_absurd_header_allocates_no_memory(tmp_path):
    path = tmp_path / "song.flac"
    soundfile.write(path, noise(0.2, 192_000, 8), 192_000)
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F  # the last 36 bits of the stream's 18 bytes of sizes: the number of samples
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)
    assert probe_seconds(path) > 90 * 3600
    tracemalloc.start()
    with AudioFile(path) as file:  # its last frame is whole: it is the count that is wrong
        assert file.read(0, 240).shape == (8, 38_400)
    path.write_bytes(content[: len(content) // 2])
    with AudioFile(path) as file, pytest.raises(AudioError, match="s can be decoded"):
        file.read(0, 240)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20  # the header's claim is 1.5 GB


def test_damage_behind_the_window_does_not_matter(tmp_path):
    path = keep_share(write(tmp_path / "song.flac", seconds=4), 0.4)
    assert decode_window(path, 1.0)[0].shape == (2, 44_100)
    assert refusal(path).reason is RejectReason.CORRUPT


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 96_000, 192_000])
@pytest.mark.parametrize("channels", [1, 8])
def test_usual_rates_and_channels_are_read(tmp_path, rate, channels):
    path = write(tmp_path / "song.wav", 0.1, rate, channels)
    samples, decoded_rate = decode_window(path, 240.0)
    assert (samples.shape, decoded_rate) == ((channels, rate // 10), rate)


@pytest.mark.parametrize(
    ("rate", "channels", "named"),
    [(4_000, 1, "4000 Hz"), (384_000, 1, "384000 Hz"), (44_100, 9, "9 channels")],
)
def test_unusual_rates_and_channels_are_unsupported(tmp_path, rate, channels, named):
    error = refusal(write(tmp_path / "song.wav", 0.1, rate, channels))
    assert error.reason is RejectReason.UNSUPPORTED
    assert named in str(error)


def test_a_missing_file_and_a_directory_are_told_apart(tmp_path):
    assert refusal(tmp_path / "none.wav").reason is RejectReason.MISSING
    (tmp_path / "folder.wav").mkdir()
    assert refusal(tmp_path / "folder.wav").reason is RejectReason.UNSUPPORTED


def test_links_are_followed(tmp_path):
    outside = write(tmp_path / "right.wav")
    folder = tmp_path / "songs"
    folder.mkdir()
    (folder / "song.wav").symlink_to(outside)
    assert decode_window(folder / "song.wav", 240.0)[0].shape == (2, 44_100)
    (folder / "broken.wav").symlink_to(tmp_path / "none.wav")
    (folder / "circle.wav").symlink_to(folder / "circle.wav")
    for name in ("broken.wav", "circle.wav"):
        assert refusal(folder / name).reason is RejectReason.MISSING


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "device.wav").symlink_to("/dev/zero")
    for name in ("pipe.wav", "device.wav"):
        assert refusal(tmp_path / name).reason is RejectReason.UNSUPPORTED
        with pytest.raises(AudioError):
            audio_sha256(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["two\nlines.wav", "🎵 🎤.flac", "quo'te\".mp3", "-n.ogg", "a:b|c.wav", "é" * 100 + ".wav"]
)
def test_names_of_all_kinds_are_read(tmp_path, name):
    assert decode_window(write(tmp_path / name), 240.0)[1] == 44_100


@pytest.mark.parametrize("name", ["x" * 300 + ".wav", "nul\0.wav"])
def test_names_that_no_file_can_have_are_unreadable(tmp_path, name):
    assert refusal(tmp_path / name).reason is RejectReason.UNREADABLE


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_of_one_sample_is_read(tmp_path, suffix):
    path = write(tmp_path / f"song.{suffix}", seconds=1 / 48_000, rate=48_000, **FORMATS[suffix])
    samples, rate = decode_window(path, 240.0)
    assert samples.shape[1] >= 1
    assert to_training_audio(samples, rate).shape == (2, 3 * SAMPLE_RATE)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user"
)
def test_a_file_without_permission_is_unreadable(tmp_path):
    path = write(tmp_path / "song.wav")
    path.chmod(0)
    assert refusal(path).reason is RejectReason.UNREADABLE


def test_empty_files_are_empty(tmp_path):
    (tmp_path / "bytes.wav").write_bytes(b"")
    assert refusal(tmp_path / "bytes.wav").reason is RejectReason.EMPTY
    soundfile.write(tmp_path / "frames.wav", np.zeros((0, 2)), 44_100)
    assert refusal(tmp_path / "frames.wav").reason is RejectReason.EMPTY


@pytest.mark.parametrize("suffix", ["wav", "mp3", "flac", "ogg", "aiff", "au", "vox", "gsm", "raw"])
def test_text_under_the_name_of_audio_is_unsupported(tmp_path, suffix):
    path = tmp_path / f"song.{suffix}"
    path.write_text("[verse]\nThis is no music\n" * 50)
    assert refusal(path).reason is RejectReason.UNSUPPORTED


@pytest.mark.parametrize(
    ("suffix", "head", "named"),
    [
        ("m4a", b"\0\0\0\x20ftypM4A ", "m4a"),
        ("mp3", b"\0\0\0\x20ftypM4A ", "m4a"),
        ("aac", b"\xff\xf1\x50\x80", "aac"),
        ("wma", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "wma"),
        ("wav", b"\x1a\x45\xdf\xa3", "WebM"),
        ("wv", b"wvpk", "WavPack"),
        ("aac", b"unknown", "aac"),
    ],
)
def test_without_torchcodec_what_it_would_read_is_named(tmp_path, monkeypatch, suffix, head, named):
    monkeypatch.setattr(audio_decoders, "_torchcodec", lambda: (None, "torchcodec is not installed"))
    path = tmp_path / f"song.{suffix}"
    path.write_bytes(head + bytes(range(256)) * 20)
    error = refusal(path)
    assert error.reason is RejectReason.UNSUPPORTED
    assert named in str(error).removesuffix(str(path))


@pytest.mark.parametrize("content", ["wav", "flac", "mp3"])
@pytest.mark.parametrize("suffix", ["mp3", "wav", "ogg", "bin"])
def test_the_content_decides_and_not_the_suffix(tmp_path, content, suffix):
    path = write(tmp_path / f"right.{content}").rename(tmp_path / f"wrong.{suffix}")
    assert decode_window(path, 240.0)[0].shape == (2, 44_100)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "aiff"])
def test_a_file_cut_off_in_its_first_half_is_corrupt(tmp_path, suffix):
    error = refusal(keep_share(write(tmp_path / f"song.{suffix}", seconds=6), 0.3))
    assert error.reason is RejectReason.CORRUPT
    assert "6.0 s" in str(error)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "aiff"])
def test_a_file_cut_off_late_is_used_as_far_as_it_goes(tmp_path, suffix):
    path = write(tmp_path / f"song.{suffix}", seconds=6)
    whole, _ = decode_window(path, 240.0)
    keep_share(path, 0.8)
    assert refusal(path).reason is RejectReason.CORRUPT
    with AudioFile(path, min_decoded=0.6) as file:
        samples = file.read(0, 240)
    assert 0.7 * 6 < samples.shape[1] / 44_100 < 0.9 * 6
    np.testing.assert_array_equal(samples[:, :44_100], whole[:, :44_100])


@pytest.mark.parametrize(
    ("suffix", "length"), [("wav", 30), ("flac", 50), ("mp3", 60), ("ogg", 60), ("aiff", 30)]
)
def test_a_file_cut_off_in_its_header_is_corrupt(tmp_path, suffix, length):
    path = write(tmp_path / f"song.{suffix}")
    path.write_bytes(path.read_bytes()[:length])
    assert refusal(path).reason is RejectReason.CORRUPT


@pytest.mark.parametrize("declared", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_wav_of_unknown_length_is_read_to_its_end(tmp_path, declared):
    path = write(tmp_path / "streamed.wav")
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", declared)
    path.write_bytes(content)
    assert decode_window(path, 240.0)[0].shape == (2, 44_100)


def test_a_flac_of_unknown_length_is_read_to_its_end(tmp_path):
    path = write(tmp_path / "streamed.flac", seconds=2.3)
    whole, _ = decode_window(path, 240.0)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the last 36 bits of the stream's 18 bytes of sizes: the number of samples
    content[22:26] = bytes(4)
    path.write_bytes(content)
    np.testing.assert_array_equal(decode_window(path, 240.0)[0], whole)


def test_an_mp3_without_a_length_is_not_taken_for_cut_off(tmp_path):
    # Quiet at first: from the small first frame the decoder guesses a length several times too large.
    samples = noise(6)
    samples[: 3 * 44_100] = 0
    path = tmp_path / "song.mp3"
    soundfile.write(path, samples, 44_100)
    content = path.read_bytes()
    first_frame = 417  # bytes of the frame at 128 kbit/s and 44.1 kHz that holds the length
    assert b"Info" in content[:first_frame] or b"Xing" in content[:first_frame]
    path.write_bytes(content[first_frame:])
    assert decode_window(path, 240.0)[0].shape[1] == pytest.approx(6 * 44_100, rel=0.02)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_corrupt(tmp_path, value):
    samples = noise(0.5)
    samples[100, 1] = value
    soundfile.write(tmp_path / "song.wav", samples, 44_100, subtype="FLOAT")
    assert refusal(tmp_path / "song.wav").reason is RejectReason.CORRUPT


def test_damage_does_not_reach_the_windows_before_it(tmp_path):
    path = keep_share(write(tmp_path / "song.flac", seconds=6), 0.6)
    assert decode_window(path, 2.0, start_seconds=1.0)[0].shape == (2, 88_200)
    with pytest.raises(AudioError, match=r"0.0 s can be decoded from 4.0 s on, of the 2.0 s") as caught:
        decode_window(path, 2.0, start_seconds=4.0)
    assert caught.value.reason is RejectReason.CORRUPT


def test_audio_errors_survive_pickling(tmp_path):
    error = refusal(keep_share(write(tmp_path / "song.flac", seconds=2), 0.2))
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.reason, str(copy)) == (error.reason, str(error))
    assert error.__cause__ is None


@pytest.mark.parametrize("rate", [44_100, 22_050, 96_000, 8_000, 44_099])
def test_a_resampled_tone_is_the_tone_at_the_new_rate(rate):
    # The edge of the filters is kept out: the tone does not start softly.
    def tone(at):
        phase = 2 * np.pi * 1000 * np.arange(5 * at) / at
        return np.stack([np.sin(phase), np.cos(phase)])

    wave = to_training_audio(tone(rate).astype(np.float32) * 0.9, rate).astype(np.float64)
    assert wave.shape == (2, 5 * SAMPLE_RATE)
    error = (wave - 0.9 * tone(SAMPLE_RATE))[:, SAMPLE_RATE // 10 : -SAMPLE_RATE // 10]
    assert np.abs(error).max() < 1e-5


def test_resampling_leaves_no_alias():
    phase = 2 * np.pi * 30_000 * np.arange(4 * 96_000) / 96_000
    wave = to_training_audio(0.5 * np.sin(phase).astype(np.float32)[None], 96_000)
    assert np.abs(wave[:, 5000:-5000]).max() < 1e-5


def test_resampling_in_parts_is_resampling_at_once():
    samples = 0.2 * noise(6).T
    expected = soxr.resample(samples.T, 44_100, SAMPLE_RATE, quality="HQ").T
    np.testing.assert_allclose(to_training_audio(samples, 44_100), expected, atol=1e-6)


@pytest.mark.parametrize("rate", [44_100, SAMPLE_RATE])
def test_training_audio_is_clamped(rate):
    wave = to_training_audio(8 * noise(4, rate).T, rate)
    assert (wave.min(), wave.max()) == (-1, 1)


def test_training_audio_at_the_target_rate_is_untouched():
    samples = noise(3.5, SAMPLE_RATE).T
    np.testing.assert_array_equal(to_training_audio(samples, SAMPLE_RATE), samples.clip(-1, 1))


def test_mono_is_doubled_and_of_many_channels_the_first_two_are_taken():
    mono = to_training_audio(noise(4, SAMPLE_RATE, 1).T, SAMPLE_RATE)
    np.testing.assert_array_equal(mono[0], mono[1])
    many = noise(4, SAMPLE_RATE, 6).T
    np.testing.assert_array_equal(to_training_audio(many, SAMPLE_RATE), many[:2].clip(-1, 1))


def test_short_audio_is_padded_at_its_end_to_three_seconds():
    samples = noise(1, SAMPLE_RATE).T
    wave = to_training_audio(samples, SAMPLE_RATE)
    assert wave.shape == (2, 3 * SAMPLE_RATE)
    np.testing.assert_array_equal(wave[:, :SAMPLE_RATE], samples.clip(-1, 1))
    assert not wave[:, SAMPLE_RATE:].any()


def test_long_audio_is_cut_at_the_limit():
    assert to_training_audio(noise(6, 22_050).T, 22_050, max_seconds=4.5).shape == (2, 216_000)


@pytest.mark.parametrize("rate", [8_000, 8_011, 22_050, 44_099, 96_000, 192_000])
@pytest.mark.parametrize("samples", [0, 1, 2, 1001, 700_001])
def test_every_length_at_every_rate_is_its_duration(rate, samples):
    wave = to_training_audio(np.full((1, samples), 0.5, dtype=np.float32), rate)
    length = int(samples * SAMPLE_RATE / rate + 0.5)
    assert wave.shape[1] == max(3 * SAMPLE_RATE, length)
    assert not wave[:, length + 1 :].any()
    assert wave.flags.c_contiguous


def test_silence_is_where_every_channel_is_below_one_step():
    samples = np.zeros((2, 10), dtype=np.float32)
    samples[0, 0] = 2.0**-15
    samples[1, 1] = -0.5
    samples[:, 2] = 2.0**-16
    assert silent_fraction(samples) == 0.8


def test_silence_is_counted_over_the_whole_song():
    samples = noise(5).T
    samples[:, 70_000:150_000] = 0
    assert silent_fraction(samples) == pytest.approx(80_000 / samples.shape[1], rel=1e-3)
    assert silent_fraction(samples[:, :0]) == 1.0


def test_sha256_is_of_the_bytes(tmp_path):
    path = tmp_path / "song.wav"
    content = bytes(range(256)) * 10_000
    path.write_bytes(content)
    assert audio_sha256(path) == hashlib.sha256(content).hexdigest()
    with pytest.raises(AudioError) as caught:
        audio_sha256(tmp_path / "none.wav")
    assert caught.value.reason is RejectReason.MISSING
