"""Training checkpoints: what is trained, the optimizer and the step; never the frozen models.

A checkpoint is a folder `step=N`, local or in object storage. Its `state.json` is written last and lists the other
files with their sizes and SHA-256: a folder without one is not there yet, and a damaged file is found out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from acestep_ray.errors import AceStepError
from acestep_ray.export.lora import LORA_FILE, lora_bytes
from acestep_ray.storage import AccessDeniedError, Store
from acestep_ray.training.lora import ADAPTER_NAME

WEIGHTS_FILE = "trainable.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
FORMAT = 2
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")

# Storage that fails now and then is asked again; what time does not mend is not.
_RETRY_AFTER_SECONDS = (1.0, 4.0, 15.0)
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


@dataclass
class TrainingState:
    """Everything that a run needs to go on."""

    step: int
    """Optimizer steps done."""
    losses: dict
    """What the run's summary says of its losses so far: `first`, `last`, `fixed_noise` by step."""


class DamagedCheckpointError(Exception):
    """A checkpoint whose files are not what was written."""


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Checkpoints:
    """The checkpoints of one run. Only one process saves; each is written while training goes on."""

    def __init__(self, store: Store, *, keep_last: int = 0):
        """`keep_last` of them are kept, and the one with the lowest fixed-noise loss; 0 keeps all."""
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
            values = json.loads(self.folder(step).read_bytes(STATE_FILE))
            if values["format"] != FORMAT:
                raise AceStepError(
                    f"{self.folder(step).url} has the format {values['format']}, this version reads {FORMAT}\n"
                    "  → go on with the version that wrote it, or use another --exp_name"
                )
            if values["step"] != step or not isinstance(values["files"], dict):
                raise DamagedCheckpointError(f"{STATE_FILE} belongs to another step")
            return values
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpointError(f"{STATE_FILE} does not read ({error})") from None

    def latest_state(self) -> dict[str, Any] | None:
        """What the last checkpoint that reads says of itself; None where there is none."""
        for step in reversed(self.steps()):
            try:
                return self.read_state(step)
            except DamagedCheckpointError:
                continue
        return None

    def load_latest(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, warn: Callable[[str], None]
    ) -> TrainingState | None:
        """Put the last checkpoint's weights and moments into `model` and `optimizer`; None where there is none.

        A damaged one is told of and the one before it taken. Raises AceStepError where all are damaged, and for one
        that was written for other parameters or by another version.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                values = self.read_state(step)
                weights, moments = (
                    self._read_tensors(step, name, values["files"]) for name in (WEIGHTS_FILE, OPTIMIZER_FILE)
                )
            except DamagedCheckpointError as error:
                warn(f"warning: the checkpoint of step {step} is damaged and not used: {error}")
                continue
            self._check_names(step, weights, trainable_parameters(model))
            restore(model, optimizer, weights, moments)
            return TrainingState(step=step, losses=values["losses"])
        if steps:  # to start over would write over what can perhaps be mended
            raise AceStepError(
                f"none of the {len(steps)} checkpoints in {self.store.url} can be used\n"
                "  → mend the storage, or delete them to start over, or use another --exp_name"
            )
        return None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> Store:
        """Take a copy of what is trained and write it in the background; returns where.

        Raises AceStepError when the one before could not be written.
        """
        self.finish()
        parameters = trainable_parameters(model)
        contents: dict[str, Mapping[str, Tensor] | bytes] = {
            WEIGHTS_FILE: {name: _copy(parameter) for name, parameter in parameters.items()},
            OPTIMIZER_FILE: {
                f"{name}/{key}": _copy(value)
                for name, parameter in parameters.items()
                for key, value in optimizer.state[parameter].items()
            },
            LORA_FILE: lora_bytes(model, ADAPTER_NAME),
        }
        values = {"format": FORMAT, "step": state.step, "losses": json.loads(json.dumps(state.losses))}
        self._pending = self._writer.submit(self._write, contents, values)
        return self.folder(state.step)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises AceStepError when it could not be."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, contents: dict[str, Mapping[str, Tensor] | bytes], values: dict[str, Any]) -> None:
        step = values["step"]
        for wait in (*_RETRY_AFTER_SECONDS, None):
            try:
                self._write_once(contents, values)
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

    def _write_once(self, contents: dict[str, Mapping[str, Tensor] | bytes], values: dict[str, Any]) -> None:
        folder = self.folder(values["step"])
        folder.delete([STATE_FILE])  # what is written over is not there meanwhile
        files = {}
        for name, content in contents.items():
            data = content if isinstance(content, bytes) else save(dict(content))
            folder.write_bytes(name, data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        folder.write_bytes(STATE_FILE, json.dumps({**values, "files": files}, indent=1).encode())

    def _forget_old(self) -> None:
        """Delete what is neither among the last nor the best."""
        steps = self.steps()
        if not self.keep_last or len(steps) <= self.keep_last:
            return
        losses = (self.latest_state() or {"losses": {}})["losses"].get("fixed_noise", {})
        measured = {step: losses[str(step)] for step in steps if str(step) in losses}
        best = min(measured, key=lambda step: (measured[step], step)) if measured else None
        for step in steps[: -self.keep_last]:
            if step != best:
                folder = self.folder(step)
                folder.delete([STATE_FILE])
                folder.delete(folder.names())

    def _read_tensors(self, step: int, name: str, files: Mapping[str, Any]) -> dict[str, Tensor]:
        try:
            data = self.folder(step).read_bytes(name)
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{name} is missing") from None
        if hashlib.sha256(data).hexdigest() != files.get(name, {}).get("sha256"):
            raise DamagedCheckpointError(f"{name} is not what was written")
        try:
            return load(data)
        except SafetensorError as error:
            raise DamagedCheckpointError(f"{name} does not read ({error})") from None

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


def restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
) -> None:
    """Put weights by parameter, and AdamW's state by `parameter/key`, into `model` and `optimizer`."""
    fused = any(group["fused"] for group in optimizer.param_groups)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            parameter.copy_(weights[name])
            # Only the fused kernel counts its steps on the device.
            homes = {"step": parameter.device if fused else "cpu"}
            if f"{name}/step" in moments:  # none where every step so far was skipped
                optimizer.state[parameter] = {
                    key: moments[f"{name}/{key}"].to(homes.get(key, parameter.device))
                    for key in OPTIMIZER_STATE
                }


def _copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU that training does not change any more."""
    return tensor.detach().to("cpu", copy=True).contiguous()
