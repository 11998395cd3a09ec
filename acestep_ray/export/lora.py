"""The LoRA file that plays at the same strength in every program.

Bare keys (`transformer_blocks.0.attn.to_q.lora_A.weight`), no alpha tensors, and the scale folded into `lora_B`, so
that alpha equals rank: readers that know no alpha, and readers of the metadata, then agree. Matrices have the
dimensions that PEFT gives them in the original model, whose 1 × 1 convolutions are convolutions.

DoRA (Liu et al., 2024, arXiv:2402.09353) adds `lora_magnitude_vector` under PEFT's name. ComfyUI does not read it: for
ComfyUI a DoRA must be merged into the model.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from acestep_ray.errors import InputError
from acestep_ray.models.transformer import PointwiseConv

ADAPTER_NAME = "lora_adapter"
"""The only adapter's name, where the configuration names none; as in the original trainer."""

LORA_FILE = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

# The prefixes and names of PEFT, diffusers' pipelines and ComfyUI.
_KEY = re.compile(
    r"(?:base_model\.model\.|transformer\.|diffusion_model\.)?(?P<module>.+)"
    r"\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora_magnitude_vector|alpha)(?:\.weight)?"
)
_PARTS = {"lora_down": "lora_A", "lora_up": "lora_B"}
# PEFT's ways to begin that take a part out of the base model's weights: such matrices fit no released model.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraUpdate:
    """What a LoRA makes of one module's weight W (out, in): W + B A, and with DoRA each row at a length of its own."""

    a: Tensor
    """(rank, in), float32."""
    b: Tensor
    """(out, rank), float32, with the scale in it."""
    magnitude: Tensor | None
    """The lengths of DoRA's rows (out,), float32; None without DoRA."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it fits."""
        return self.b.shape[0], self.a.shape[1]

    def apply(self, weight: Tensor) -> Tensor:
        """The changed weight (out, in) in float32, at strength 1, on the device of `weight` (out, in)."""
        changed = weight.to(torch.float32) + self.b.to(weight.device) @ self.a.to(weight.device)
        if self.magnitude is None:
            return changed
        return changed * (self.magnitude.to(weight.device) / changed.norm(dim=1))[:, None]


def lora_layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoraLayer]:
    """The LoRA layers of a model, all or those with this adapter, by the name of the module they sit on."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter is None or adapter in module.lora_A)
    }


def lora_state(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The adapter's matrices with the scale folded in, under bare keys, float32 on the CPU."""
    state = {}
    for name, layer in lora_layers(model, adapter).items():
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight * layer.scaling[adapter]
        magnitude = (
            layer.lora_magnitude_vector[adapter].weight if adapter in layer.lora_magnitude_vector else None
        )
        if isinstance(layer.get_base_layer(), PointwiseConv):
            a, b = a[..., None], b[..., None]
            magnitude = None if magnitude is None else magnitude[None, :, None]
        state |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        if magnitude is not None:
            state[f"{name}.lora_magnitude_vector"] = magnitude
    return {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in state.items()}


def lora_bytes(model: nn.Module, adapter: str) -> bytes:
    """The adapter as a `pytorch_lora_weights.safetensors` file."""
    layers = lora_layers(model, adapter)
    ranks = {name: layer.r[adapter] for name, layer in layers.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {name: rank for name, rank in ranks.items() if rank != common}
    # What the file holds, not what was trained: the scale is folded, so alpha is the rank and rsLoRA is off.
    metadata = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "use_rslora": False,
        "use_dora": any(adapter in layer.lora_magnitude_vector for layer in layers.values()),
        "bias": "none",
        "target_modules": sorted(layers),
        "rank_pattern": others,
        "alpha_pattern": others,
    }
    return save(
        lora_state(model, adapter), {"format": "pt", METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    )


def lora_files(model: nn.Module) -> dict[str, bytes]:
    """The LoRA files of all adapters, by name within a checkpoint's folder: `NAME/…` where adapters have names."""
    adapters = dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.lora_A)
    return {
        LORA_FILE if name == ADAPTER_NAME else f"{name}/{LORA_FILE}": lora_bytes(model, name)
        for name in adapters
    }


def write_lora(directory: Path, model: nn.Module, adapter: str) -> Path:
    """Write the adapter as `pytorch_lora_weights.safetensors` into `directory`; returns the file."""
    path = directory / LORA_FILE
    path.write_bytes(lora_bytes(model, adapter))
    return path


def find_lora_file(path: str | Path) -> Path:
    """The LoRA file that `path` names: itself, or the one in that directory, ours or PEFT's. Raises InputError."""
    path = Path(path)
    if path.is_file():
        return path
    for name in (LORA_FILE, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    named = sorted(file.parent.name for file in path.glob(f"*/{LORA_FILE}"))
    raise InputError(
        "no such LoRA",
        where=str(path),
        fix=f"this directory holds several, give one: {', '.join(str(path / name) for name in named)}"
        if named
        else f"give a {LORA_FILE} file or a directory that holds one, or a PEFT adapter's directory with {PEFT_FILE}",
    )


@torch.no_grad()
def merge_lora(model: nn.Module, path: str | Path, weight: float = 1.0) -> None:
    """Change the model's own weights as a LoRA file says: W + weight · (W' − W), where W' is W + B A, or DoRA's.

    Several are merged one after the other; a DoRA must come first, for its rows' lengths are those of the released
    weights. Raises InputError for a file that is no LoRA, or is one for another model.
    """
    path = find_lora_file(path)
    parameters = dict(model.named_parameters())
    updates = read_lora(path)
    for name, update in updates.items():
        parameter = parameters.get(f"{name}.weight")
        if parameter is None:
            raise InputError(f"`{name}` is not a module of this model", where=str(path))
        check_fits(name, update, (parameter.shape[0], parameter[0].numel()), path)
    for name, update in updates.items():
        parameter = parameters[f"{name}.weight"]
        before = parameter.flatten(1).to(torch.float32)
        after = before + weight * (update.apply(before) - before)
        parameter.copy_(after.view_as(parameter))


def check_fits(name: str, update: LoraUpdate, size: tuple[int, int], path: Path) -> None:
    """Raise InputError when a LoRA was made for a module of another size than `size`, (out, in)."""
    if update.shape != size:
        raise InputError(
            f"`{name}` is {size} in the model, and {update.shape} in the LoRA",
            where=str(path),
            fix="use the checkpoint that the LoRA was trained on",
        )


def read_lora(path: Path) -> dict[str, LoraUpdate]:
    """What a LoRA file says, by module: our own, the original trainer's, ComfyUI's, or PEFT's with its configuration.

    The strength of B A is taken from an alpha tensor, else from the metadata or configuration (`lora_alpha`,
    `alpha_pattern`, `use_rslora`), else it is 1. Raises InputError for a file that is no LoRA.
    """
    tensors, config = _read(path)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(
                f"not a LoRA file with `lora_A` and `lora_B` weights: it has `{key}`", where=str(path)
            )
        parts = modules.setdefault(match["module"], {})
        parts[_PARTS.get(match["part"], match["part"])] = tensor.to(torch.float32)
    if not modules:
        raise InputError("not a LoRA file with `lora_A` and `lora_B` weights: it is empty", where=str(path))
    return {name: _update(name, parts, config, path) for name, parts in modules.items()}


def _update(name: str, parts: dict[str, Tensor], config: dict, path: Path) -> LoraUpdate:
    if "lora_A" not in parts or "lora_B" not in parts:
        raise InputError(f"`{name}` has only {' and '.join(sorted(parts))} in the LoRA", where=str(path))
    # A convolution's matrices have further dimensions; its B is 1 × 1.
    a, b = (parts[key].flatten(1) for key in ("lora_A", "lora_B"))
    rank = a.shape[0]
    if b.shape[1] != rank:
        raise InputError(f"the two matrices of `{name}` do not have the same rank", where=str(path))
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is None and config.get("use_dora"):
        raise InputError(f"`{name}` has no `lora_magnitude_vector`, and this is a DoRA", where=str(path))
    scale = parts["alpha"].item() / rank if "alpha" in parts else _scale(config, name, rank, path)
    return LoraUpdate(a, b * scale, None if magnitude is None else magnitude.flatten())


def _scale(config: dict, name: str, rank: int, path: Path) -> float:
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas.keys(), name), config.get("lora_alpha", rank))
    if not isinstance(alpha, (int, float)):
        raise InputError(f"the LoRA's `lora_alpha` is {alpha!r}", where=str(path))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors, and the fields of PEFT's `LoraConfig` that they were trained with, as far as they are known."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            described = (file.metadata() or {}).get(METADATA_KEY, "{}")
        if path.name == PEFT_FILE:
            described = path.with_name(PEFT_CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        raise InputError(f"cannot read the LoRA ({error})", where=str(path)) from None
    try:
        config = json.loads(described)
    except json.JSONDecodeError as error:
        raise InputError(f"the LoRA's metadata is not JSON ({error})", where=str(path)) from None
    if not isinstance(config, dict):
        raise InputError("the LoRA's metadata is not a JSON object", where=str(path))
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    begun = config.get("init_lora_weights")
    if str(begun).startswith(_CHANGES_BASE):
        raise InputError(
            f"this LoRA belongs to a model changed by `init_lora_weights: {begun}`, not to the released one",
            where=str(path),
            fix="save it with PEFT's `path_initial_model_for_weight_conversion`",
        )
    return tensors, config
