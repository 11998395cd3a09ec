from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from acestep_ray.generation.audio import Sound
from acestep_ray.generation.models import choose_models
from acestep_ray.generation.records import Recipe, find_made, note_of, write_song
from acestep_ray.storage import Store
from tests.generation.conftest import song

SOUND = Sound(np.full((2, 24_000), 0.25, np.float32), overlapped=False)
RECIPE = Recipe(
    models={"transformer": "a", "loras": [["b", 1.0]]}, precision="32", overlapped=None, format="wav"
)


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> Store:
    if request.param == "local":
        return Store.at(tmp_path / "out")
    return Store.at(request.getfixturevalue("s3").url("generated"))


def test_a_song_that_was_written_is_found_wherever_it_lies(store):
    one = song(name="folder/one", speaker=[0.5] * 512, prompt="é")
    assert find_made(store, [one], RECIPE) == {}
    assert write_song(store, one, SOUND, RECIPE) == 0.5
    assert find_made(store, [one, replace(one, name="other")], RECIPE) == {"folder/one": 0.5}
    samples, _ = soundfile.read(io.BytesIO(store.read_bytes("folder/one.wav")))
    assert samples.shape == (24_000, 2)
    note = json.loads(store.read_bytes(note_of(one)))
    assert (note["prompt"], note["seed"], note["seconds"], note["models"]) == ("é", 0, 0.5, RECIPE.models)


@pytest.mark.parametrize(
    "recipe",
    [
        replace(RECIPE, models={"transformer": "c", "loras": [["b", 1.0]]}),
        replace(RECIPE, models={"transformer": "a", "loras": [["b", 0.5]]}),
        replace(RECIPE, precision="bf16"),
        replace(RECIPE, overlapped=True),
        replace(RECIPE, format="flac"),
    ],
)
def test_a_song_of_other_models_is_made_again(tmp_path, recipe):
    store = Store.at(tmp_path)
    write_song(store, song(), SOUND, RECIPE)
    assert find_made(store, [song()], RECIPE)
    assert not find_made(store, [song()], recipe)


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": "rock"},
        {"lyrics": "a"},
        {"seed": 1},
        {"frames": 22},
        {"scheduler": "heun"},
        {"speaker": [0.0] * 512},
    ],
)
def test_a_song_of_other_settings_is_made_again_and_one_that_moved_in_the_file_is_not(tmp_path, settings):
    store = Store.at(tmp_path)
    write_song(store, song(), SOUND, RECIPE)
    assert find_made(store, [song(line=9)], RECIPE)
    assert not find_made(store, [song(**settings)], RECIPE)


def test_a_song_that_is_cut_short_or_lost_or_has_no_whole_note_is_made_again(tmp_path):
    store = Store.at(tmp_path)
    write_song(store, song(), SOUND, RECIPE)
    content, note = store.read_bytes("song.wav"), store.read_bytes("song.json")
    for file, damaged in (("song.wav", content[:-1]), ("song.json", note[:-5]), ("song.json", b"[]")):
        store.write_bytes(file, damaged)
        assert not find_made(store, [song()], RECIPE)
        store.write_bytes("song.wav", content)
        store.write_bytes("song.json", note)
        assert find_made(store, [song()], RECIPE)
    for file in ("song.wav", "song.json"):
        (tmp_path / file).unlink()
        assert not find_made(store, [song()], RECIPE)
        write_song(store, song(), SOUND, RECIPE)


def test_the_recipe_knows_the_loras_and_the_transformer(config, checkpoint, loras):
    def recipe(**flags) -> Recipe:
        return Recipe.of(choose_models(replace(config, **flags), checkpoint), checkpoint, "wav")

    plain = recipe()
    assert plain == recipe(transformer_path=str(checkpoint.path / "ace_step_transformer"))
    others = [
        recipe(lora_path=str(loras[0])),
        recipe(lora_path=str(loras[0]), lora_weight=0.5),
        recipe(lora_path=str(loras[1])),
    ]
    assert len({json.dumps(one.models) for one in (plain, *others)}) == 4
