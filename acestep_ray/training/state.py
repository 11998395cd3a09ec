"""Training checkpoints: what is trained, the optimizer and the step; never the frozen models.

A checkpoint is a folder `step=N`, local or in object storage. Its `state.json` is written last and lists the other
files with their sizes and SHA-256: a folder without one is not there yet, and a damaged file is found out. It knows
nothing of how many workers wrote it: the first worker writes and reads whole tensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from acestep_ray.errors import AceStepError, InputError
from acestep_ray.foreign_files import FIRST_BYTES, start_of_impostor
from acestep_ray.plain_files import NOTES
from acestep_ray.plain_json import load_json
from acestep_ray.storage import AccessDeniedError, Store
from acestep_ray.training.optim import join_parts, stored_parts
from acestep_ray.training.validation import FIXED_NOISE, VALIDATION

WEIGHTS_FILE = "trainable.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
FORMAT = 2
# Tensors beyond these bytes go into further files, `trainable-1.safetensors`: only one file is in memory twice.
_FILE_BYTES = 2 << 30
_MOST = 2**53

# Storage that fails now and then is asked again; what time does not mend is not.
_RETRY_AFTER_SECONDS = (1.0, 4.0, 15.0)
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


@dataclass
class TrainingState:
    """Everything that a run needs to go on, besides weights and moments."""

    step: int
    """Optimizer steps done."""
    losses: dict[str, Any]
    """What the run's summary says of its losses so far: `first`, `last`, and those over fixed noise by step."""
    loss_scale: dict[str, Any] = field(default_factory=dict)
    """State of the gradient scaler, of a run in float16."""


@dataclass
class Snapshot:
    """Whole tensors on the CPU that training does not change any more."""

    weights: dict[str, Tensor]
    """What is trained, by parameter."""
    moments: dict[str, Tensor]
    """The optimizer's state, by `parameter/key`; a moment in 8 bits has several, `parameter/key/part`."""
    files: dict[str, bytes]
    """What other programs load, by file name."""


class DamagedCheckpointError(Exception):
    """A checkpoint whose files are not what was written."""


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def take_snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, files: Mapping[str, bytes]
) -> Snapshot | None:
    """Copy what is trained and its moments; all workers call it where parameters are sharded, the first gets them."""
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0

    def copied(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors:
            whole = tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
            if is_first:
                copies[name] = whole.to("cpu", copy=True).contiguous()
        return copies

    parameters = trainable_parameters(model)
    weights = copied(iter(parameters.items()))
    moments = copied(
        (f"{name}/{part}", tensor)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        for part, tensor in stored_parts(key, value).items()
    )
    return Snapshot(weights, moments, dict(files)) if is_first else None


def locate_checkpoint(path: str) -> tuple[Store, int]:
    """The folder of checkpoints and the step that `.../step=N`, or a folder of those, means.

    Raises InputError where there is none.
    """
    fix = "give EXP/checkpoints/step=N of a run, or EXP/checkpoints for its last one"
    store = Store.at(path)
    if named := re.fullmatch(r"(.*?)/?step=(\d+)", store.url):
        store, step = Store.at(named[1]), int(named[2])
        if step in Checkpoints(store).steps():
            return store, step
    elif steps := Checkpoints(store).steps():
        return store, steps[-1]
    raise InputError("no checkpoint here", where=f"--ckpt_path {path}", fix=fix)


class Checkpoints:
    """The checkpoints of one run. Only one process saves; each is written while training goes on."""

    def __init__(self, store: Store, *, keep_last: int = 0):
        """`keep_last` of them are kept, and the one with the lowest validation loss; 0 keeps all."""
        self.store = store
        self.keep_last = keep_last
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def steps(self) -> list[int]:
        """The steps of all checkpoints that are there whole, ascending."""
        names = (re.fullmatch(rf"step=(\d+)/{STATE_FILE}", name) for name in self.store.names())
        return sorted(int(name[1]) for name in names if name)

    def folder(self, step: int) -> Store:
        """Where the checkpoint of a step lies."""
        return self.store.child(f"step={step}")

    def read_state(self, step: int) -> dict[str, Any]:
        """What `state.json` of a checkpoint says.

        Raises DamagedCheckpointError, and AceStepError for a format of another version.
        """
        try:
            values = load_json(self.folder(step).read_bytes(STATE_FILE, NOTES))
            if values["format"] != FORMAT:
                found = str(values["format"])[:40]
                raise AceStepError(
                    f"{self.folder(step).url} has the format {found}, this version reads {FORMAT}\n"
                    "  → go on with the version that wrote it, or use another --exp_name"
                )
            if values["step"] != step:
                raise DamagedCheckpointError(f"{STATE_FILE} belongs to another step")
            _check_state(values)
            return values
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpointError(f"{STATE_FILE} does not read ({error})") from None

    def latest_state(self) -> dict[str, Any] | None:
        """What the last checkpoint that reads says of itself; None where there is none."""
        for step in reversed(self.steps()):
            try:
                return self.read_state(step)
            except DamagedCheckpointError:
                continue
        return None

    def read_latest(
        self, model: nn.Module, warn: Callable[[str], None]
    ) -> tuple[TrainingState, Snapshot] | None:
        """The last checkpoint, for the parameters that `model` trains; None where there is none.

        A damaged one is told of and the one before it taken. Raises AceStepError where all are damaged, and for one
        that was written for other parameters or by another version.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.read(step, model)
            except DamagedCheckpointError as error:
                warn(f"warning: the checkpoint of step {step} is damaged and not used: {error}")
        if steps:  # to start over would write over what can perhaps be mended
            raise AceStepError(
                f"none of the {len(steps)} checkpoints in {self.store.url} can be used\n"
                "  → mend the storage, or delete them to start over, or use another --exp_name"
            )
        return None

    def read(self, step: int, model: nn.Module) -> tuple[TrainingState, Snapshot]:
        """The checkpoint of a step, for the parameters that `model` trains, without the files for other programs.

        Raises what `read_state` raises, and AceStepError for one that was written for other parameters.
        """
        values = self.read_state(step)
        weights, moments = (
            self._read_tensors(step, name, values["files"]) for name in (WEIGHTS_FILE, OPTIMIZER_FILE)
        )
        self._check_names(step, weights, trainable_parameters(model))
        state = TrainingState(step, values["losses"], values.get("loss_scale", {}))
        return state, Snapshot(weights, moments, {})

    def read_weights(self, step: int) -> dict[str, Tensor]:
        """What a checkpoint's run had trained, by parameter. Raises what `read_state` raises."""
        return self._read_tensors(step, WEIGHTS_FILE, self.read_state(step)["files"])

    def save(self, snapshot: Snapshot, state: TrainingState) -> Store:
        """Write a checkpoint in the background; returns where.

        Raises AceStepError when the one before could not be written.
        """
        self.finish()
        values = {
            "format": FORMAT,
            "step": state.step,
            "losses": json.loads(json.dumps(state.losses)),
            "loss_scale": dict(state.loss_scale),
        }
        self._pending = self._writer.submit(self._write, snapshot, values)
        return self.folder(state.step)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises AceStepError when it could not be."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, snapshot: Snapshot, values: dict[str, Any]) -> None:
        step = values["step"]
        for wait in (*_RETRY_AFTER_SECONDS, None):
            try:
                self._write_once(snapshot, values)
                self._forget_old()
                break
            except (OSError, AceStepError) as error:
                lasting = isinstance(error, AccessDeniedError) or getattr(error, "errno", None) in _LASTING
                if wait is None or lasting:
                    kept = self.steps()
                    raise AceStepError(
                        f"the checkpoint of step {step} cannot be written to {self.store.url}: {error}\n"
                        f"  → make room or mend the storage; the same command goes on from "
                        f"{f'step {kept[-1]}' if kept else 'the start'}"
                    ) from error
                time.sleep(wait)

    def _write_once(self, snapshot: Snapshot, values: dict[str, Any]) -> None:
        folder = self.folder(values["step"])
        folder.delete([STATE_FILE])  # what is written over is not there meanwhile
        files = {}
        for name, data in _serialised(snapshot):
            folder.write_bytes(name, data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        folder.write_bytes(STATE_FILE, json.dumps({**values, "files": files}, indent=1).encode())

    def _forget_old(self) -> None:
        """Delete what is neither among the last nor the best."""
        steps = self.steps()
        if not self.keep_last or len(steps) <= self.keep_last:
            return
        best = best_step((self.latest_state() or {"losses": {}})["losses"], steps)
        for step in steps[: -self.keep_last]:
            if step != best:
                folder = self.folder(step)
                folder.delete([STATE_FILE])
                folder.delete(folder.names())

    def _read_tensors(self, step: int, name: str, files: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for number in range(len(files)):
            part = _part_name(name, number)
            if part not in files and number:
                break
            try:
                data = self.folder(step).read_bytes(part)
            except FileNotFoundError:
                raise DamagedCheckpointError(f"{part} is missing") from None
            if hashlib.sha256(data).hexdigest() != files.get(part, {}).get("sha256"):
                found = start_of_impostor(data[:FIRST_BYTES], part)
                raise DamagedCheckpointError(f"{part} is {found.what if found else 'not what was written'}")
            try:
                tensors |= load(data)
            except SafetensorError as error:
                raise DamagedCheckpointError(f"{part} does not read ({error})") from None
        return tensors

    def _check_names(
        self, step: int, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> None:
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        if shapes != expected:
            different = sorted(set(shapes.items()) ^ set(expected.items()))
            raise AceStepError(
                f"{self.folder(step).url} was written for other trained parameters, such as `{different[0][0]}`\n"
                "  → use another --exp_name, or the LoRA configuration that the run was started with"
            )


def _check_state(values: Mapping[str, Any]) -> None:
    """Raise ValueError or KeyError where `state.json` does not hold what `Checkpoints.save` writes."""
    files, losses = values["files"], values["losses"]
    if not isinstance(files, dict) or not all(isinstance(noted, dict) for noted in files.values()):
        raise ValueError("`files` are no files with sizes and sums")
    if not all(isinstance(noted.get("sha256"), str) for noted in files.values()):
        raise ValueError("a file has no SHA-256")
    for name in files:
        if "\0" in name or name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"it names a file outside its folder, {name!r}")
    if not isinstance(losses, dict) or not isinstance(values.get("loss_scale", {}), dict):
        raise ValueError("`losses` and `loss_scale` are no objects")
    for name in (VALIDATION, FIXED_NOISE):
        by_step = losses.get(name) or {}
        if not isinstance(by_step, dict) or not all(map(_is_loss_of_step, by_step.items())):
            raise ValueError(f"the losses `{name}` are no numbers by step")


def _is_loss_of_step(item: tuple[str, Any]) -> bool:
    step, loss = item
    is_number = isinstance(loss, float) or (isinstance(loss, int) and abs(loss) < _MOST)
    return re.fullmatch(r"[0-9]{1,18}", step) is not None and is_number


def best_step(losses: Mapping[str, Any], steps: Sequence[int]) -> int | None:
    """The step among `steps` with the lowest validation loss, of held-out songs if there are any; None without one.

    A loss that is not finite is none.
    """
    by_step = losses.get(VALIDATION) or losses.get(FIXED_NOISE) or {}
    measured = {step: by_step[str(step)] for step in steps if math.isfinite(by_step.get(str(step), math.nan))}
    return min(measured, key=lambda step: (measured[step], step)) if measured else None


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, snapshot: Snapshot | None) -> None:
    """Put a snapshot into `model` and `optimizer`.

    With several workers all call it, the first with the snapshot and the others with None.
    """
    parameters = trainable_parameters(model)
    weights = snapshot.weights if snapshot else {}
    moments = snapshot.moments if snapshot else {}
    for name, parameter in parameters.items():
        _put(parameter, weights.get(name))
    shapes = from_first_worker({name: (tuple(value.shape), value.dtype) for name, value in moments.items()})
    homes = _homes_of_moments(optimizer)
    for name, (shape, dtype) in shapes.items():
        parameter_name, key = name.split("/", 1)
        parameter = parameters[parameter_name]
        moment: Tensor
        if shape == tuple(parameter.shape):
            moment = torch.empty_like(parameter, dtype=dtype)
        else:
            moment = torch.empty(shape, dtype=dtype, device=homes.get(key, parameter.device))
        _put(moment, moments.get(name))
        optimizer.state[parameter][key] = moment
    for parameter in parameters.values():
        if parameter in optimizer.state:
            join_parts(optimizer, parameter)


def _homes_of_moments(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Where state lies that does not lie with its parameter: only the fused kernel counts its steps on the device."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return {} if fused else {"step": "cpu"}


def _put(tensor: Tensor, value: Tensor | None) -> None:
    """Copy `value`, whole and on the first worker, into `tensor` or its shards on every worker."""
    if isinstance(tensor, DTensor):
        mesh, local = tensor.device_mesh, tensor.to_local()
        if value is None:
            value = torch.empty(tensor.shape, dtype=tensor.dtype)
        local.copy_(distribute_tensor(value.to(mesh.device_type), mesh, tensor.placements).to_local())
    elif not _is_distributed():
        assert value is not None, "the only worker is the first"
        tensor.copy_(value)
    else:
        device = _communication_device(tensor)
        everywhere = torch.empty_like(tensor, device=device) if value is None else value.to(device)
        torch.distributed.broadcast(everywhere, src=0)
        tensor.copy_(everywhere)


def _is_distributed() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _communication_device(tensor: Tensor) -> torch.device:
    """Where NCCL wants what it sends."""
    is_nccl = torch.distributed.get_backend() == torch.distributed.Backend.NCCL
    return torch.device("cuda") if is_nccl else tensor.device


def from_first_worker(value: Any) -> Any:
    """The first worker's value, on every worker."""
    if not _is_distributed():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _serialised(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    """The files of a checkpoint, one at a time."""
    for name, tensors in ((WEIGHTS_FILE, snapshot.weights), (OPTIMIZER_FILE, snapshot.moments)):
        for number, part in enumerate(_parts(tensors)):
            yield _part_name(name, number), save(part)
    yield from snapshot.files.items()


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors in parts of at most `_FILE_BYTES`, or one tensor; one part where there is nothing."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > _FILE_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def _part_name(name: str, number: int) -> str:
    return name if number == 0 else name.replace(".", f"-{number}.")
