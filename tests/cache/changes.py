"""Files of a cache found by what they hold, and changed behind its back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from acestep_ray.cache.commit import content_hash
from acestep_ray.cache.index import CacheIndex
from acestep_ray.cache.schema import table_from_bytes, table_to_bytes
from acestep_ray.storage import Store


def file_of(cache: Store, prefix: str) -> str:
    (name,) = [name for name in cache.names() if name.startswith(prefix)]
    return name


def place_of(cache: Store, key: str) -> tuple[str, int, int]:
    index = CacheIndex.open(cache)
    i = index.position(key)
    return f"samples/{index.parts[index.part_numbers[i]]}", int(index.offsets[i]), int(index.lengths[i])


def overwrite(cache: Store, name: str, start: int, content: bytes) -> None:
    whole = bytearray(cache.read_bytes(name))
    whole[start : start + len(content)] = content
    cache.write_bytes(name, whole)


def rewrite_table(
    cache: Store, prefix: str, schema: pa.Schema, change: Callable[[pa.Table], pa.Table]
) -> None:
    """Replace a table by a changed one whose name and manifest are right."""
    name = file_of(cache, prefix)
    content = table_to_bytes(change(table_from_bytes(cache.read_bytes(name), schema).cast(schema)))
    new = f"{prefix}{content_hash(content)}.parquet"
    cache.delete([name])
    cache.write_bytes(new, content)
    rewrite_manifest(cache, **{re.match("[a-z]+", prefix)[0]: new})


def rewrite_manifest(cache: Store, **values: Any) -> None:
    manifest = json.loads(cache.read_bytes("manifest.json"))
    cache.write_bytes("manifest.json", json.dumps({**manifest, **values}).encode())


def with_values(table: pa.Table, name: str, values: list) -> pa.Table:
    i = table.schema.get_field_index(name)
    return table.set_column(i, table.schema.field(i), pa.array(values, table.schema.field(i).type))
