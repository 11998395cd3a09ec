"""`acestep-ray cache prune`: deleting what lies in a feature cache and belongs to none of its songs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from acestep_ray.cache.commit import delete_leftovers, leftovers
from acestep_ray.cache.index import CacheIndex, read_manifest
from acestep_ray.cache.schema import MANIFEST, SAMPLES
from acestep_ray.storage import Store, only_writer
from acestep_ray.units import size_text


@dataclass(frozen=True)
class PruneSummary:
    """Files that no manifest reaches."""

    cache: str
    files: list[str]
    num_bytes: int
    dry_run: bool

    def render(self) -> str:
        """What was deleted, or with `dry_run` every file that would be."""
        verb = "would delete" if self.dry_run else "deleted"
        lines = [f"{verb} {len(self.files)} files, {size_text(self.num_bytes)}, of {self.cache}"]
        return "\n".join([*lines, *(f"  {name}" for name in self.files if self.dry_run)])


def prune_cache(place: str, dry_run: bool = False) -> PruneSummary:
    """Delete what runs that were killed have left in the cache at a path or URL; with `dry_run` only list it.

    That is every file of the format that the manifest does not reach, `.incoming/` with it: the songs that a killed
    rerun had encoded, which the next run would have found. Files that are not of the format stay.

    Raises InputError, and deletes nothing, where a run is writing to the cache, and where there is no complete cache:
    these files are then all that the next run can resume from.
    """
    store = Store.at(place)
    manifest = read_manifest(store)  # before a lock is made in what may be no cache
    if dry_run:
        return _prune(store, manifest, dry_run=True)
    # Room may be what is wanted.
    with only_writer(store, f"the cache {store.url}", needs_room=False):
        return _prune(store, read_manifest(store), dry_run=False)


def _prune(store: Store, manifest: Mapping[str, Any], *, dry_run: bool) -> PruneSummary:
    """Delete, or list, what this manifest does not reach."""
    # An index that misses parts may need what lies about: precompute sees to that.
    parts = CacheIndex.open(store).parts if manifest["counts"]["samples"] else []
    names = leftovers(store, reached(manifest, [f"{SAMPLES}/{part}" for part in parts]))
    statuses = store.names()
    summary = PruneSummary(
        cache=store.url,
        files=names,
        num_bytes=sum(statuses[name].size for name in names if name in statuses),
        dry_run=dry_run,
    )
    if not dry_run:
        delete_leftovers(store, names)
    return summary


def reached(manifest: Mapping[str, Any], parts: Sequence[str]) -> set[str]:
    """The files of a cache that its manifest leads to, `parts` among them, which are those of its index."""
    return {MANIFEST, *(manifest[name] for name in ("index", "ledger", "rejects")), *parts}
