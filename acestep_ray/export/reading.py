"""Reading a LoRA, in whichever form a program has written it, into what it makes of each module's weight.

`keys.py` knows the spellings of other programs. A file that is none of theirs is refused before anything is done with
it; pickles are never opened.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acestep_ray.errors import InputError
from acestep_ray.export.adapter_config import MERGE, MOST_MODULES, AdapterConfig, read_adapter_config
from acestep_ray.export.adapter_config import METADATA_KEY as METADATA_KEY
from acestep_ray.export.adapter_config import PEFT_CONFIG as PEFT_CONFIG
from acestep_ray.export.adapter_config import PEFT_FILE as PEFT_FILE
from acestep_ray.export.keys import module_name, parse_key
from acestep_ray.export.names import is_module
from acestep_ray.foreign_files import FIRST_BYTES, start_of_impostor
from acestep_ray.paths import expand_home
from acestep_ray.plain_patterns import LONGEST

LORA_FILE = "pytorch_lora_weights.safetensors"

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
# PyTorch's zip archive, and pickle's own first byte.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
# Rank 1024 in every layer of the released model, in float32.
_MOST_BYTES = 16 << 30
_DOWNLOAD_AGAIN = "copy or download it again"

# Parts of keys that no LoRA has, and what they say of a file.
_OTHER_KINDS = (
    ("lokr_", f"this is a LoKr; {MERGE}"),
    ("hada_", f"this is a LoHa; {MERGE}"),
    ("oft_", f"this is an OFT; {MERGE}"),
    ("ia3_", f"this is an (IA)³; {MERGE}"),
    ("vera_lambda", f"this is a VeRA; {MERGE}"),
    (".glora", f"this is a GLoRA; {MERGE}"),
    (".lora_mid.", f"this is a LoRA with a third matrix (Tucker); {MERGE}"),
    (".diff", f"this holds whole differences of weights (`.diff`), not a LoRA; {MERGE}"),
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
    keys, metadata = _read_header(path)
    parsed = {key: parse_key(key) if len(key) <= LONGEST else None for key in keys}
    unknown = [key for key, meaning in parsed.items() if meaning is None]
    if unknown or not keys:
        raise _not_a_lora(path, keys, unknown)
    config = read_adapter_config(path, metadata)
    tensors = _read_tensors(path, keys)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, (name, part) in ((key, meaning) for key, meaning in parsed.items() if meaning is not None):
        if part in modules.setdefault(name, {}):
            raise InputError(f"`{name}` has {part} twice in the LoRA", where=str(path))
        modules[name][part] = _as_numbers(tensors[key], key, path)
    if len(modules) > MOST_MODULES:
        raise InputError(
            f"this LoRA has {len(modules):,} modules, more than any ACE-Step v1 model",
            where=str(path),
            fix=_NO_LORA,
        )
    modules = dict(sorted(modules.items()))
    _check_parts(modules, config, path)
    scales = {name: _scale(name, parts, config) for name, parts in modules.items()}
    has_alphas = any("alpha" in parts for parts in modules.values())
    return LoraFile(
        path=path,
        updates={name: _update(name, parts, scales[name], path) for name, parts in modules.items()},
        scales=scales,
        scale_source="alpha" if has_alphas else config.source,
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


def _read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(
                f"a LoRA of {path.stat().st_size:,} bytes is not read", where=str(path), fix=_NO_LORA
            )
        with safe_open(path, framework="pt") as file:
            return list(file.keys()), file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None


def _read_tensors(path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys}
    # Of a type of numbers that this torch lacks.
    except (OSError, SafetensorError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"the LoRA file is cut short or damaged ({error})", where=str(path), fix=_DOWNLOAD_AGAIN
    )


def _as_numbers(tensor: Tensor, key: str, path: Path) -> Tensor:
    """In float32. Raises InputError for what is neither floats nor, as an alpha may be, whole numbers."""
    is_packed = (
        tensor.is_floating_point() and tensor.element_size() == 1 and "float8" not in str(tensor.dtype)
    )
    if tensor.is_complex() or tensor.dtype is torch.bool or is_packed:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"`{key}` holds {kind}, which no LoRA does", where=str(path), fix=_NO_LORA)
    return tensor.to(torch.float32)


def _check_parts(modules: Mapping[str, Mapping[str, Tensor]], config: AdapterConfig, path: Path) -> None:
    """Raise InputError for a module whose tensors are no whole LoRA, or hold numbers that are not finite."""
    for name, parts in modules.items():
        if "lora_A" not in parts or "lora_B" not in parts:
            raise InputError(f"`{name}` has only {' and '.join(sorted(parts))} in the LoRA", where=str(path))
        a, b = parts["lora_A"], parts["lora_B"]
        # A convolution's matrices have further dimensions; its B is 1 × 1.
        if a.ndim < 2 or b.ndim < 2 or not a.numel() or not b.numel() or b[0].numel() != a.shape[0]:
            raise InputError(
                f"the two matrices of `{name}` do not have the same rank: "
                f"A is {tuple(a.shape)}, B is {tuple(b.shape)}",
                where=str(path),
            )
        scales = parts.get("dora_scale")
        if scales is not None and (scales.ndim == 0 or scales.shape[0] != scales.numel()):
            raise InputError(
                f"`{name}.dora_scale` is {tuple(scales.shape)}, not a length for each row: "
                "this is a DoRA in kohya's form over columns",
                where=str(path),
                fix=MERGE,
            )
        lengths = parts.get("lora_magnitude_vector", scales)
        if lengths is not None and lengths.numel() != b.shape[0]:
            raise InputError(
                f"`{name}` has {lengths.numel()} lengths for the {b.shape[0]} rows of its DoRA",
                where=str(path),
            )
        if not {"lora_magnitude_vector", "dora_scale"} & parts.keys() and config.use_dora:
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


def _update(name: str, parts: Mapping[str, Tensor], scale: float, path: Path) -> LoraUpdate:
    magnitude = parts.get("lora_magnitude_vector", parts.get("dora_scale"))
    a, b = (parts[key].flatten(1) for key in ("lora_A", "lora_B"))
    b = b * scale
    if not b.isfinite().all():
        raise InputError(f"`{name}` overflows at the LoRA's strength of {scale}", where=str(path))
    return LoraUpdate(a, b, None if magnitude is None else magnitude.flatten())


def _scale(name: str, parts: Mapping[str, Tensor], config: AdapterConfig) -> float:
    return config.scale(name, parts["lora_A"].shape[0], parts["alpha"].item() if "alpha" in parts else None)
