"""Reading a model's folder: its `config.json` and its weights, in one file or in shards."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from acestep_ray.errors import InputError
from acestep_ray.foreign_files import explained, seems_to_be
from acestep_ray.plain_files import Limit
from acestep_ray.plain_json import load_json
from acestep_ray.plain_text import read_utf8
from acestep_ray.torch_archive import NotTensorsError, check_archive

FIX = "copy it again; what belongs to the released model is downloaded by `acestep-ray checkpoint fetch DIR`"

Model = TypeVar("Model", bound=nn.Module)

# diffusers' and transformers' names; a sharded file has an index beside it. MERT was published as a .bin file.
_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)

# The released tokenizer and indices have a few megabytes.
_MODEL_JSON = Limit(64 << 20, "JSON files of models")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises `InputError` where it is missing or not one."""
    try:
        content = load_json(read_utf8(path, _MODEL_JSON))
    except FileNotFoundError:
        raise InputError("missing file", where=str(path), fix=FIX) from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise InputError("too large for a JSON file of a model", where=str(path), fix=FIX) from None
        reason, fix = explained(path, error, FIX)
        raise InputError(f"cannot read this JSON file ({reason})", where=str(path), fix=fix) from error
    if not isinstance(content, dict):
        raise InputError("this JSON file holds no object", where=str(path), fix=FIX)
    return content


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights of the model in `directory`, an index's shards in its order.

    Raises `InputError` where there are none or a shard is missing.
    """
    for name in _NAMES:
        path = directory / name
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return [path]
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(shard, str) for shard in weight_map.values()
        ):
            raise InputError("no `weight_map` from names to files in this index", where=str(path), fix=FIX)
        names = list(dict.fromkeys(weight_map.values()))
        if elsewhere := [name for name in names if Path(name).name != name or "\0" in name]:
            raise InputError(
                f"this index names weights outside its folder, such as {elsewhere[0]!r}",
                where=str(path),
                fix=FIX,
            )
        shards = [directory / name for name in names]
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent:
            raise InputError(f"missing weight files {', '.join(absent)}", where=str(directory), fix=FIX)
        return shards
    raise InputError(f"no weights (looked for {', '.join(_NAMES)})", where=str(directory), fix=FIX)


def check_weight_file(path: Path) -> None:
    """Raises `InputError` if the header of a safetensors file is broken or the file is cut short; reads no weights.

    Of a `.bin` file it only looks whether it is a file of weights at all.
    """
    if path.suffix != ".safetensors":
        if found := seems_to_be(path):
            raise InputError(
                f"cannot read these weights (it is {found.what})", where=str(path), fix=found.fix
            )
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        reason, fix = explained(path, error, FIX)
        raise InputError(f"cannot read these weights ({reason})", where=str(path), fix=fix) from error


def read_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor, Path]]:
    """Every tensor of the model in `directory` with its name and file, mapped from disk and not yet read.

    Raises `InputError` where a file is broken.
    """
    for path in weight_files(directory):
        check_weight_file(path)
        if path.suffix == ".bin":
            try:
                with open(path, "rb") as file:
                    check_archive(file)
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (
                NotTensorsError,
                pickle.UnpicklingError,
            ):  # torch's own message tells how to run what the file holds
                raise InputError(
                    "this pickle holds more than tensors, which could run any program, and is not opened",
                    where=str(path),
                    fix=FIX,
                ) from None
            except (RuntimeError, OSError, EOFError, ValueError) as error:
                raise InputError(f"cannot read these weights ({error})", where=str(path), fix=FIX) from error
            if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
                raise InputError("this file holds no tensors by name", where=str(path), fix=FIX)
            for name, tensor in tensors.items():
                yield name, tensor, path
            continue
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - safe_open is no dict
                yield name, weights.get_tensor(name), path


def build_on_meta(build: Callable[[], Model], directory: Path) -> Model:
    """What `build` makes from the configuration in `directory`, on the meta device: shapes without memory.

    Raises `InputError` where the configuration makes no model.
    """
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:  # the libraries raise half a dozen kinds for one wrong size
        where = str(directory / "config.json")
        raise InputError(f"this configuration makes no model ({error})", where=where, fix=FIX) from error


def load_weights(
    module: nn.Module,
    directory: Path,
    *,
    dtype: torch.dtype | Callable[[nn.Module], torch.dtype] = torch.float32,
    device: torch.device | str = "cpu",
    rename: Callable[[str], str] = str,
    ignore: Callable[[str], bool] = lambda name: False,
) -> None:
    """Give `module`, built on the meta device, the weights of `directory`, one tensor in memory at a time.

    `dtype` may follow from the module that a tensor belongs to. `rename` turns a name in the file into the module's; a
    name that the module lacks is an error unless `ignore` says otherwise. Raises `InputError` with every missing,
    unexpected or misshapen name.
    """
    expected = module.state_dict(keep_vars=True)
    loaded: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    for stored_name, tensor, path in read_weights(directory):
        name = rename(stored_name)
        if name not in expected:
            if not ignore(stored_name):
                problems.append(f"{stored_name} in {path.name} is unknown to the model")
        elif tensor.shape != expected[name].shape:
            found, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            problems.append(f"{stored_name} in {path.name} has shape {found}, not {wanted}")
            loaded[name] = tensor
        else:
            target = dtype(module.get_submodule(name.rpartition(".")[0])) if callable(dtype) else dtype
            # What is stored in 16 bits travels in 16, and a GPU turns it into others faster than the host.
            loaded[name] = tensor.to(device).to(target)
    # Tied parameters are one object under several names; a file holds them under one name or under all.
    by_object = {id(expected[name]): tensor for name, tensor in loaded.items()}
    for name, parameter in expected.items():
        if name in loaded:
            continue
        if id(parameter) in by_object:
            loaded[name] = by_object[id(parameter)]
        else:
            problems.append(f"{name} is missing")
    if problems:
        shown = problems[:12] + ([f"and {len(problems) - 12} more"] if len(problems) > 12 else [])
        raise InputError(
            "these weights do not fit the model of config.json: " + "; ".join(shown),
            where=str(directory),
            fix="config.json and weights are of different models: copy both from one, of ACE-Step v1",
        )
    module.load_state_dict(loaded, assign=True)
