"""Where jobs write to: a directory or a URL."""

from __future__ import annotations

import secrets
from pathlib import Path

from acestep_ray.doctor.finding import Finding, from_error, ok, problem
from acestep_ray.doctor.machine import existing_parent
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.storage import Store, is_url


def check_output(place: str) -> Finding:
    """Whether this machine can write to a directory or URL, read it back and delete it."""
    store = store_for_probe(place)
    name, content = f"{probe_folder()}/driver", secrets.token_bytes(64)
    try:
        store.write_bytes(name, content)
        same = store.read_bytes(name) == content
        store.delete([name])
    except InputError as error:
        return from_error("output", error)
    except (AceStepError, OSError) as error:
        return problem("output", f"{error} ({store.url})", "give a directory or bucket that can be written")
    if not same:
        return problem("output", f"what was written reads differently ({place})", "use another storage")
    return ok("output", f"written, read and deleted at {store.url}")


def store_for_probe(place: str) -> Store:
    """The directory; for a local one that is not there, the nearest above it: a check leaves nothing behind."""
    return Store.at(place if is_url(place) else existing_parent(Path(place)))


def probe_folder() -> str:
    """A name that nothing else has."""
    return f".acestep-ray-doctor-{secrets.token_hex(8)}"
