"""The pages of the documentation, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "cluster").glob("**/*.md")])

# Blocks without a language may hold commands too, or anything else.
SHELL = {"bash", "sh", "shell", "console"}
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<body>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE
)
_OURS = re.compile(r"(?:acestep-ray|python (?:pipelines|benchmarks)/|make |ray job submit)")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    line: int
    words: tuple[str, ...]
    is_whole: bool
    """Whether it can be typed as it is; one in the text may leave out what does not matter there."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {shlex.join(self.words)}"[:120]


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line."""

    language: str
    body: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for fence in _FENCE.finditer(text):
        yield Block(fence["language"], fence["body"], text.count("\n", 0, fence.start("body")) + 1)


def prose(page: Path) -> str:
    """A page without its fenced blocks, with as many lines."""
    return _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[Command]:
    """The commands of a page's shell blocks, and those in other blocks and in the text that are certainly ours."""
    name = str(page.relative_to(ROOT))
    found: list[Command] = []

    def add(text: str, line: int, is_whole: bool) -> None:
        for words in _split(text):
            given = tuple(word for word in words if word != "…")
            found.append(Command(name, line, given, is_whole and given == words))

    for block in blocks(page):
        if block.language in SHELL or (block.language == "" and _OURS.match(block.body)):
            for line, text in _logical_lines(block.body, block.line):
                add(text, line, is_whole=True)
        elif block.language == "powershell":
            for inner in re.findall(r'bash -lc "(.*?)"', block.body.replace("`\n", ""), re.DOTALL):
                add(inner, block.line, is_whole=True)
    text = prose(page)
    for span in re.finditer(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", text):
        if _OURS.match(span[1]) and "--" in span[1]:
            add(" ".join(span[1].split()), text.count("\n", 0, span.start()) + 1, is_whole=False)
    return found


def _logical_lines(body: str, first: int) -> Iterator[tuple[int, str]]:
    """Lines with those that follow a backslash joined on, or that go on within quotes, and their numbers."""
    joined, start = "", 0
    for number, line in enumerate(body.splitlines(), start=first):
        start = start if joined else number
        joined += line
        if line.endswith("\\"):
            joined = joined[:-1]
            continue
        try:
            shlex.split(joined, comments=True)
        except ValueError:  # a quotation that is still open
            joined += "\n"
            continue
        if joined.strip():
            yield start, joined.strip().removeprefix("$ ")
        joined = ""
    assert not joined.strip(), f"a command has no end: {joined}"


def _split(text: str) -> Iterator[tuple[str, ...]]:
    """The simple commands of a line, without variables that are set before them."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("&|;"):
            while words and _ASSIGNMENT.fullmatch(words[0]):
                words.pop(0)
            if words:
                yield tuple(words)
            words = []
        else:
            words.append(word)
