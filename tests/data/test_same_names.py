from __future__ import annotations

import unicodedata

from acestep_ray.data.file_names import file_at, locate_file
from acestep_ray.data.same_names import Names, told_apart
from acestep_ray.storage import Store

NFC, NFD = (unicodedata.normalize(form, "Süßes Café") for form in ("NFC", "NFD"))


def test_a_name_in_another_normal_form_is_found():
    assert Names([NFD]).find(NFC) == NFD
    assert Names([NFD, NFC]).find(NFC) == NFC
    assert Names([NFD, NFC.upper()]).find(NFC) == NFD


def test_a_name_in_other_letters_is_found_if_it_is_the_only_one():
    assert Names(["Song.WAV"]).find("song.wav") == "Song.WAV"
    assert Names(["Song.WAV", "SONG.wav"]).find("song.wav") is None
    assert Names(["Song.WAV", "song.wav"]).find("song.wav") == "song.wav"
    assert Names(["another"]).find("song.wav") is None


def test_files_are_found_by_the_name_that_a_person_reads(tmp_path):
    (tmp_path / NFD).mkdir()
    (tmp_path / NFD / "Song.wav").write_bytes(b"x")
    root = Store.at(tmp_path)
    for found in (locate_file(root, f"{NFC}/song.WAV"), file_at(f"{NFC}/song.WAV", root)):
        assert found.read_bytes() == b"x"
    assert locate_file(root, "none.wav").status() is None


def test_an_object_is_found_in_its_other_normal_form(tmp_path):
    root = Store.at(f"memory://{tmp_path.name}")
    root.write_bytes(f"{NFD}.wav", b"x")
    assert locate_file(root, f"{NFC}.wav").read_bytes() == b"x"


def test_names_that_look_alike_are_shown_by_their_characters():
    assert told_apart(["Café", "Cafe\u0301", "b"]) == [r"Caf\xe9", r"Cafe\u0301", "b"]
    assert told_apart(["song\u00a0b", "song b"]) == [r"song\xa0b", "song b"]
    assert told_apart(["Café", "b"]) == ["Café", "b"]
