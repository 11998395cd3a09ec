from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import ray

from acestep_ray.errors import InputError
from acestep_ray.generation import graph
from acestep_ray.generation.audio import Sound
from acestep_ray.generation.graph import choose_pool, make_each, make_unless_fatal
from tests.generation.conftest import song

SOUND = Sound(np.zeros((2, 4), np.float32), False)


class Models:
    """Stands in for the models: fails where a song named `bad` is among those to make."""

    def __init__(self):
        self.asked: list[list[str]] = []

    def make(self, songs):
        names = [song.name for song in songs]
        self.asked.append(names)
        if "bad" in names:
            raise RuntimeError("a kernel failed\nwith pages of advice")
        return [SOUND] * len(songs)


def songs(*names: str):
    return [song(name=name) for name in names]


def test_a_song_that_fails_fails_alone():
    models = Models()
    made = make_each(models, songs("a", "bad", "c"))
    assert made == [SOUND, "RuntimeError: a kernel failed", SOUND]
    assert models.asked == [["a", "bad", "c"], ["a"], ["bad"], ["c"]]


@pytest.mark.parametrize(
    ("attempts", "asked"),
    [
        ({}, [["a", "b"]]),
        ({"make together": 2}, [["a"], ["b"]]),
        ({"make together": 4, "b": 3}, [["a"]]),
    ],
)
def test_songs_whose_process_ended_are_made_apart_and_not_without_end(monkeypatch, attempts, asked):
    @contextmanager
    def counted(actor, stage, names):
        yield attempts.get(stage, max(attempts.get(name, 1) for name in names))

    monkeypatch.setattr(graph, "counted", counted)
    models = Models()
    made = make_unless_fatal(models, None, songs("a", "b"))
    assert models.asked == asked
    assert made[0] is SOUND
    assert made[1] is SOUND or "has ended its process 3 times" in made[1]
    assert ("b" in attempts) == (made[1] is not SOUND)


def nodes(*resources: dict) -> list[dict]:
    return [{"Alive": True, "Resources": each} for each in resources] + [
        {"Alive": False, "Resources": {"GPU": 8}}
    ]


@pytest.mark.parametrize(
    ("cluster", "device", "workers", "expected"),
    [
        (nodes({"CPU": 8, "GPU": 2}, {"CPU": 4, "GPU": 1}), "auto", None, ("cuda", 3, 1, 1.0)),
        (nodes({"CPU": 8, "GPU": 2}), "auto", 4, ("cuda", 4, 1, 0.5)),
        (nodes({"CPU": 8, "GPU": 2}), "cpu", None, ("cpu", 1, 7, 0)),
        (nodes({"CPU": 4}, {"CPU": 8}), "auto", None, ("cpu", 2, 3, 0)),
        (nodes({"CPU": 2}), "auto", None, ("cpu", 1, 1, 0)),
        (nodes({"CPU": 2}), "auto", 2, ("cpu", 2, 0.5, 0)),
    ],
)
def test_there_is_an_actor_a_gpu_or_a_node_or_as_many_as_the_flag_says(
    monkeypatch, cluster, device, workers, expected
):
    monkeypatch.setattr(ray, "nodes", lambda: cluster)
    pool = choose_pool(device, workers)
    assert (pool.device, pool.actors, pool.num_cpus, pool.num_gpus) == expected


def test_a_cluster_without_room_is_refused(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: nodes({"CPU": 2}))
    with pytest.raises(InputError, match="no GPU"):
        choose_pool("cuda", None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes({"memory": 1}))
    with pytest.raises(InputError, match="no CPUs"):
        choose_pool("auto", None)
