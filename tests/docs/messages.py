"""The messages of the package's errors, as its source spells them."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from itertools import product

from tests.docs.pages import ROOT

_PACKAGE = ROOT / "acestep_ray"
_BASE = "AceStepError"
# A message that consists of a value alone is another error's, and is told there.
_FEWEST_LETTERS = 4


@dataclass(frozen=True)
class Message:
    """What one place in the source tells."""

    error: str
    """Name of its class."""
    parts: tuple[str, ...]
    """Its text, cut where values stand; the first line alone, without what to do."""
    place: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches every text that it may be."""
        return re.compile(".+".join(map(re.escape, self.parts)))

    def __str__(self) -> str:
        return "…".join(self.parts)


@cache
def error_classes() -> frozenset[str]:
    """`AceStepError` and what is derived from it, by name."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for _, tree in _sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {_BASE}
    while new := {name for name, of in bases.items() if of & found} - found:
        found |= new
    return frozenset(found)


@cache
def messages() -> tuple[Message, ...]:
    """Every message that some words of are in the source."""
    found = []
    for place, tree in _sources():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            if node.func.id not in error_classes():
                continue
            for text in dict.fromkeys(_texts(node.args[0])):
                parts = tuple(re.sub("\0+", "\0", text.split("\n")[0]).split("\0"))
                if sum(map(str.isalpha, "".join(parts))) >= _FEWEST_LETTERS:
                    found.append(Message(node.func.id, parts, f"{place}:{node.lineno}"))
    return tuple(found)


@cache
def _sources() -> tuple[tuple[str, ast.Module], ...]:
    files = sorted(_PACKAGE.rglob("*.py"))
    return tuple((str(f.relative_to(ROOT)), ast.parse(f.read_text(encoding="utf-8"))) for f in files)


def _texts(node: ast.expr) -> list[str]:
    """The texts that an expression may be, with NUL for every value in it that is not in the source."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body), *_texts(node.orelse)]
    if isinstance(node, ast.FormattedValue):
        return _texts(node.value)
    if isinstance(node, ast.JoinedStr):
        return ["".join(parts) for parts in product(*map(_texts, node.values))]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return ["".join(parts) for parts in product(_texts(node.left), _texts(node.right))]
    return ["\0"]
