"""A real Chromium without a window, and what a page does in it."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = ("--headless=new", "--no-sandbox", "--autoplay-policy=no-user-gesture-required")
WIDE, NARROW = 1200, 390
"""Widths of a window and of a phone, in pixels."""
_MILLISECONDS = 30_000
_HEARD_SECONDS = 0.2


@dataclass
class Visit:
    """A page that is open, and what it did so far."""

    page: Any
    """Playwright's."""
    errors: list[str] = field(default_factory=list)
    """Of its console, and exceptions of its scripts."""
    requests: list[str] = field(default_factory=list)
    """Addresses of all that it asked for, itself left out."""

    def play(self, number: int = 0) -> float:
        """Play a clip; returns the seconds it has come to. Fails where it does not play."""
        clip = self.page.locator("audio").nth(number)
        clip.evaluate("clip => clip.play()")
        return clip.evaluate(
            """(clip, seconds) => new Promise((done, failed) => {
                const look = () => {
                    if (clip.error) failed(new Error(clip.error.message));
                    else if (clip.ended || clip.currentTime > seconds) done(clip.currentTime);
                    else setTimeout(look, 20);
                };
                look();
            })""",
            _HEARD_SECONDS,
        )

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    def screenshot(self) -> np.ndarray:
        """The whole page as (height, width, 3) of 0 to 255."""
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot(full_page=True))).convert("RGB"))


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    """A browser of Playwright's; the test is skipped where there is none.

    While it is open no event loop can be started in this thread: keep it to a module.
    """
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no browser is installed: {', '.join(PROGRAMS)}")
    if find_spec("playwright") is None:
        pytest.skip("playwright is not installed: pip install 'acestep-ray[dev]'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def visit(browser: Any, path: Path, *, width: int = WIDE, dark: bool = False) -> Iterator[Visit]:
    """Open a file in a window of its own."""
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(_MILLISECONDS)
    try:
        page = context.new_page()
        found = Visit(page)
        address = path.resolve().as_uri()
        page.on(
            "console", lambda message: found.errors.append(message.text) if message.type == "error" else None
        )
        page.on("pageerror", lambda error: found.errors.append(str(error)))
        page.on(
            "request", lambda request: found.requests.append(request.url) if request.url != address else None
        )
        page.goto(address, wait_until="load")
        yield found
    finally:
        context.close()
