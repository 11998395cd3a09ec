"""What people have under a song's name that is no audio: the reject says what it is, and what to do."""

from __future__ import annotations

import pytest

from acestep_ray.data.audio import AudioError, AudioFile
from acestep_ray.data.schema import RejectReason

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4839201\n"


@pytest.mark.parametrize("suffix", ["mp3", "wav", "flac", "m4a", "raw", "au"])
@pytest.mark.parametrize(
    ("content", "reason", "named"),
    [
        (LFS, RejectReason.UNSUPPORTED, "git lfs pull"),
        (
            b"/annex/objects/SHA256E-s4839201--" + b"0" * 64 + b".mp3\n",
            RejectReason.UNSUPPORTED,
            "git annex get",
        ),
        (b"../.git/annex/objects/Xk/2V/MD5E-s1--a.mp3", RejectReason.UNSUPPORTED, "git annex get"),
        (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", RejectReason.UNSUPPORTED, "web page"),
        (b"\xef\xbb\xbf  <html>" + b"x" * 200_000, RejectReason.UNSUPPORTED, "web page"),
        (
            b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
            RejectReason.UNSUPPORTED,
            "error page",
        ),
        (b'{"error": {"code": 403, "message": "quota"}}', RejectReason.UNSUPPORTED, "JSON"),
        (bytes(100_000), RejectReason.EMPTY, "100,000 zero bytes"),
        (b"", RejectReason.EMPTY, "0 bytes"),
    ],
)
def test_a_file_that_stands_in_for_a_song_is_named(tmp_path, suffix, content, reason, named):
    path = tmp_path / f"song.{suffix}"
    path.write_bytes(content)
    with pytest.raises(AudioError) as caught:
        AudioFile(path)
    assert caught.value.reason is reason
    assert named in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize("suffix", ["mp3.part", "wav.crdownload", "flac.partial", "mp3.download"])
def test_a_download_that_has_not_ended_is_named(tmp_path, suffix):
    path = tmp_path / f"song.{suffix}"
    path.write_bytes(b"something of a download" * 99)
    with pytest.raises(AudioError, match="not ended"):
        AudioFile(path)


def test_a_link_of_git_annex_without_its_content_is_named(tmp_path):
    path = tmp_path / "song.mp3"
    path.symlink_to(".git/annex/objects/Xk/2V/MD5E-s1--a.mp3/MD5E-s1--a.mp3")
    with pytest.raises(AudioError, match="git annex get") as caught:
        AudioFile(path)
    assert caught.value.reason is RejectReason.MISSING
    link = tmp_path / "other.mp3"
    link.symlink_to("nowhere.mp3")
    with pytest.raises(AudioError, match=r"link .*nowhere\.mp3") as caught:
        AudioFile(link)
    assert caught.value.reason is RejectReason.MISSING


def test_a_song_with_drm_is_named(tmp_path):
    sound = b"\0\0\0\x24stsd\0\0\0\0\0\0\0\x01\0\0\0\x14drms" + bytes(12)
    moov = (len(sound) + 8).to_bytes(4, "big") + b"moov" + sound
    path = tmp_path / "song.m4p"
    path.write_bytes(b"\0\0\0\x14ftypM4P \0\0\0\0M4A " + b"\0\0\0\x10mdatsong" + bytes(4) + moov)
    with pytest.raises(AudioError, match="protected by DRM") as caught:
        AudioFile(path)
    assert caught.value.reason is RejectReason.UNSUPPORTED
