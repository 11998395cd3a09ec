"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass

from acestep_ray.errors import InputError

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    check: str
    """What was looked at, in a word or two."""
    level: str
    """ok, warning or problem."""
    found: str
    remedy: str | None = None

    def render(self) -> str:
        """The finding as a line of text."""
        found = " ".join(self.found.split())
        remedy = f" → {' '.join(self.remedy.split())}" if self.remedy else ""
        return f"{self.level:<8} {self.check:<16} {found}{remedy}"


def ok(check: str, found: str) -> Finding:
    return Finding(check, OK, found)


def warning(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, WARNING, found, remedy)


def problem(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, PROBLEM, found, remedy)


def from_error(check: str, error: InputError) -> Finding:
    """The problem that a mistake of the user's is."""
    where = f": {error.where}" if error.where else ""
    return problem(check, f"{error.what}{where}", error.fix or "correct it")
