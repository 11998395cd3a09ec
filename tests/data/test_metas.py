from __future__ import annotations

import pytest

from acestep_ray.data.metas import read_bpm, read_instrumental, read_keyscale, read_timesignature


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("A minor", "A minor"),
        ("a MINOR", "A minor"),
        ("Am", "A minor"),
        ("AM", "A major"),
        ("C", "C major"),
        ("F♯", "F# major"),
        ("C#m", "C# minor"),
        ("Bb", "Bb major"),
        ("B♭ min", "Bb minor"),
        ("E flat major", "Eb major"),
        ("D-sharp minor", "D# minor"),
        ("E:min", "E minor"),
        ("Gmaj", "G major"),
        ("8A", "A minor"),
        ("8B", "C major"),
        ("12a", "Db minor"),
        ("A-Moll", "A minor"),
        ("Fis-Dur", "F# major"),
        ("es-moll", "Eb minor"),
        ("B-Dur", "Bb major"),
        ("h-moll", "B minor"),
        ("", ""),
        ("N/A", ""),
        (None, ""),
        (float("nan"), ""),
    ],
)
def test_keys_are_read_as_people_write_them(written, key):
    assert read_keyscale(written) == key


@pytest.mark.parametrize("written", ["hello", "song", "deep", "A blues", "13A", "first.wav", "1"])
def test_what_is_no_key_is_refused(written):
    with pytest.raises(ValueError, match="key"):
        read_keyscale(written)


@pytest.mark.parametrize(
    ("written", "bpm"),
    [
        (96, 96),
        (96.4, 96),
        ("96", 96),
        ("96.6 bpm", 97),
        ("~96", 96),
        ("96,4", 96),
        ("N/A", None),
        ("", None),
    ],
)
def test_tempos_are_read_as_people_write_them(written, bpm):
    assert read_bpm(written) == bpm


@pytest.mark.parametrize("written", ["fast", "120-124", 5, 999, True])
def test_what_is_no_tempo_is_refused(written):
    with pytest.raises(ValueError, match="bpm"):
        read_bpm(written)


@pytest.mark.parametrize(
    ("written", "beats"),
    [(4, "4"), ("4/4", "4"), ("3/4", "3"), ("6/8", "6"), (3.0, "3"), ("", ""), (None, "")],
)
def test_time_signatures_are_read_as_people_write_them(written, beats):
    assert read_timesignature(written) == beats


@pytest.mark.parametrize("written", ["5/4", "waltz", 7])
def test_what_the_models_know_no_metre_for_is_refused(written):
    with pytest.raises(ValueError, match="time signature"):
        read_timesignature(written)


@pytest.mark.parametrize(
    ("written", "instrumental"),
    [
        (True, True),
        ("true", True),
        ("Yes", True),
        (1, True),
        ("0", False),
        ("false", False),
        ("", None),
        (None, None),
    ],
)
def test_instrumental_is_read_as_people_write_it(written, instrumental):
    assert read_instrumental(written) is instrumental
