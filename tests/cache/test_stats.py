from __future__ import annotations

import pytest

from acestep_ray.cache.stats import cache_stats
from acestep_ray.errors import InputError
from acestep_ray.storage import Store
from tests.cache.changes import file_of
from tests.cache.rows import SSL_DIMS, reject, song_row, write_rows


def test_stats_come_from_the_ledger_alone(tmp_path, monkeypatch):
    rows = [
        song_row("a", frames=100, duration_seconds=10.0, lyric_languages=["en", "en", "de"]),
        song_row("b", frames=300, duration_seconds=30.0, lyric_ids=[], ssl=None),
        song_row("c", frames=2584, duration_seconds=240.0, prompts=["x"], lyric_languages=["en"]),
    ]
    cache = write_rows(Store.at(tmp_path / "cache"), rows, [reject("x"), reject("y"), reject("z", "silent")])
    (part,) = cache.names("samples")
    cache.write_bytes(part, b"")
    stats = cache_stats(cache.url)
    assert (stats.songs, stats.parts, stats.seconds) == (3, 1, 280.0)
    assert stats.lengths == [1, 1, 0, 0, 0, 0, 0, 1]
    assert stats.languages == {"en": 2, "de": 1, "": 1}
    assert stats.prompts == (1, pytest.approx(7 / 3), 3)
    assert stats.rejects == {"missing": 2, "silent": 1}
    assert sum(stats.group_bytes.values()) == stats.num_bytes
    latents = sum(len(row["latents"][0].as_py()) for row in rows)
    assert latents < stats.group_bytes["latents"] < latents + 500
    ssl = sum(7 * frames * sum(SSL_DIMS.values()) for frames in (100, 2584))
    assert ssl < stats.group_bytes["ssl"] < ssl + 1500
    text = stats.render()
    for line in (
        "songs    3 in 1 parts, 0.1 h of audio",
        f"latents    764 kB, {764e3 * 240 / 280 / 1000:.0f} kB for 240 s",
        "210–240 s         1 ██",
        "en                2",
        "none              1",
        "rejects  3",
        "missing           2",
    ):
        assert line in text


def test_stats_of_a_cache_without_songs(tmp_path):
    cache = write_rows(Store.at(tmp_path / "cache"), [], [reject("x")])
    assert "songs    0" in cache_stats(cache.url).render()


def test_stats_need_a_whole_ledger(cache):
    cache.write_bytes(file_of(cache, "ledger-"), b"")
    with pytest.raises(InputError, match=r"ledger-.*cannot be read(?s:.*)cache verify"):
        cache_stats(cache.url)


def test_stats_of_a_cache_in_object_storage(s3):
    cache = write_rows(Store.at(s3.fresh()), [song_row(key) for key in "abc"])
    assert cache_stats(cache.url).songs == 3
