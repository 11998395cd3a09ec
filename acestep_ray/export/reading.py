"""Reading a LoRA, in whichever form a program has written it, into what it makes of each module's weight.

`keys.py` knows the spellings of other programs. A file that is none of theirs is refused before anything is done with
it; pickles are never opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acestep_ray.errors import InputError
from acestep_ray.export.keys import module_name, parse_key
from acestep_ray.export.names import is_module
from acestep_ray.foreign_files import FIRST_BYTES, start_of_impostor
from acestep_ray.paths import expand_home
from acestep_ray.plain_files import JSON
from acestep_ray.plain_text import read_utf8

LORA_FILE = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

# PEFT's ways to begin that take a part out of the base model's weights: such matrices fit no released model.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
# PyTorch's zip archive, and pickle's own first byte.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
_DOWNLOAD_AGAIN = "copy or download it again"

# Parts of keys that no LoRA has, and what they say of a file.
_MERGE = "only LoRA and DoRA are read: merge it with the program that made it"
_OTHER_KINDS = (
    ("lokr_", f"this is a LoKr; {_MERGE}"),
    ("hada_", f"this is a LoHa; {_MERGE}"),
    ("oft_", f"this is an OFT; {_MERGE}"),
    ("ia3_", f"this is an (IA)³; {_MERGE}"),
    ("vera_lambda", f"this is a VeRA; {_MERGE}"),
    (".glora", f"this is a GLoRA; {_MERGE}"),
    (".lora_mid.", f"this is a LoRA with a third matrix (Tucker); {_MERGE}"),
    (".diff", f"this holds whole differences of weights (`.diff`), not a LoRA; {_MERGE}"),
    ("lora_B.bias", "a LoRA with biases changes more than a LoRA file can hold for other programs"),
    ("lora_bias", "a LoRA with biases changes more than a LoRA file can hold for other programs"),
    (
        ".lora_A.",
        f"these are a model's own parameters, without their scale: give the checkpoint's {LORA_FILE}",
    ),
)
_KIND_MARKS = tuple(part for part, _ in _OTHER_KINDS)
_NO_LORA = "give a LoRA of ACE-Step v1; docs/export.md lists the keys that are read"
_LORA_MARKS = ("lora", "alpha", "dora", "magnitude")


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

    def norm(self) -> float:
        """The Frobenius norm of B A, of which no product of full size is made."""
        a, b = self.a.double(), self.b.double()
        # Rounding can make the squared norm of next to nothing negative.
        return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()

    def apply(self, weight: Tensor) -> Tensor:
        """The changed weight (out, in) in float32, at strength 1, on the device of `weight` (out, in)."""
        changed = weight.to(torch.float32) + self.b.to(weight.device) @ self.a.to(weight.device)
        if self.magnitude is None:
            return changed
        return changed * (self.magnitude.to(weight.device) / changed.norm(dim=1))[:, None]


def sha256_of(updates: Mapping[str, LoraUpdate]) -> str:
    """SHA-256, in hex, over what a LoRA changes, whatever file it came from."""
    digest = hashlib.sha256()
    for name, update in sorted(updates.items()):
        for part in ("a", "b", "magnitude"):
            tensor = getattr(update, part)
            if tensor is not None:
                digest.update(f"{name} {part} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it was read."""

    path: Path
    updates: dict[str, LoraUpdate]
    """By module, with dots in the names; sorted."""
    scales: dict[str, float]
    """What the file multiplies each B A with, alpha / rank or with rsLoRA alpha / √rank; in the updates already."""
    scale_source: str | None
    """Where it says so: `alpha`, `metadata`, `adapter_config.json`; None where it says nothing and 1 is meant."""
    example: str
    """One of its keys, as it is written."""
    dtypes: tuple[str, ...]
    metadata: dict[str, str]
    num_bytes: int
    place: str
    """What it is called to the user: its path, or the URL that it was fetched from."""

    @property
    def is_dora(self) -> bool:
        """Whether any module's rows have lengths of their own."""
        return any(update.magnitude is not None for update in self.updates.values())


def find_lora_file(path: str | Path) -> Path:
    """The LoRA file that `path` names: itself, or the one in that directory. Raises InputError."""
    path = Path(expand_home(os.fspath(path)))
    if path.is_file():
        return path
    for name in (LORA_FILE, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    named = sorted(file.parent.name for file in path.glob(f"*/{LORA_FILE}"))
    if named:
        raise InputError(
            "no such LoRA",
            where=str(path),
            fix=f"this directory holds several, give one: {', '.join(str(path / name) for name in named)}",
        )
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    pickles = sorted(file for file in path.glob("*") if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise _pickle_error(pickles[0])
    raise InputError(
        "no such LoRA",
        where=str(path),
        fix=f"give a {LORA_FILE} file or a directory that holds one, or a PEFT adapter's directory with {PEFT_FILE}"
        if len(files) < 2
        else f"this directory holds several files, give one: {', '.join(file.name for file in files[:5])}",
    )


def read_lora(path: Path) -> dict[str, LoraUpdate]:
    """What a LoRA file says, by module. Raises what `open_lora` raises."""
    return open_lora(path).updates


def open_lora(path: Path) -> LoraFile:
    """Read a LoRA file: our own, the original trainer's, ComfyUI's, kohya's, or PEFT's with its configuration.

    The strength of B A is taken from an alpha tensor, else from the metadata or configuration (`lora_alpha`,
    `alpha_pattern`, `use_rslora`), else it is 1. Raises InputError for a file that is no whole LoRA.
    """
    _check_is_safetensors(path)
    tensors, metadata = _read_tensors(path)
    config, source = _read_config(path, metadata)
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        parsed = parse_key(key)
        if parsed is None:
            unknown.append(key)
            continue
        name, part = parsed
        if part in modules.setdefault(name, {}):
            raise InputError(f"`{name}` has {part} twice in the LoRA", where=str(path))
        modules[name][part] = tensor.to(torch.float32)
    if unknown or not modules:
        raise _not_a_lora(path, tensors, unknown)
    modules = dict(sorted(modules.items()))
    _check_parts(modules, config, path)
    scales = {name: _scale(name, parts, config, path) for name, parts in modules.items()}
    if any("alpha" in parts for parts in modules.values()):
        source = "alpha"
    return LoraFile(
        path=path,
        updates={name: _update(parts, scales[name]) for name, parts in modules.items()},
        scales=scales,
        scale_source=source,
        example=next(key for key in sorted(tensors) if not key.endswith(".alpha")),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        metadata=metadata,
        num_bytes=path.stat().st_size,
        place=str(path),
    )


def _not_a_lora(path: Path, keys: Collection[str], unknown: Sequence[str]) -> InputError:
    """The error for a file with keys that are no LoRA's: another kind of adapter, a whole model, or neither."""
    if unknown and not any(mark in key.lower() for key in keys for mark in (*_LORA_MARKS, *_KIND_MARKS)):
        of_v1 = any(is_module(module_name(key.rpartition(".")[0])) for key in keys)
        return InputError(
            f"this is a model's weights, not a LoRA: its {len(keys)} keys are {some(unknown)}",
            where=str(path),
            fix="`acestep-ray export extract --finetuned_path FOLDER` makes a LoRA of a fine-tuned model, and "
            "`acestep-ray generate --transformer_path FOLDER` plays it"
            if of_v1
            else _NO_LORA,
        )
    fixes = [fix for part, fix in _OTHER_KINDS if any(part in key for key in unknown)]
    return InputError(
        "not a LoRA file with `lora_A` and `lora_B` weights: it "
        + (f"has {some(unknown)} among its {len(keys)} keys" if unknown else "holds no tensors"),
        where=str(path),
        fix=(fixes or [_NO_LORA])[0],
    )


def some(names: Iterable[str]) -> str:
    """The first two names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(f"`{name}`" for name in names[:2]) + more


def _check_is_safetensors(path: Path) -> None:
    """Raise InputError for a file that is not in the format, with what it seems to be; reads its first bytes."""
    try:
        with open(path, "rb") as file:
            start = file.read(FIRST_BYTES)
    except OSError as error:
        raise InputError(f"cannot read the LoRA ({error.strerror or error})", where=str(path)) from None
    if not start:
        raise InputError("the LoRA file is empty", where=str(path), fix=_DOWNLOAD_AGAIN)
    # Eight bytes are the length of the header, which may begin as a pickle does; the header is JSON.
    if start[8:9] == b"{":
        return
    if path.suffix in _PICKLE_SUFFIXES or start.startswith(_PICKLE_STARTS):
        raise _pickle_error(path)
    if found := start_of_impostor(start, path):
        raise InputError(f"this is {found.what}", where=str(path), fix=found.fix)
    if len(start) > 8:
        raise InputError("not a safetensors file", where=str(path), fix=_NO_LORA)


def _pickle_error(path: Path) -> InputError:
    return InputError(
        "a pickle is not opened, for it can run any program",
        where=str(path),
        fix='where you trust it, make a safetensors file of it: python -c "import torch, safetensors.torch; '
        f"safetensors.torch.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')\"",
    )


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the LoRA file is cut short or damaged ({error})", where=str(path), fix=_DOWNLOAD_AGAIN
        ) from None


def _read_config(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], str | None]:
    """The fields of PEFT's `LoraConfig` that the LoRA was trained with, as far as they are known, and their place."""
    described, source = metadata.get(METADATA_KEY), "metadata"
    if path.name == PEFT_FILE:
        source = PEFT_CONFIG
        try:
            described = read_utf8(path.with_name(PEFT_CONFIG), JSON)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"cannot read the adapter's {PEFT_CONFIG}, which says how strong it is ({error})",
                where=str(path),
            ) from None
    if described is None:
        return {}, None
    try:
        config = json.loads(described)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"the LoRA's metadata is not JSON ({error})", where=str(path)) from None
    if not isinstance(config, dict):
        raise InputError("the LoRA's metadata is not a JSON object", where=str(path))
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    kind = str(config.get("peft_type") or "LORA").rpartition(".")[2]
    if kind.upper() != "LORA":
        raise InputError(f"the adapter is of PEFT's type {kind}, not a LoRA", where=str(path), fix=_MERGE)
    if isinstance(alphas := config.get("alpha_pattern"), dict):
        config["alpha_pattern"] = {module_name(name): alpha for name, alpha in alphas.items()}
    begun = config.get("init_lora_weights")
    if str(begun).startswith(_CHANGES_BASE):
        raise InputError(
            f"this LoRA belongs to a model changed by `init_lora_weights: {begun}`, not to the released one",
            where=str(path),
            fix="save it with PEFT's `path_initial_model_for_weight_conversion`",
        )
    return config, source if "lora_alpha" in config else None


def _check_parts(modules: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], path: Path) -> None:
    """Raise InputError for a module whose tensors are no whole LoRA, or hold numbers that are not finite."""
    for name, parts in modules.items():
        if "lora_A" not in parts or "lora_B" not in parts:
            raise InputError(f"`{name}` has only {' and '.join(sorted(parts))} in the LoRA", where=str(path))
        a, b = parts["lora_A"], parts["lora_B"]
        # A convolution's matrices have further dimensions; its B is 1 × 1.
        if a.ndim < 2 or b.ndim < 2 or b[0].numel() != a.shape[0]:
            raise InputError(
                f"the two matrices of `{name}` do not have the same rank: "
                f"A is {tuple(a.shape)}, B is {tuple(b.shape)}",
                where=str(path),
            )
        if "dora_scale" in parts and parts["dora_scale"].shape[0] != parts["dora_scale"].numel():
            raise InputError(
                f"`{name}.dora_scale` is {tuple(parts['dora_scale'].shape)}, not a length for each row: "
                "this is a DoRA in kohya's form over columns",
                where=str(path),
                fix=_MERGE,
            )
        if not {"lora_magnitude_vector", "dora_scale"} & parts.keys() and config.get("use_dora"):
            raise InputError(f"`{name}` has no `lora_magnitude_vector`, and this is a DoRA", where=str(path))
        if "alpha" in parts and parts["alpha"].numel() != 1:
            raise InputError(f"`{name}.alpha` is not one number in the LoRA", where=str(path))
    broken = [name for name, parts in modules.items() if not all(p.isfinite().all() for p in parts.values())]
    if broken:
        raise InputError(
            f"the LoRA has NaN or infinite weights in {some(broken)}, of {len(modules)} modules",
            where=str(path),
            fix="take an earlier checkpoint of the run that made it",
        )


def _update(parts: Mapping[str, Tensor], scale: float) -> LoraUpdate:
    magnitude = parts.get("lora_magnitude_vector", parts.get("dora_scale"))
    a, b = (parts[key].flatten(1) for key in ("lora_A", "lora_B"))
    return LoraUpdate(a, b * scale, None if magnitude is None else magnitude.flatten())


def _scale(name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> float:
    rank = parts["lora_A"].shape[0]
    if "alpha" in parts:
        return parts["alpha"].item() / rank
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.get("lora_alpha", rank))
    if not isinstance(alpha, (int, float)):
        raise InputError(f"the LoRA's `lora_alpha` is {alpha!r}", where=str(path))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
