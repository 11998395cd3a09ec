"""Names of files that are the same to a person and not to a disk.

A Mac writes `é` as two characters (NFD), other systems as one (NFC); people change the size of letters. Names are
compared as they are first, then in NFC, then without regard to the size of letters, where just one name fits.
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from acestep_ray.storage import StoredFile


def folded(name: str) -> str:
    """Equal for names that differ in Unicode's normal form or in the size of letters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


class Names:
    """A set of names in which a name is found that is written otherwise."""

    def __init__(self, names: Iterable[str] = ()):
        self._by_fold: dict[str, list[str]] = defaultdict(list)
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        """Take a name into the set."""
        self._by_fold[folded(name)].append(name)

    def find(self, name: str) -> str | None:
        """The name as the set has it; None where none fits, or several fit equally well."""
        found = self._by_fold.get(folded(name), [])
        if name in found:
            return name
        normal = unicodedata.normalize("NFC", name)
        equal = [other for other in found if unicodedata.normalize("NFC", other) == normal]
        if len(equal) == 1:
            return equal[0]
        return found[0] if len(found) == 1 else None

    def alike(self, name: str) -> list[str]:
        """All names of the set that differ from `name` in normal form or size of letters only."""
        return list(self._by_fold.get(folded(name), []))


def find_file(file: StoredFile) -> StoredFile:
    """`file` where it exists, else the file at its place whose name is the same to a person; else `file`.

    In object storage, where a look at a folder may take thousands of requests, only Unicode's normal forms are tried.
    """
    if not file.store.is_local:
        return file if file.name.isascii() else _in_other_form(file)
    if os.path.lexists(file.url):
        return file
    folder = ""
    for part in file.name.split("/"):
        place = posixpath.join(folder, part)
        if not os.path.exists(file.store.url_of(place)):
            other = Names(_names_in(file.store.url_of(folder))).find(part)
            if other is None:
                return file
            place = posixpath.join(folder, other)
        folder = place
    return file.store.file(folder)


def names_alike(path: str) -> list[str]:
    """Names at the place of a missing local file that look like its own."""
    folder, name = os.path.split(path)
    return sorted(other for other in _names_in(folder) if _looks(other) == _looks(name))


def _in_other_form(file: StoredFile) -> StoredFile:
    """An object, under the normal form of its name under which it exists."""
    for form in ("NFC", "NFD"):
        other = file.store.file(unicodedata.normalize(form, file.name))
        if other != file and file.status() is None and other.status() is not None:
            return other
    return file


def _names_in(folder: str) -> list[str]:
    """Names of files and folders in a local folder; none where it cannot be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def told_apart(names: Iterable[str]) -> list[str]:
    """Names for a message; those that look alike are shown with their characters' codes (`Caf\\u00e9`)."""
    names = list(names)
    counts: dict[str, set[str]] = defaultdict(set)
    for name in names:
        counts[_looks(name)].add(name)
    return [name if len(counts[_looks(name)]) == 1 else ascii(name)[1:-1] for name in names]


def _looks(name: str) -> str:
    """Equal for names that a reader would take for the same."""
    normal = unicodedata.normalize("NFKC", name).casefold()
    return "".join(c for c in normal if unicodedata.category(c) not in ("Cf", "Mn", "Zs")).strip()
