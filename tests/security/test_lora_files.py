"""LoRA files of strangers: what is no pattern, strength or matrix is one message, in bounded time and memory."""

from __future__ import annotations

import itertools
import json
import math
import struct

import pytest
import torch
from safetensors.torch import save_file

from acestep_ray import cli
from acestep_ray.errors import InputError
from acestep_ray.export.info import info
from acestep_ray.export.reading import METADATA_KEY, open_lora
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.transformer_config import TransformerConfig
from acestep_ray.training import bounded_patterns
from acestep_ray.training.lora import add_lora
from acestep_ray.training.lora_config import read_lora_config
from tests.security.bounded import run

MODULE = "transformer_blocks.0.attn.to_q"
SLOW = ("(a+)+", "(.*)*x", "((t|r|a|n|s|f|o|m|e|_)+)+$!", "(?:(?:.*.*)*.*)*!", r"([a-z_.0-9]+)*\$")
NO_LITERAL = (*SLOW, "[", "a|b", ".*to_q", r"\d", "to_q(", "(?P<a>", "", "a" * 600, "to_q\\")


def write(path, config=None, module=MODULE, a=(2, 3), b=(4, 2), **more):
    tensors = {f"{module}.lora_A.weight": torch.ones(a), f"{module}.lora_B.weight": torch.ones(b), **more}
    described = config if isinstance(config, str) or config is None else json.dumps(config)
    save_file(tensors, path, None if described is None else {METADATA_KEY: described})
    return path


def command(*arguments: object) -> int:
    return cli.main(list(map(str, arguments)))


def test_a_pattern_in_a_lora_that_would_take_years_is_refused_at_once(tmp_path):
    modules, patterns = ("a" * 40 + "!", MODULE), ("(a+)+", "((.*)*)*x")
    paths = [
        write(tmp_path / f"{i}.safetensors", {"lora_alpha": 1, "alpha_pattern": {pattern: 1}}, module)
        for i, (module, pattern) in enumerate(itertools.product(modules, patterns))
    ]
    code = """
        from acestep_ray.errors import InputError
        for path in sys.argv[1:]:
            try:
                open_lora(Path(path))
            except InputError as error:
                print(error)
    """
    imports = "from pathlib import Path\nfrom acestep_ray.export.reading import open_lora"
    assert run(code, *paths, imports=imports, seconds=30).count("`alpha_pattern` has an expression") == 4


@pytest.mark.parametrize("pattern", NO_LITERAL)
def test_patterns_in_a_lora_are_names_or_refused(tmp_path, pattern):
    path = write(tmp_path / "lora.safetensors", {"lora_alpha": 1, "alpha_pattern": {pattern: 1}})
    with pytest.raises(InputError, match="`alpha_pattern` has an expression that is not matched"):
        open_lora(path)


@pytest.mark.parametrize(
    ("pattern", "scale"),
    [
        (MODULE, 4.0),
        ("attn.to_q", 4.0),
        (r"attn\.to_q", 4.0),
        ("to_q", 4.0),
        ("to_q$", 4.0),
        (f"^{MODULE}$", 4.0),
        ("^to_q", 0.5),
        ("o_q", 0.5),
        ("attn", 0.5),
        ("cross_attn.to_q", 0.5),
    ],
)
def test_literal_forms_mean_what_they_mean_to_peft(tmp_path, pattern, scale):
    from peft.utils.other import get_pattern_key

    path = write(tmp_path / "lora.safetensors", {"lora_alpha": 1, "alpha_pattern": {pattern: 8}})
    assert open_lora(path).scales == {MODULE: scale}
    assert (get_pattern_key([pattern], MODULE) == pattern) == (scale == 4.0)


@pytest.mark.parametrize(
    "alpha", [10**400, -1, 0, math.nan, math.inf, -math.inf, 1e300, "8", True, [8], {"a": 1}, None]
)
@pytest.mark.parametrize("field", ["lora_alpha", "alpha_pattern"])
def test_a_strength_that_is_none_is_refused(tmp_path, alpha, field):
    config = {"lora_alpha": alpha} if field == "lora_alpha" else {"alpha_pattern": {"to_q": alpha}}
    path = write(tmp_path / "lora.safetensors", config)
    if field == "lora_alpha" and alpha is None:
        assert open_lora(path).scales == {MODULE: 1.0}
        return
    with pytest.raises(InputError, match="not a number above 0"):
        open_lora(path)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e30])
def test_an_alpha_tensor_that_is_no_strength_is_refused(tmp_path, value):
    path = write(tmp_path / "lora.safetensors", None, **{f"{MODULE}.alpha": torch.tensor(value)})
    with pytest.raises(InputError, match="not a number above 0"):
        open_lora(path)


@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": [1]},
        {"alpha_pattern": "to_q"},
        {"alpha_pattern": {f"m{i}": 1 for i in range(3000)}},
        {"use_dora": "false"},
        {"use_rslora": 7},
        {"peft_type": "x" * 10_000},
        [],
        "[" * 100_000,
        '{"lora_alpha": ' + "9" * 5000 + "}",
        "nonsense",
    ],
)
def test_metadata_of_another_kind_is_one_message(tmp_path, config):
    with pytest.raises(InputError) as refused:
        open_lora(write(tmp_path / "lora.safetensors", config))
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 3), (0, 2)), ((0, 3), (4, 0)), ((2, 3), (4, 3)), ((2,), (4, 2)), ((2, 0), (4, 2)), ((), ())],
)
def test_matrices_that_do_not_fit_or_are_empty_are_refused(tmp_path, a, b):
    path = write(tmp_path / "lora.safetensors", None, a=a, b=b)
    assert command("info", path) == 2


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool])
def test_numbers_of_another_kind_are_refused(tmp_path, dtype):
    path = tmp_path / "lora.safetensors"
    save_file(
        {
            f"{MODULE}.lora_A.weight": torch.ones(2, 3, dtype=dtype),
            f"{MODULE}.lora_B.weight": torch.ones(4, 2),
        },
        path,
    )
    with pytest.raises(InputError, match="which no LoRA does"):
        open_lora(path)


def test_a_strength_that_overflows_is_refused(tmp_path):
    b = torch.full((4, 2), 3e38)
    path = write(tmp_path / "lora.safetensors", {"lora_alpha": 1e6}, **{f"{MODULE}.lora_B.weight": b})
    with pytest.raises(InputError, match="overflows"):
        open_lora(path)


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "dora_scale"])
@pytest.mark.parametrize("shape", [(3,), (), (4, 0)])
def test_lengths_of_a_dora_that_are_not_its_rows_are_refused(tmp_path, name, shape):
    path = write(tmp_path / "lora.safetensors", None, **{f"{MODULE}.{name}": torch.ones(shape)})
    with pytest.raises(InputError):
        open_lora(path)


def test_metadata_of_a_hundred_megabytes_is_read_or_refused_in_bounded_memory(tmp_path):
    header = {"__metadata__": {METADATA_KEY: " " * (90 << 20) + "{}"}}
    text = json.dumps(header).encode()
    path = tmp_path / "lora.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    code = """
        from acestep_ray.errors import InputError
        from acestep_ray.export.reading import open_lora
        try:
            open_lora(Path(sys.argv[1]))
        except InputError as error:
            print("refused")
    """
    imports = "from pathlib import Path\nimport acestep_ray.export.reading"
    assert "refused" in run(code, path, imports=imports)


def test_many_keys_of_other_files_are_not_loaded(tmp_path):
    """The names are looked at first: a whole model is refused without its weights in memory."""
    path = tmp_path / "model.safetensors"
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2**32)  # takes no room on disk
    assert command("info", path) == 2


def test_info_shows_metadata_that_is_deep_or_long(tmp_path):
    path = tmp_path / "lora.safetensors"
    tensors = {f"{MODULE}.lora_A.weight": torch.ones(2, 3), f"{MODULE}.lora_B.weight": torch.ones(4, 2)}
    metadata = {"deep": "[" * 900 + "]" * 900, "deeper": "[" * 10**5, "digits": "9" * 5000}
    save_file(
        tensors, path, metadata | {f"k{i}": "v" for i in range(1000)} | {"acestep_ray_training": "[" * 10**5}
    )
    assert len(info(str(path)).render().splitlines()) < 150
    assert json.loads(info(str(path), as_json=True).render())["modules"]


# --- a user's own configuration ----------------------------------------------------------------------------


@pytest.fixture
def model():
    with torch.device("meta"):
        return ACEStepTransformer(TransformerConfig(num_layers=1, ssl_encoder_depths=(0, 0)))


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
)
def test_a_regular_expression_of_a_configuration_has_seconds(model, field, monkeypatch):
    monkeypatch.setattr(bounded_patterns, "SECONDS", 1)
    slow = "((t|r|a|n|s|f|o|r|m|e|r|_|b|l|o|c|k|s|.)+)+!"
    config = {
        "r": 1,
        "target_modules": ["to_q"],
        field: {slow: 1} if field.endswith("k_pattern") or field == "alpha_pattern" else slow,
    }
    if field == "layers_pattern":
        config["layers_to_transform"] = 0
    with pytest.raises(InputError, match=f"`{field}` takes longer than"):
        add_lora(model, config)


def test_regular_expressions_of_peft_still_mean_the_same(model):
    config = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": r"(?!.*cross).*\.to_[qk]",
        "rank_pattern": {r".*blocks\.\d+\.attn\.to_q": 1, "to_q|to_k": 2},
        "alpha_pattern": {"to_.": 8},
    }
    trained = add_lora(model, config)
    assert trained
    assert not any("cross" in name for name in trained)
    layer = model.get_submodule(MODULE)
    assert (layer.r, layer.scaling) == ({"lora_adapter": 1}, {"lora_adapter": 8.0})
    layer = model.get_submodule("transformer_blocks.0.attn.to_k")
    assert (layer.r, layer.scaling) == ({"lora_adapter": 2}, {"lora_adapter": 4.0})


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 10**400},
        {"r": 10**400},
        {"target_modules": "(" * 5000},
        {"target_modules": "a" * 30_000},
        {"target_modules": "a{99999999999999999999}"},
        {"rank_pattern": {"[": 1}},
        {"alpha_pattern": {"to_q": 10**400}},
    ],
)
def test_a_configuration_with_values_that_cannot_be_is_one_message(tmp_path, model, fields):
    path = tmp_path / "lora_config.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError):
        add_lora(model, read_lora_config(path))
