"""Files that people edit may begin with a byte order mark."""

from __future__ import annotations

import codecs
import json

import pytest

from acestep_ray.flags import read_settings
from acestep_ray.generation.requests import read_lyrics
from acestep_ray.plain_json import load_json
from acestep_ray.plain_yaml import load_yaml
from acestep_ray.training.lora_config import read_lora_config
from acestep_ray.tuning.space import read_space

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16"]
MARKED = {"utf-16-be": codecs.BOM_UTF16_BE, "utf-32-le": codecs.BOM_UTF32_LE}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_and_yaml_may_have_a_byte_order_mark(encoding):
    assert load_json('{"a": "é"}'.encode(encoding)) == {"a": "é"}
    assert load_yaml("a: é\n".encode(encoding)) == {"a": "é"}
    assert load_json("\ufeff[1]") == [1]
    assert load_yaml("\ufeffa: 1") == {"a": 1}


@pytest.mark.parametrize(("encoding", "mark"), MARKED.items())
def test_every_unicode_encoding_is_known_by_its_mark(encoding, mark):
    assert load_json(mark + '{"a": "é"}'.encode(encoding)) == {"a": "é"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_file_of_settings_may_have_one(encoding, tmp_path):
    (tmp_path / "s.yaml").write_bytes("prompt: é\n".encode(encoding))
    assert read_settings(str(tmp_path / "s.yaml")) == "prompt: é\n"
    (tmp_path / "lora.json").write_bytes(json.dumps({"r": 4}).encode(encoding))
    assert read_lora_config(tmp_path / "lora.json")["r"] == 4
    (tmp_path / "space.yaml").write_bytes(b"".join(["rank: log2int(4, 64)\n".encode(encoding)]))
    assert "rank" in read_space(str(tmp_path / "space.yaml"), {}).dimensions
    (tmp_path / "words.txt").write_bytes("[verse]\r\nLa é\n".encode(encoding))
    assert read_lyrics("words.txt", tmp_path) == ("[verse]\nLa é\n", [])
