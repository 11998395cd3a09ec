"""Names of files in datasets and in sources of songs: which file each means, and which no stranger may name."""

from __future__ import annotations

import os
import posixpath

from acestep_ray.data.same_names import find_file
from acestep_ray.data.texts import is_unicode
from acestep_ray.errors import InputError
from acestep_ray.storage import Store, StoredFile, is_url

# Whoever put songs there is nobody whom this machine's files and buckets concern.
_OF_STRANGERS = ("hf", "http", "https")


def locate_file(root: Store, filename: str) -> StoredFile:
    """The file that a row names: relative to `root`, an absolute path on this machine, or a URL with `://`.

    Only `/` separates folders; a backslash is a character like any other. Symbolic links are followed, also those
    that lead out of a local `root`: whoever made the dataset made the links. The file need not exist; where it does
    not, one whose name is the same to a person is taken (`same_names`).

    Raises InputError if the name is empty or malformed, if its `..` lead out of `root`, and where a source from the
    Hub or the web names a file of this machine or of a bucket.
    """
    if not filename.strip() or "\0" in filename or not is_unicode(filename):
        raise InputError("a file name is empty or malformed", where=repr(filename))
    if is_url(filename) or filename.startswith("/"):
        return _within_reach(find_file(StoredFile.at(filename)), root)
    name = posixpath.normpath(filename)
    if name in (".", "..") or name.startswith("../"):
        raise InputError(
            "a file name leaves the dataset directory",
            where=filename,
            fix=f"keep the file inside {root.url}, or give its absolute path or URL",
        )
    return find_file(root.file(name))


def file_at(filename: str, folder: Store) -> StoredFile:
    """The file that a source names: by a URL, an absolute path, or relative to its folder; see `locate_file` for one
    that does not exist.

    Raises InputError for a URL that cannot be used, and where a source from the Hub or the web names a file of this
    machine or of a bucket.
    """
    if is_url(filename):
        return _within_reach(find_file(StoredFile.at(filename)), folder)
    if folder.is_local or os.path.isabs(filename):
        path = os.path.normpath(os.path.join(folder.url if folder.is_local else "", filename))
        inside = path.removeprefix(f"{folder.url.rstrip('/')}/")
        file = folder.file(inside) if folder.is_local and inside != path else StoredFile.at(path)
        return _within_reach(find_file(file), folder)
    protocol, _, path = folder.url.partition("://")
    return find_file(StoredFile.at(f"{protocol}://{posixpath.normpath(posixpath.join(path, filename))}"))


def _within_reach(file: StoredFile, root: Store) -> StoredFile:
    """`file`, which a row of a source at `root` names by its URL or an absolute path.

    Raises InputError where a source from the Hub or the web names a file of this machine or of a bucket, which would
    be read with the user's own rights.
    """
    if root.protocol in _OF_STRANGERS and file.store.protocol not in _OF_STRANGERS:
        raise InputError(
            f"songs from {root.protocol}:// name a file that is not there",
            where=file.url,
            fix=f"put the file beside them; copy {root.url} to this machine where you trust it",
        )
    return file
