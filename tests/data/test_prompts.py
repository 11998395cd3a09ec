from __future__ import annotations

import itertools

from acestep_ray.data.prompts import PromptVariant, prompt_variants

TAGS = ["pop", "slow", "piano", "sad", "female"]


def texts(tags, recaption=None, *, key="song", shuffles=4, seed=0):
    return [
        variant.text
        for variant in prompt_variants(tags, recaption or {}, key=key, shuffles=shuffles, seed=seed)
    ]


def test_tags_come_in_as_many_different_orders_as_asked():
    orders = [tuple(text.split(", ")) for text in texts(TAGS, shuffles=20)]
    assert len(set(orders)) == len(orders) == 20
    assert all(sorted(order) == sorted(TAGS) for order in orders)


def test_orders_depend_on_seed_and_key_and_nothing_else():
    assert texts(TAGS) == texts(TAGS)
    assert texts(TAGS) != texts(TAGS, seed=1)
    assert texts(TAGS) != texts(TAGS, key="other")


def test_orders_are_pinned_across_machines_and_versions():
    # Caches hold these texts: another order would make all of them stale.
    assert texts(TAGS, shuffles=2) == [
        "piano, slow, pop, female, sad",
        "female, sad, piano, pop, slow",
    ]


def test_more_shuffles_extend_fewer():
    assert texts(TAGS, shuffles=7)[:3] == texts(TAGS, shuffles=3)


def test_every_tag_comes_first_about_equally_often():
    firsts = [texts(TAGS, key=str(i), shuffles=1)[0].split(", ")[0] for i in range(1000)]
    assert all(140 < firsts.count(tag) < 260 for tag in TAGS)


def test_few_tags_give_each_of_their_orders_once():
    assert sorted(texts(["a", "b", "c"], shuffles=50)) == sorted(
        ", ".join(order) for order in itertools.permutations("abc")
    )
    assert texts(["a"]) == ["a"]
    assert sorted(texts(["a", "a", "b"], shuffles=50)) == ["a, a, b", "a, b, a", "b, a, a"]


def test_recaptions_that_say_something_are_one_variant_each():
    variants = prompt_variants(
        ["a"], {"use_cases": " Driving. ", "b": " ", "analysis": "x"}, key="k", shuffles=3, seed=0
    )
    assert variants == [
        PromptVariant("tags", "a"),
        PromptVariant("recaption/analysis", "x"),
        PromptVariant("recaption/use_cases", "Driving."),
    ]


def test_without_tags_the_prompt_is_music():
    assert texts([]) == texts(["", " "]) == ["music"]
    assert texts([], {"simplified": "a song"}) == ["music", "a song"]


def test_prompts_are_cut_at_256_characters():
    assert texts(["é" * 300], {"long": "语" * 257, "fits": "x" * 256}) == ["é" * 256, "x" * 256, "语" * 256]


def test_orders_that_are_equal_after_the_cut_count_once():
    assert texts(["x" * 300, "x" * 301]) == ["x" * 256]
