"""Pages: what is in the file, and what a browser makes of it."""

from __future__ import annotations

import base64
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
from matplotlib.figure import Figure
from PIL import Image

from acestep_ray.errors import InputError
from acestep_ray.reporting.page import Page
from acestep_ray.storage import DiskFullError
from tests.browser import NARROW, WIDE, visit

EVIL = """<script>document.title = "taken"</script>"><img src=x onerror="document.title='taken'">&amp;'"""
VOID = {"meta", "link", "img", "br"}


class Checker(HTMLParser):
    """Finds tags that are not closed, or closed twice, and names that are there twice."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    return checker


def sounds(html: str) -> list[bytes]:
    """The sound files in a page."""
    found = re.findall(r'src="data:audio/mpeg;base64,([A-Za-z0-9+/=]+)"', html)
    return [base64.b64decode(content) for content in found]


@pytest.fixture
def full_page(tmp_path, write_sound, draw) -> Page:
    """A page with all there can be, and everywhere a text that wants to be HTML."""
    page = Page(EVIL, EVIL)
    for number in range(4):
        page.section(EVIL, EVIL if number else None)
        page.table([EVIL, "number"], [[EVIL, 1.0], [None, 2.5]], caption=EVIL, marked=0)
        page.facts({EVIL: EVIL, "a path": "/a/very/long/path" * 20})
        page.figure(draw(), EVIL, EVIL)
        page.figure(draw(), "alone")
        page.verbatim(EVIL * 5)
        page.note(EVIL)
    page.table([f"column {i}" for i in range(30)], [list(range(30))])
    picture = tmp_path / "picture.png"
    draw().savefig(picture)
    for number in range(2):
        sound = write_sound(tmp_path / f"{number}.wav")
        page.clip(sound, EVIL, picture=picture if number else draw(), text=EVIL, facts={EVIL: EVIL})
    return page


def test_all_text_is_escaped_and_the_page_is_whole_html(full_page):
    html = full_page.render()
    found = checked(html)
    assert not found.faults
    assert not found.open
    assert len(found.ids) == len(set(found.ids))
    names = {tag for tag, _ in found.tags}
    assert "script" not in names
    assert not [
        attributes for _, attributes in found.tags if any(name.startswith("on") for name in attributes)
    ]
    assert html.count("&lt;script&gt;") > 30
    for tag, attributes in found.tags:
        if tag == "img":
            assert attributes["alt"]
        if tag in ("svg", "audio"):
            assert attributes["aria-label"]
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))


def test_a_browser_shows_and_plays_it_without_an_error_or_a_request(full_page, tmp_path, browser):
    path = tmp_path / "page.html"
    full_page.write(path)
    for width in (WIDE, NARROW):
        with visit(browser, path, width=width) as found:
            assert found.overflow() <= 0
            picture = found.screenshot()
            assert len(np.unique(picture[::4, ::4, 0])) > 50
            assert picture.mean() > 200  # light
            assert found.page.title() == EVIL
            assert found.page.locator("script, [onerror]").count() == 0
            loaded = "images => images.every(image => image.naturalWidth > 0)"
            assert found.page.locator("img").evaluate_all(loaded)
            if width == WIDE:
                assert found.play(0) > 0.1
                assert found.play(1) > 0.1
            assert not found.errors
            assert not found.requests


def test_in_the_dark_text_and_figures_are_light(full_page, tmp_path, browser):
    path = tmp_path / "page.html"
    full_page.write(path)
    with visit(browser, path, dark=True) as found:
        assert found.screenshot().mean() < 90
        for selector in ("h2", "td", "dd", "svg text", "figcaption"):
            fill = "svg" in selector
            colour = found.page.locator(selector).first.evaluate(
                f"element => getComputedStyle(element).{'fill' if fill else 'color'}"
            )
            assert min(map(int, re.findall(r"\d+", colour)[:3])) > 120, selector
        strokes = "paths => paths.map(path => getComputedStyle(path).stroke)"
        assert "rgb(0, 0, 0)" not in found.page.locator("svg path, svg use").evaluate_all(strokes)


def test_the_policy_lets_nothing_be_fetched_or_run(tmp_path, browser):
    page = Page("policy")
    page.text("PLACE")
    injected = '<img src="http://127.0.0.1:9/x.png"><script>document.title = "taken"</script>'
    path = tmp_path / "page.html"
    path.write_text(page.render().replace("PLACE", injected), encoding="utf-8")
    with visit(browser, path) as found:
        assert found.page.title() == "policy"
        assert len(found.errors) == 2
        assert all("Content Security Policy" in error for error in found.errors)


def test_sound_is_small_and_cut_and_keeps_its_pitch(tmp_path, write_sound):
    path = write_sound(tmp_path / "long.wav", 5.0)
    page = Page("clips", clip_seconds=2.0)
    page.clip(path, "long")
    page.clip(write_sound(tmp_path / "short.wav", 1.0), "short")
    html = page.render()
    long, short = sounds(html)
    assert len(long) < path.stat().st_size / 8
    (tmp_path / "long.mp3").write_bytes(long)
    samples, rate = soundfile.read(tmp_path / "long.mp3")
    assert samples.shape == pytest.approx((2 * rate, 2), rel=0.05)
    spectrum = np.abs(np.fft.rfft(samples[:rate, 0]))
    assert spectrum.argmax() == pytest.approx(440, abs=2)
    assert "The first 2 of 5 seconds." in html
    assert html.count("The first") == 1
    assert len(short) < len(long)


@pytest.mark.parametrize(("rate", "channels"), [(96000, 2), (44100, 1), (8000, 6)])
def test_sound_of_any_rate_and_channels_can_be_played(tmp_path, write_sound, rate, channels):
    page = Page("clips")
    page.clip(write_sound(tmp_path / "sound.wav", rate=rate, channels=channels), "sound")
    (tmp_path / "sound.mp3").write_bytes(sounds(page.render())[0])
    info = soundfile.info(tmp_path / "sound.mp3")
    assert info.samplerate <= 48000
    assert info.channels == min(2, channels)
    assert info.duration == pytest.approx(1.0, abs=0.2)


def test_a_page_that_is_full_of_sound_names_the_files_of_other_clips(tmp_path, write_sound):
    one = Page("one")
    one.clip(write_sound(tmp_path / "0.wav"), "clip 0")
    page = Page("many", sound_bytes=2 * len(sounds(one.render())[0]) + 10)
    for number in range(4):
        page.clip(write_sound(tmp_path / f"{number}.wav"), f"clip {number}", text=f"text {number}")
    html = page.render()
    assert len(sounds(html)) == 2
    assert f"full of sound: {tmp_path / '2.wav'}" in html
    assert "text 3" in html


def test_what_is_no_sound_or_no_picture_is_refused(tmp_path, write_sound):
    page = Page("refused")
    (tmp_path / "text.wav").write_text("no sound")
    for path in (tmp_path / "text.wav", tmp_path / "none.wav"):
        with pytest.raises(InputError, match=path.name):
            page.clip(path, "clip")
    page.clip(write_sound(tmp_path / "sound.wav"), "clip", picture=tmp_path / "none.png")
    assert page.notes == [f"the picture cannot be read (No such file or directory): {tmp_path / 'none.png'}"]
    with pytest.raises(InputError, match=r"text\.wav"):
        page.figure(tmp_path / "text.wav", "no picture")


def test_large_figures_and_pictures_are_made_small(tmp_path):
    page = Page("large")
    points = Figure(figsize=(4, 2))
    points.subplots().scatter(*np.random.default_rng(0).normal(size=(2, 10_000)))
    page.figure(points, "many points")
    noise = np.random.default_rng(0).integers(0, 256, (400, 800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    page.figure(tmp_path / "noise.png", "noise")
    html = page.render()
    assert html.count("data:image/webp") + html.count("data:image/png") == 2
    assert "<svg" not in html
    assert len(html) < (tmp_path / "noise.png").stat().st_size


def test_the_same_page_is_the_same_file(draw):
    def made() -> str:
        page = Page("same")
        page.figure(draw(), "a figure")
        return page.render()

    assert made() == made()


def test_numbers_stand_on_the_right_and_nothing_is_a_dash():
    page = Page("table")
    page.table(["name", "loss", "is"], [["a", 0.123456, True], ["b", None, False]])
    html = page.render()
    assert '<td>a</td><td class="right">0.1235</td><td>yes</td>' in html
    assert '<td>b</td><td class="right">–</td><td>no</td>' in html


def test_texts_that_are_no_unicode_are_written_all_the_same(tmp_path):
    page = Page("name \udcff")
    page.text("control \x00\x1b")
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "name \N{REPLACEMENT CHARACTER}" in text
    assert "\x00" not in text


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    Page("first").write(path)
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DiskFullError, match=r"(?s)No space left on device.*page\.html"):
            Page("second").write(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(InputError, match="cannot be written"):
        Page("third").write(tmp_path)
