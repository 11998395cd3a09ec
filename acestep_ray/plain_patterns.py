"""PEFT's patterns of module names in files that a stranger may have written: only forms that compare characters.

PEFT compiles such keys as regular expressions, of which a short one can take longer than anybody waits. What PEFT and
other programs write are names, suffixes and anchored names, which need no regular expression.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LONGEST = 512
"""Characters of a pattern or a module's name; the model's longest name has 60."""

_SPECIAL = frozenset("*+?{}[]()|^$")
_ANY = None


class NotPlainError(ValueError):
    """A pattern that is more than a name; the text continues "the pattern …"."""


@dataclass(frozen=True)
class PlainPattern:
    """A name as a regular expression without repeats, choices and groups."""

    characters: tuple[str | None, ...]
    """None for a dot, which stands for any character."""
    at_start: bool
    """Whether `^` was written before it."""

    @classmethod
    def parse(cls, pattern: object) -> PlainPattern:
        """Raises NotPlainError for what is no text, or has more than characters, dots, `\\.`, `^` and `$`."""
        if not isinstance(pattern, str):
            raise NotPlainError(f"is {type(pattern).__name__}, not a text")
        if len(pattern) > LONGEST:
            raise NotPlainError(f"has {len(pattern):,} characters, more than {LONGEST}")
        at_start = pattern.startswith("^")
        rest = pattern[1:] if at_start else pattern
        if rest.endswith("$") and not rest.endswith("\\$"):
            rest = rest[:-1]
        characters: list[str | None] = []
        escaped = False
        for character in rest:
            if escaped:
                if character.isalnum():
                    raise NotPlainError(f"has the class `\\{character}`")
                characters.append(character)
                escaped = False
            elif character == "\\":
                escaped = True
            elif character in _SPECIAL:
                raise NotPlainError(f"has `{character}`")
            else:
                characters.append(_ANY if character == "." else character)
        if escaped or not characters:
            raise NotPlainError("is not finished" if escaped else "is empty")
        return cls(tuple(characters), at_start)

    def is_whole(self, name: str) -> bool:
        """Whether all of `name` fits, as `re.fullmatch` would say."""
        return len(name) == len(self.characters) and self._fits(name)

    def is_end(self, name: str) -> bool:
        """Whether `name` fits, or its end after a dot, as PEFT's `get_pattern_key` would say."""
        before = len(name) - len(self.characters)
        if before == 0:
            return self._fits(name)
        return before > 0 and not self.at_start and name[before - 1] == "." and self._fits(name[before:])

    def _fits(self, text: str) -> bool:
        return all(
            found == wanted or (wanted is _ANY and found != "\n")
            for found, wanted in zip(text, self.characters, strict=True)
        )


def first_that_fits(patterns: Iterable[tuple[str, PlainPattern]], name: str) -> str | None:
    """The first key whose pattern `name` or its end fits, as PEFT's `get_pattern_key` chooses; None where none does."""
    return next((key for key, pattern in patterns if pattern.is_end(name)), None)
