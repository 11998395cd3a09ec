"""Texts of users on figures."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from acestep_ray.drawn_text import literal, with_fonts
from acestep_ray.generation.render import write_mel_picture
from acestep_ray.reporting.drawing import draw


@pytest.mark.parametrize("text", ["$", "$100 and $200", "a $x^$", r"$\frac$ \$ b", "50 % _ { }"])
def test_a_text_is_drawn_letter_by_letter(text):
    figure = Figure()
    title = figure.subplots().set_title(literal(text))
    figure.savefig(io.BytesIO(), format="png")
    cleaned, is_formula = title._preprocess_math(title.get_text())
    assert not is_formula
    assert cleaned == text


def test_characters_that_no_font_has_are_left_out_and_others_bring_their_font():
    private = chr(0x10FFFD)
    text, families = with_fonts(f"slow {private}piano")
    assert text == "slow piano"
    assert families == ["sans-serif"]


def test_the_font_that_has_a_character_is_used_beside_the_usual_one(monkeypatch):
    from matplotlib import font_manager

    class Font:
        def __init__(self, characters):
            self.characters = characters

        def get_char_index(self, code):
            return int(chr(code) in self.characters)

    fonts = {"usual": Font("abc"), "other": Font("xyz"), "chinese": Font("纸飞")}
    entries = [font_manager.FontEntry(fname=name, name=name.title()) for name in ("gone", *fonts)]

    def get_font(name):
        if name not in fonts:
            raise FileNotFoundError(name)
        return fonts[name]

    monkeypatch.setattr(font_manager, "findfont", lambda properties: "usual")
    monkeypatch.setattr(font_manager, "get_font", get_font)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    assert with_fonts("a 纸飞机") == ("a 纸飞", ["sans-serif", "Chinese"])


@pytest.mark.parametrize("title", [r"$\frac$ b", "纸飞机", f"key{chr(0x10FFFD)} · seed 3"])
def test_a_picture_of_a_sound_has_any_title_without_a_warning(title):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_mel_picture(file, np.zeros((2, 48_000), np.float32), title)
    assert file.getvalue().startswith(b"\x89PNG")


def test_a_figure_of_a_page_leaves_characters_to_the_browsers_fonts_without_a_warning():
    figure = Figure()
    figure.subplots().set_title(f"run {chr(0x10FFFD)}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chr(0x10FFFD) in str(draw(figure, "figure"))
