from __future__ import annotations

import pyarrow as pa
import pytest

from acestep_ray.cache.schema import (
    hash_of,
    table_from_bytes,
    table_to_bytes,
    write_json,
)
from acestep_ray.storage import Store


def test_json_is_written_whole_and_readable(tmp_path):
    store = Store.at(tmp_path)
    write_json(store, "manifest.json", {"b": "ü", "a": 1})
    text = (tmp_path / "manifest.json").read_text(encoding="utf-8")
    assert text == '{\n  "a": 1,\n  "b": "ü"\n}\n'
    with pytest.raises(TypeError):
        write_json(store, "manifest.json", {"a": object()})
    assert (tmp_path / "manifest.json").read_text(encoding="utf-8") == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]


def test_tables_are_written_the_same_however_their_rows_are_chunked():
    count = 100_000  # several pages
    whole = pa.table({"key": [f"{i:040}" for i in range(count)], "part": ["x", *["y"] * (count - 1)]})
    pieces = pa.concat_tables([whole.slice(0, 1001), whole.slice(1001)])
    content = table_to_bytes(pieces, "part")
    assert content == table_to_bytes(whole, "part")
    read = table_from_bytes(content, whole.schema, "part")
    assert read.cast(whole.schema).equals(whole)
    assert read["part"].chunk(0).dictionary.to_pylist() == ["x", "y"]
    for schema, repeated in ((pa.schema([("key", pa.string())]), None), (whole.schema, "file")):
        with pytest.raises(pa.ArrowInvalid):
            table_from_bytes(content, schema, repeated)


def test_hash_depends_on_values_and_not_on_the_order_of_keys():
    assert hash_of({"a": 1, "b": [2.5]}) == hash_of({"b": [2.5], "a": 1})
    assert hash_of(["ab", "c"]) != hash_of(["a", "bc"])
