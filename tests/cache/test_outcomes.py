from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pytest

from acestep_ray.cache.decoding import file_versions
from acestep_ray.cache.outcomes import Outcomes, check_complete, first_of_each, rejects_of, unchanged_songs
from acestep_ray.cache.schema import LEDGER_SCHEMA, REJECT_SCHEMA
from acestep_ray.cache.songs import Reject, Song
from acestep_ray.data.audio import audio_sha256
from acestep_ray.errors import AceStepError
from acestep_ray.storage import Store
from tests.cache.conftest import RECIPE, SongFolder, noise, song


def ledger(*rows: dict) -> pa.Table:
    defaults = {
        "window": 0,
        "is_last_window": True,
        "file": "x",
        "offset": 0,
        "length": 1,
        "latent_frames": 30,
    }
    return pa.Table.from_pylist(
        [{**defaults, "song_key": row["key"].partition("#")[0], **row} for row in rows], schema=LEDGER_SCHEMA
    )


def rejected(one: Song, root: Store, **changes) -> Reject:
    fingerprint = RECIPE.reject_fingerprint(one, file_versions(root, one))
    reject = Reject(one.key, one.filename, "decode", "corrupt", "damaged", one.key, fingerprint=fingerprint)
    return replace(reject, **changes)


def stored(one: Song, root: Store, **changes) -> dict:
    """The ledger's entry of a song that was computed from its files as they are."""
    sha256 = audio_sha256(root.path / one.filename)
    return {
        "key": one.key,
        "fingerprint": RECIPE.row_fingerprint(one, sha256, None),
        "audio_sha256": sha256,
        "audio_version": file_versions(root, one).audio,
        **changes,
    }


@pytest.fixture
def root(song_folder: SongFolder) -> Store:
    for key in ("a", "b"):
        song_folder.add(key, noise(3.0, seed=ord(key)))
    return Store.at(song_folder.path)


def unchanged(
    rows: pa.Table, rejects: list[Reject], root: Store, *songs: Song
) -> tuple[list[str], list[str]]:
    """Keys of the rows and of the rejects that stay."""
    outcomes = Outcomes(rows, rejects)
    candidates = [candidate for one in songs for candidate in outcomes.candidates(one, RECIPE)]
    kept, kept_rejects = outcomes.of(unchanged_songs(root, RECIPE, candidates))
    return kept["key"].to_pylist(), [reject.key for reject in kept_rejects]


def test_a_row_of_the_same_song_and_file_stays(root):
    rows = ledger(stored(song("a"), root), stored(song("b"), root))
    assert unchanged(rows, [], root, song("a"), song("b", lyrics="other")) == (["a"], [])


def test_a_row_whose_file_was_touched_stays_and_one_whose_bytes_changed_does_not(root):
    rows = ledger(stored(song("a"), root), stored(song("b"), root))
    (root.path / "audio/a.wav").write_bytes((root.path / "audio/a.wav").read_bytes())
    (root.path / "audio/b.wav").write_bytes((root.path / "audio/a.wav").read_bytes())
    assert unchanged(rows, [], root, song("a"), song("b")) == (["a"], [])


def test_of_several_rows_of_a_song_the_current_one_stays_once(root):
    current = stored(song("a"), root)
    rows = ledger({**current, "fingerprint": "old"}, current, {**current, "file": "twice"})
    assert unchanged(rows, [], root, song("a")) == (["a"], [])


@pytest.mark.parametrize("order", [1, -1])
def test_of_rows_of_several_versions_of_a_file_that_of_the_present_one_stays(root, order):
    before = stored(song("a"), root, file="before")
    (root.path / "audio/a.wav").write_bytes((root.path / "audio/b.wav").read_bytes())
    now = stored(song("a"), root, file="now")
    rows = ledger(*[before, now][::order])
    outcomes = Outcomes(rows, [])
    kept, _ = outcomes.of(unchanged_songs(root, RECIPE, outcomes.candidates(song("a"), RECIPE)))
    assert kept["file"].to_pylist() == ["now"]


@pytest.mark.parametrize(
    ("present", "stays"),
    [((0, 1, 2), True), ((0, 1), False), ((1, 2), False), ((0, 2), False), ((2,), False)],
)
def test_a_song_stays_only_with_all_its_windows(root, present, stays):
    rows = ledger(
        *(
            stored(song("a"), root, key=f"a#{window}", window=window, is_last_window=window == 2)
            for window in present
        )
    )
    kept, _ = unchanged(rows, [], root, song("a"))
    assert kept == ([f"a#{window}" for window in present] if stays else [])


def test_a_window_that_was_rejected_counts_as_one_that_is_there(root):
    first = stored(song("a"), root, key="a#0", is_last_window=False)
    second = rejected(song("a"), root, key="a#1", window=1, reason="silent")
    assert unchanged(ledger(first), [second], root, song("a")) == (["a#0"], ["a#1"])
    assert unchanged(ledger(first), [], root, song("a")) == ([], [])


def test_a_reject_stays_until_its_file_or_text_changes(root):
    rejects = [rejected(song("a"), root), rejected(song("b"), root)]
    assert unchanged(ledger(), rejects, root, song("a"), song("b")) == ([], ["a", "b"])
    assert unchanged(ledger(), rejects, root, song("a", tags=[]), song("b")) == ([], ["b"])
    (root.path / "audio/b.wav").write_bytes(b"other")
    assert unchanged(ledger(), rejects, root, song("a"), song("b")) == ([], ["a"])


def test_a_reject_for_a_fault_of_the_storage_is_tried_again(root):
    assert unchanged(ledger(), [rejected(song("a"), root, reason="unreadable")], root, song("a")) == ([], [])


def test_rejects_come_back_from_their_table(root):
    rejects = [rejected(song("a"), root), rejected(song("b"), root, window=3, is_last_window=False)]
    table = pa.Table.from_pylist([asdict(reject) for reject in rejects], schema=REJECT_SCHEMA)
    assert rejects_of(table) == rejects


def test_a_song_that_was_stored_twice_counts_once():
    rows = ledger({"key": "b", "file": "1"}, {"key": "a", "file": "2"}, {"key": "b", "file": "3"})
    once = first_of_each(rows)
    assert list(zip(once["key"].to_pylist(), once["file"].to_pylist(), strict=True)) == [
        ("b", "1"),
        ("a", "2"),
    ]


def test_lost_and_doubled_songs_do_not_pass():
    reject = Reject("b", "b.wav", "decode", "empty", "", song_key="b")
    a, b = {"key": "a"}, {"key": "b"}
    check_complete(["a", "b"], ledger(a), [reject])
    for keys, rows, rejects in (
        (["a", "b"], [a], []),
        (["a", "b"], [a, b], [reject]),
        (["a"], [a], [reject]),
        (["a", "b"], [a, b, b], []),
        (["a", "b"], [a, {**b, "is_last_window": False}], []),
        (["a", "b"], [a, {**b, "window": 1}], []),
        (["a", "b"], [a, b, {**b, "key": "b#2", "window": 2}], []),
    ):
        with pytest.raises(AceStepError, match=r"1 songs were lost or doubled.*'b'"):
            check_complete(keys, ledger(*rows), rejects)


def test_windows_are_counted_by_song():
    rows = ledger(
        *({"key": f"a#{i}", "window": i, "is_last_window": i == 2} for i in np.random.permutation(3))
    )
    check_complete(["a"], rows, [])
