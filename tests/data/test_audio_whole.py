"""The sound of a file is what its bytes decode to, whatever its header says of the length."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess

import numpy as np
import pytest
import soundfile

from acestep_ray.data.audio import AudioError, AudioFile, decode_window
from acestep_ray.data.schema import RejectReason

RATE = 44_100
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg program")


def song(seconds: float, rate: int = RATE, channels: int = 2, seed: int = 0) -> np.ndarray:
    """Loud and quiet by turns, so that the frames of a variable bit rate differ: (n, channels)."""
    rng = np.random.default_rng(seed)
    samples = 0.2 * rng.standard_normal((round(seconds * rate), channels))
    samples[: len(samples) // 2] *= 0.02
    return samples.astype(np.float32)


def encoded(samples: np.ndarray, rate: int = RATE, **options) -> bytes:
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", rate, samples.shape[1], **options) as file:
        for first in range(0, len(samples), rate):  # libvorbis has a stack for that much
            file.write(samples[first : first + rate])
    return content.getvalue()


def mp3(seconds=12.0, rate=RATE, channels=2, seed=0, mode="VARIABLE") -> bytes:
    options = {"bitrate_mode": mode, "compression_level": 0.5}
    return encoded(song(seconds, rate, channels, seed), rate, format="MP3", **options)


def plain(content: bytes) -> np.ndarray:
    """What libsndfile decodes, (channels, n)."""
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        return file.read(dtype="float32", always_2d=True).T


def read(path, content: bytes, **options) -> tuple[np.ndarray, list[str]]:
    """The samples of a whole file, and its warnings."""
    path.write_bytes(content)
    with AudioFile(path, **options) as file:
        samples = file.read(0, 240)
        assert file.duration_seconds == pytest.approx(samples.shape[1] / file.sample_rate)
        for start, seconds in [(1.5, 2.0), (0.3, 0.1), (5.0, 3.0)]:
            first = round(start * file.sample_rate)
            part = samples[:, first : first + round(seconds * file.sample_rate)]
            np.testing.assert_allclose(file.read(start, seconds), part, atol=2e-3)
        file.read(0, 240)
        return samples, file.warnings


def refusal(path, content: bytes, **options) -> AudioError:
    path.write_bytes(content)
    with pytest.raises(AudioError) as caught, AudioFile(path, **options) as file:
        file.read(0, 240)
    return caught.value


def first_frame(content: bytes) -> int:
    """Bytes of the first frame of an MP3 at 44.1 kHz."""
    kbits = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[content[2] >> 4]
    return 144 * kbits * 1000 // RATE + (content[2] >> 1 & 1)


def with_xing_frames(content: bytes, change) -> bytes:
    changed = bytearray(content)
    place = max(content.find(b"Xing", 0, 100), content.find(b"Info", 0, 100)) + 8
    count = struct.unpack(">I", content[place : place + 4])[0]
    changed[place : place + 4] = struct.pack(">I", change(count))
    return bytes(changed)


ID3V2 = b"ID3\x04\0\0" + bytes((0, 16, 0, 0)) + bytes(range(1, 256)) * 1028 + bytes(4)
ID3V1 = b"TAG" + b"x" * 125
APE = b"APETAGEX" + struct.pack("<IIII", 2000, 100, 1, 0xA0000000) + bytes(8) + b"a" * 100


# --- MP3 ---------------------------------------------------------------------------------------------------


def test_a_vbr_mp3_without_a_length_is_read_to_its_end(tmp_path):
    whole = mp3()
    bare = whole[first_frame(whole) :]
    samples, warnings = read(tmp_path / "song.mp3", bare)
    frames = struct.unpack(">I", whole[44:48])[0]
    assert samples.shape == (2, 1152 * frames)
    # The encoder's delay is in that frame; without it, 576 + 529 samples more are there.
    expected = plain(whole)
    np.testing.assert_array_equal(samples[:, 1105 : 1105 + expected.shape[1]], expected)
    assert "gives no length" in warnings[0]


@pytest.mark.parametrize("change", [lambda n: 0, lambda n: n // 3, lambda n: 3 * n, lambda n: 0xFFFFFFFF])
def test_an_mp3_whose_header_counts_wrongly_is_read_to_its_end(tmp_path, change):
    whole = mp3()
    samples, warnings = read(tmp_path / "song.mp3", with_xing_frames(whole, change))
    expected = plain(whole)
    np.testing.assert_array_equal(samples[:, : expected.shape[1]], expected)
    assert 0 <= samples.shape[1] - expected.shape[1] < 4096  # the encoder's padding
    assert len(warnings) == 1
    assert "12.0 s are there" in warnings[0]


@pytest.mark.parametrize("toc", [bytes(100), b"\xff" * 100])
def test_the_table_of_contents_of_an_mp3_moves_no_window(tmp_path, toc):
    whole = bytearray(mp3())
    place = whole.find(b"Xing") + 16
    whole[place : place + 100] = toc
    samples, warnings = read(tmp_path / "song.mp3", bytes(whole))
    np.testing.assert_array_equal(samples, plain(mp3()))
    assert warnings == []


@pytest.mark.parametrize("before", [b"", ID3V2])
@pytest.mark.parametrize(
    "after", [b"", ID3V1, APE, APE + ID3V1, b"LYRICSBEGIN" + b"la" * 99 + b"LYRICS200" + ID3V1]
)
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_tags_of_an_mp3_are_no_sound(tmp_path, before, after, mode):
    whole = mp3(mode=mode)
    samples, warnings = read(tmp_path / "song.mp3", before + whole + after)
    np.testing.assert_array_equal(samples, plain(whole))
    bare = whole[first_frame(whole) :]
    samples, _ = read(tmp_path / "song.mp3", before + bare + after)
    np.testing.assert_array_equal(samples[:, 1105 : 1105 + plain(whole).shape[1]], plain(whole))
    assert warnings == []


def test_a_tag_in_the_middle_of_an_mp3_is_left_out(tmp_path):
    whole = mp3(mode="CONSTANT")
    middle = 0
    for _ in range(200):
        middle += first_frame(whole[middle:])
    samples, _ = read(tmp_path / "song.mp3", whole[:middle] + ID3V2 + whole[middle:])
    np.testing.assert_array_equal(samples, plain(whole))


@pytest.mark.parametrize("between", [b"", ID3V1 + ID3V2, b"\0" * 5000, b"\xffnoise\xfb\x90" * 700])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_mp3s_one_behind_another_are_all_read(tmp_path, between, mode):
    one, two = mp3(6, mode=mode), mp3(9, seed=1, mode=mode)
    samples, warnings = read(tmp_path / "song.mp3", one + between + two)
    np.testing.assert_array_equal(samples, np.concatenate([plain(one), plain(two)], axis=1))
    assert warnings == ["it is 2 MP3 files one behind another, 15.0 s together"]


def test_an_mp3_without_a_length_behind_another_is_read(tmp_path):
    one, two = mp3(6), mp3(9, seed=1)
    samples, _ = read(tmp_path / "song.mp3", one + two[first_frame(two) :])
    assert samples.shape[1] == pytest.approx(15 * RATE, abs=4000)
    np.testing.assert_array_equal(samples[:, : 5 * RATE], plain(one)[:, : 5 * RATE])
    samples, _ = read(tmp_path / "song.mp3", one[first_frame(one) :] + two)
    assert samples.shape[1] == pytest.approx(15 * RATE, abs=4000)


@pytest.mark.parametrize(("rate", "channels"), [(RATE, 1), (48_000, 2), (22_050, 2), (48_000, 1)])
@pytest.mark.parametrize("bare", [False, True])
def test_mp3s_of_other_rates_and_channels_follow_one_another(tmp_path, rate, channels, bare):
    one, two = mp3(6), mp3(9, rate, channels, seed=1)
    if bare:
        one = one[first_frame(one) :]
    samples, _ = read(tmp_path / "song.mp3", one + two)
    assert samples.shape[0] == 2
    assert samples.shape[1] == pytest.approx(15 * RATE, abs=2500)
    tail = samples[:, -4 * RATE : -RATE]
    assert np.std(tail) == pytest.approx(np.std(plain(two)[:, -4 * rate : -rate]), rel=0.1)


def test_damage_in_the_middle_of_an_mp3_is_silence_of_its_length(tmp_path):
    whole = mp3(40)
    damaged = bytearray(whole)
    at = len(whole) // 2
    damaged[at : at + 8000] = bytes(8000)
    expected = plain(whole)
    samples, warnings = read(tmp_path / "song.mp3", bytes(damaged))
    assert samples.shape[1] == pytest.approx(expected.shape[1], abs=4096)
    np.testing.assert_array_equal(samples[:, : 8 * RATE], expected[:, : 8 * RATE])
    np.testing.assert_array_equal(samples[:, 35 * RATE : 39 * RATE], expected[:, 35 * RATE : 39 * RATE])
    assert "of it decodes" in warnings[-1]
    assert "--min_decoded is 0.999" in str(refusal(tmp_path / "song.mp3", bytes(damaged), min_decoded=0.999))
    bare = bytes(damaged[first_frame(whole) :])
    samples, _ = read(tmp_path / "song.mp3", bare)
    assert samples.shape[1] == pytest.approx(expected.shape[1], abs=0.15 * RATE)


def test_the_share_that_must_decode_is_chosen(tmp_path):
    whole = mp3(20)
    cut = whole[: int(0.8 * len(whole))]
    assert "95% must" in str(refusal(tmp_path / "song.mp3", cut))
    error = refusal(tmp_path / "song.mp3", cut, min_decoded=0.95)
    assert error.reason is RejectReason.CORRUPT
    assert "of the 20.0 s" in str(error)
    assert "--min_decoded is 0.95" in str(error)
    samples, warnings = read(tmp_path / "song.mp3", cut, min_decoded=0.5)
    np.testing.assert_array_equal(samples[:, : 15 * RATE], plain(whole)[:, : 15 * RATE])
    assert "promises 20.0 s" in warnings[0]
    nearly = whole[: int(0.985 * len(whole))]
    samples, warnings = read(tmp_path / "song.mp3", nearly)
    assert 0.95 * 20 < samples.shape[1] / RATE < 20
    assert warnings


def test_mp3_within_riff_is_read(tmp_path):
    whole = mp3()
    layout = struct.pack("<HHIIHHHHIHHH", 0x55, 2, RATE, 16_000, 1, 0, 12, 1, 2, 417, 1, 1393)
    fmt = b"fmt " + struct.pack("<I", len(layout)) + layout
    data = b"data" + struct.pack("<I", len(whole)) + whole
    content = b"RIFF" + struct.pack("<I", 4 + len(fmt) + len(data)) + b"WAVE" + fmt + data
    samples, _ = read(tmp_path / "song.wav", content)
    np.testing.assert_array_equal(samples[:, : plain(whole).shape[1]], plain(whole))


# --- Ogg ---------------------------------------------------------------------------------------------------


def ogg(seconds=6.0, rate=48_000, channels=2, seed=0, subtype="VORBIS") -> bytes:
    return encoded(song(seconds, rate, channels, seed), rate, format="OGG", subtype=subtype)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_every_link_of_a_chain_is_read(tmp_path, subtype):
    one, two, three = (ogg(seconds, seed=seconds, subtype=subtype) for seconds in (3, 5, 4))
    samples, warnings = read(tmp_path / "song.ogg", one + two + three)
    np.testing.assert_array_equal(samples, np.concatenate([plain(one), plain(two), plain(three)], axis=1))
    assert warnings == ["it is 3 Ogg streams one behind another, 12.0 s together"]
    same, _ = read(tmp_path / "song.ogg", one + one + one)
    np.testing.assert_array_equal(same, np.tile(plain(one), 3))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize(("rate", "channels"), [(24_000, 2), (48_000, 1), (16_000, 1)])
def test_links_of_other_rates_and_channels_are_read(tmp_path, subtype, rate, channels):
    samples, _ = read(
        tmp_path / "song.ogg", ogg(4, subtype=subtype) + ogg(5, rate, channels, subtype=subtype)
    )
    assert samples.shape == (2, 9 * 48_000)
    assert np.std(samples[:, -48_000:]) > 0.05


def test_vorbis_and_opus_in_one_chain_are_read(tmp_path):
    samples, _ = read(tmp_path / "song.ogg", ogg(4) + ogg(5, subtype="OPUS"))
    assert samples.shape == (2, 9 * 48_000)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_without_its_last_pages_is_read_to_its_end(tmp_path, subtype):
    whole = ogg(12, subtype=subtype)
    samples, warnings = read(tmp_path / "song.ogg", whole[: int(0.7 * len(whole))])
    assert 5 < samples.shape[1] / 48_000 < 11.9
    np.testing.assert_array_equal(samples[:, :192_000], plain(whole)[:, :192_000])
    assert warnings == ["its last pages are missing"]


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_a_damaged_page_is_silence_of_its_length(tmp_path, subtype):
    whole = ogg(24, subtype=subtype)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    samples, warnings = read(tmp_path / "song.ogg", bytes(damaged), min_decoded=0.6)
    expected = plain(whole)
    assert samples.shape == expected.shape
    np.testing.assert_array_equal(samples[:, : 3 * 48_000], expected[:, : 3 * 48_000])
    np.testing.assert_allclose(samples[:, -48_000:], expected[:, -48_000:], atol=1e-3)
    assert "of it decodes" in warnings[0]


@needs_ffmpeg
@pytest.mark.parametrize("links", [1, 2])
def test_flac_in_ogg_is_read(tmp_path, links):
    whole = encoded(song(6), format="WAV")
    (tmp_path / "song.wav").write_bytes(whole)
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-i",
        str(tmp_path / "song.wav"),
        "-c:a",
        "flac",
        str(tmp_path / "song.ogg"),
    ]
    subprocess.run(command, check=True)
    samples, _ = read(tmp_path / "song.ogg", links * (tmp_path / "song.ogg").read_bytes())
    np.testing.assert_array_equal(samples, np.tile(plain(whole), links))


# --- FLAC --------------------------------------------------------------------------------------------------


def flac(seconds=8.0, rate=RATE, channels=2, seed=0) -> bytes:
    return encoded(song(seconds, rate, channels, seed), rate, format="FLAC")


def with_flac_total(content: bytes, total: int) -> bytes:
    changed = bytearray(content)
    changed[21] = changed[21] & 0xF0 | total >> 32
    changed[22:26] = struct.pack(">I", total & 0xFFFFFFFF)
    return bytes(changed)


@pytest.mark.parametrize("total", [0, 1, 1000, 8 * RATE - 1, 8 * RATE + 1, 80 * RATE, (1 << 36) - 1])
def test_a_flac_whose_header_counts_wrongly_is_read_to_its_end(tmp_path, total):
    whole = flac()
    samples, warnings = read(tmp_path / "song.flac", with_flac_total(whole, total))
    np.testing.assert_array_equal(samples, plain(whole))
    assert len(warnings) == (1 if total else 0)


@pytest.mark.parametrize("before", [b"", ID3V2])
@pytest.mark.parametrize("after", [b"", ID3V1, b"\0" * 100])
def test_tags_around_a_flac_are_no_sound(tmp_path, before, after):
    whole = flac()
    samples, warnings = read(tmp_path / "song.flac", before + whole + after)
    np.testing.assert_array_equal(samples, plain(whole))
    assert warnings == []


@pytest.mark.parametrize(("rate", "channels"), [(RATE, 2), (48_000, 1)])
def test_flacs_one_behind_another_are_all_read(tmp_path, rate, channels):
    one, two = flac(4), flac(5, rate, channels, seed=1)
    samples, warnings = read(tmp_path / "song.flac", one + two)
    assert samples.shape == (2, 9 * RATE)
    np.testing.assert_array_equal(samples[:, : 4 * RATE], plain(one))
    assert warnings == ["it is 2 FLAC files one behind another, 9.0 s together"]
    samples, _ = read(tmp_path / "song.flac", one + one)
    np.testing.assert_array_equal(samples, np.tile(plain(one), 2))


def test_damaged_frames_of_a_flac_are_silence_of_their_length(tmp_path):
    whole = flac(30)
    damaged = bytearray(whole)
    for place in (0.4, 0.6):
        damaged[int(place * len(whole))] ^= 0xFF
    damaged[int(0.8 * len(whole)) : int(0.8 * len(whole)) + 20_000] = bytes(20_000)
    expected = plain(whole)
    samples, warnings = read(tmp_path / "song.flac", bytes(damaged))
    assert samples.shape == expected.shape
    differs = (samples != expected).any(axis=0)
    assert 0.001 < differs.mean() < 0.03
    assert not samples[:, differs].any()
    assert "of it decodes" in warnings[0]


def test_a_flac_that_is_damaged_and_counts_wrongly_is_mended_too(tmp_path):
    whole = flac(12)
    damaged = bytearray(with_flac_total(whole, 5 * RATE))
    damaged[len(whole) // 2] ^= 0xFF
    samples, warnings = read(tmp_path / "song.flac", bytes(damaged))
    differs = (samples != plain(whole)).any(axis=0)
    assert 0 < differs.mean() < 0.02
    np.testing.assert_array_equal(samples[:, -2 * RATE :], plain(whole)[:, -2 * RATE :])
    assert len(warnings) == 2


def test_a_flac_that_was_cut_off_is_refused_or_used_as_far_as_it_goes(tmp_path):
    whole = flac(30)
    error = refusal(tmp_path / "song.flac", whole[: int(0.6 * len(whole))])
    assert error.reason is RejectReason.CORRUPT
    samples, warnings = read(tmp_path / "song.flac", whole[: int(0.6 * len(whole))], min_decoded=0.3)
    assert 0.3 * 30 < samples.shape[1] / RATE < 30
    np.testing.assert_array_equal(samples, plain(whole)[:, : samples.shape[1]])
    assert any("promises 30.0 s" in warning for warning in warnings)


# --- samples in chunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 1000, 1001, 0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFFFF0])
@pytest.mark.parametrize("riff", [None, 0, 36, 0xFFFFFFFF])
def test_a_wav_with_another_length_is_read_to_its_end(tmp_path, length, riff):
    whole = encoded(song(8), format="WAV")
    changed = bytearray(whole)
    place = whole.index(b"data") + 4
    changed[place : place + 4] = struct.pack("<I", length)
    if riff is not None:
        changed[4:8] = struct.pack("<I", riff)
    samples, warnings = read(tmp_path / "song.wav", bytes(changed))
    np.testing.assert_array_equal(samples, plain(whole))
    assert len(warnings) == (length < 2000)


def test_chunks_behind_the_samples_of_a_wav_are_no_sound(tmp_path):
    whole = encoded(song(8)[:-1, :1], format="WAV", subtype="PCM_24")
    expected = plain(whole)
    notes = b"LIST" + struct.pack("<I", 26) + b"INFOINAM" + struct.pack("<I", 14) + b"My recording\0\0"
    assert whole[-1:] == b"\0"  # odd bytes of samples, one to fill up
    samples, warnings = read(tmp_path / "song.wav", whole[:-1] + notes)
    np.testing.assert_array_equal(samples, expected)
    for rest in (notes, b"id3 " + struct.pack("<I", 4000) + ID3V2[:4000], ID3V1, bytes(5000)):
        samples, warnings = read(tmp_path / "song.wav", whole + rest)
        np.testing.assert_array_equal(samples, expected)
        assert warnings == []


def test_a_wav_that_was_cut_off_is_refused_or_used_as_far_as_it_goes(tmp_path):
    whole = encoded(song(10), format="WAV")
    assert "of the 10.0 s" in str(refusal(tmp_path / "song.wav", whole[: len(whole) // 2]))
    samples, warnings = read(tmp_path / "song.wav", whole[: int(0.97 * len(whole))])
    assert samples.shape[1] == pytest.approx(9.7 * RATE, abs=20)
    assert warnings[0] == "its header promises 10.0 s, 9.7 s are there"


@pytest.mark.parametrize("magic", [b"RF64", b"BW64"])
@pytest.mark.parametrize("sizes", [None, 0, 1000])
def test_rf64_and_bw64_are_read_to_their_end(tmp_path, magic, sizes):
    whole = encoded(song(8), format="RF64")
    changed = bytearray(whole)
    changed[:4] = magic
    if sizes is not None:
        changed[20:44] = struct.pack("<QQQ", sizes, sizes, sizes)
    samples, _ = read(tmp_path / "song.wav", bytes(changed))
    np.testing.assert_array_equal(samples, plain(whole))


@pytest.mark.parametrize("lengths", [(0,), (8,), (1000,), (0xFFFFFFFF,)])
@pytest.mark.parametrize("count", [None, 0, 1000, 10**9])
def test_an_aiff_with_other_lengths_is_read_to_its_end(tmp_path, lengths, count):
    whole = encoded(song(8), format="AIFF")
    changed = bytearray(whole)
    place = whole.index(b"SSND") + 4
    changed[place : place + 4] = struct.pack(">I", lengths[0])
    if count is not None:
        place = whole.index(b"COMM") + 10
        changed[place : place + 4] = struct.pack(">I", count)
    samples, _ = read(tmp_path / "song.aiff", bytes(changed))
    np.testing.assert_array_equal(samples, plain(whole))


def test_an_aiff_whose_count_alone_is_wrong_is_read_with_a_warning(tmp_path):
    whole = encoded(song(8), format="AIFF")
    changed = bytearray(whole)
    place = whole.index(b"COMM") + 10
    changed[place : place + 4] = struct.pack(">I", 1000)
    samples, warnings = read(tmp_path / "song.aiff", bytes(changed))
    np.testing.assert_array_equal(samples, plain(whole))
    assert warnings == ["its header counts 1,000 samples, 352,800 are there"]


@pytest.mark.parametrize("length", [0, 1000, 0xFFFFFFFF])
def test_an_au_with_another_length_is_read_to_its_end(tmp_path, length):
    whole = encoded(song(8), format="AU", endian="BIG")
    changed = bytearray(whole)
    changed[8:12] = struct.pack(">I", length)
    samples, _ = read(tmp_path / "song.au", bytes(changed))
    np.testing.assert_array_equal(samples, plain(whole))


@pytest.mark.parametrize("length", [-1, 0, 4, 1000])
def test_a_caf_with_another_length_is_read_to_its_end(tmp_path, length):
    whole = encoded(song(8), format="CAF")
    changed = bytearray(whole)
    place = whole.index(b"data") + 4
    changed[place : place + 8] = struct.pack(">q", length)
    samples, _ = read(tmp_path / "song.caf", bytes(changed))
    np.testing.assert_array_equal(samples, plain(whole))


@pytest.mark.parametrize("length", [0, 24, 1000, 1 << 62])
def test_a_w64_with_another_length_is_read_to_its_end(tmp_path, length):
    whole = encoded(song(8), format="W64")
    changed = bytearray(whole)
    place = whole.index(b"data\xf3\xac") + 16
    changed[place : place + 8] = struct.pack("<Q", length)
    samples, _ = read(tmp_path / "song.w64", bytes(changed))
    np.testing.assert_array_equal(samples, plain(whole))


def test_a_wav_beyond_4_gb_whose_length_has_wrapped_is_read_to_its_end(tmp_path):
    path = tmp_path / "long.wav"
    head = encoded(np.zeros((10, 2), np.float32), format="WAV")
    start = head.index(b"data") + 8
    size = (1 << 32) + 40 * RATE
    tail = (song(2) * 32767).astype("<i2").tobytes()
    with path.open("wb") as file:  # a hole in the file takes no space
        file.write(head[: start - 4] + struct.pack("<I", size & 0xFFFFFFFF))
        file.seek(start + (size & 0xFFFFFFFF))
        file.write(tail)
        file.seek(start + size - len(tail))
        file.write(tail)
    with AudioFile(path) as file:
        seconds = size / 4 / RATE
        assert file.duration_seconds == pytest.approx(seconds, abs=0.001)
        window = file.read(seconds - 2, 2)
    np.testing.assert_allclose(window.T, song(2), atol=1e-4)


# --- ordinary files ----------------------------------------------------------------------------------------

ORDINARY = [
    *((kind, {"subtype": subtype}) for kind in ("WAV", "AIFF") for subtype in ("PCM_16", "PCM_24", "FLOAT")),
    ("WAV", {"subtype": "ULAW"}),
    ("WAV", {"subtype": "IMA_ADPCM"}),
    *((kind, {}) for kind in ("FLAC", "RF64", "W64", "AU", "CAF", "OGG")),
    ("OGG", {"subtype": "OPUS"}),
    ("MP3", {}),
    ("MP3", {"bitrate_mode": "VARIABLE"}),
]


@pytest.mark.parametrize(("kind", "options"), ORDINARY)
@pytest.mark.parametrize(("rate", "channels"), [(48_000, 2), (24_000, 1)])
def test_the_samples_of_ordinary_files_are_those_of_libsndfile(tmp_path, kind, options, rate, channels):
    content = encoded(song(8, rate, channels), rate, format=kind, **options)
    samples, warnings = read(tmp_path / "song", content)
    np.testing.assert_array_equal(samples, plain(content))
    assert warnings == []


def test_damage_in_one_window_is_not_told_of_another(tmp_path):
    whole = flac(30)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    path = tmp_path / "song.flac"
    path.write_bytes(damaged)
    with AudioFile(path) as file:
        file.read(0, 240)
        assert file.decoded_share is not None
        assert file.decoded_share > 0.98
        file.read(0, 5)
        assert file.decoded_share is None
        assert file.warnings == []


def test_a_wrong_header_is_believed_where_only_it_is_looked_at(tmp_path):
    path = tmp_path / "song.mp3"
    path.write_bytes(with_xing_frames(mp3(), lambda n: n // 2))
    with AudioFile(path, fetch_whole=False) as file:
        assert file.duration_seconds < 7
    assert decode_window(path, 240)[0].shape[1] > 11 * RATE
