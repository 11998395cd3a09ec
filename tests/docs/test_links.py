"""Links between the pages lead somewhere, and files that they name are there."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, prose

_LINK = re.compile(r"\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)")
# Folders of the package, after which its files are named without it.
_PACKAGE = ROOT / "acestep_ray"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        kept = [c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN"]
        anchor = "".join(kept).replace(" ", "-")
        number = 0
        while (name := anchor if number == 0 else f"{anchor}-{number}") in found:
            number += 1
        found.add(name)
    return found


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in _LINK.findall(prose(page)):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


def missing_files(page: Path) -> list[str]:
    """Python files of ours that the text names and that are not there."""
    named = re.findall(r"`((?:[\w-]+/)+[\w-]+\.py)`", prose(page))
    return [name for name in named if not ((ROOT / name).is_file() or (_PACKAGE / name).is_file())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_files_that_are_named_are_there(page):
    assert missing_files(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`\n\n## A heading, with marks\n\n[a](page.md#one-two) [b](#a-heading-with-marks) [c](nowhere.md)\n"
        "[d](page.md#nothing) [over\nlines](gone.md)\n```\n[e](not-looked-at.md)\n```\n`training/nothing.py`\n"
    )
    assert broken_links(page) == ["nowhere.md", "page.md#nothing", "gone.md"]
    assert missing_files(page) == ["training/nothing.py"]


def test_every_page_is_reached_from_the_readme_or_the_guide():
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in (ROOT / "README.md", ROOT / "docs" / "guide.md")
        for target in _LINK.findall(prose(page))
    }
    unreached = [page.name for page in (ROOT / "docs").glob("*.md") if page.resolve() not in linked]
    assert unreached == []
