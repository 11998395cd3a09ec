"""`acestep-ray cache` as a user types it."""

from __future__ import annotations

from acestep_ray import cli
from acestep_ray.cache.parts import store_rows
from tests.cache.rows import song_row


def test_the_command_prints_summaries_and_exits_as_it_should(cache, capsys):
    assert cli.main(["cache", "verify", cache.url]) == 0
    assert "4 in 2 parts" in capsys.readouterr().out
    assert cli.main(["cache", "stats", cache.url]) == 0
    assert "210" not in capsys.readouterr().out
    store_rows(cache, [song_row("e")])
    assert cli.main(["cache", "prune", cache.url, "--dry-run"]) == 0
    assert "would delete 2 files" in capsys.readouterr().out
    assert len(cache.names(".incoming")) == 2
    assert cli.main(["cache", "prune", cache.url]) == 0
    assert "deleted 2 files" in capsys.readouterr().out
    cache.delete([next(iter(cache.names("samples")))])
    assert cli.main(["cache", "verify", cache.url]) == 1
    assert "1 things are wrong" in capsys.readouterr().err
    assert cli.main(["cache", "stats", f"{cache.url}/nowhere"]) == 2
    assert "not a feature cache" in capsys.readouterr().err
