"""One frozen base model for several trials of a process: of each trial only its LoRA is its own."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from acestep_ray.config import TrainConfig
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.quantised import QuantisedLinear
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.tracking import MLflowRun
from acestep_ray.training.initial_lora import initial_loras, load_lora
from acestep_ray.training.lora import add_lora
from acestep_ray.training.model import UNQUANTISED, fuse_passes, store_frozen
from acestep_ray.tuning.loop import Measured, SteppedLoop, Turns
from acestep_ray.tuning.space import Params
from acestep_ray.tuning.trial import TrialPlan, start_loop


class SharedBase:
    """The base model, stored as the settings say, and models of trials made on it."""

    def __init__(self, config: TrainConfig, device: torch.device):
        home = device if config.quantize_base == UNQUANTISED else "cpu"
        self.base = CheckpointDir.open(config.checkpoint_dir).load_transformer(device=home)
        self.base.requires_grad_(False)
        store_frozen(self.base, config, device)

    def build(
        self, config: TrainConfig, lora: Mapping[str, Any] | None, device: torch.device
    ) -> ACEStepTransformer:
        """What `build_transformer` gives, number for number, on the base's own tensors."""
        assert lora is not None, "a trial trains nothing but its LoRA"
        transformer = self._without_weights(config, device)
        torch.manual_seed(config.seed)  # LoRA's first matrices are random
        add_lora(transformer, lora)
        for adapter, path in initial_loras(config.init_lora_path, lora).items():
            load_lora(transformer, path, adapter)
        _put_on(transformer, self.base)
        fuse_passes(transformer, config, device, is_lora=True, shares_base=True)
        transformer.activation_checkpointing = config.activation_checkpointing
        return transformer

    def _without_weights(self, config: TrainConfig, device: torch.device) -> ACEStepTransformer:
        """The transformer with float32 stand-ins for its weights that take no memory.

        PEFT makes LoRA's matrices in the precision of the weights that it finds; ours are float32.
        """
        with torch.device("meta"):
            transformer = ACEStepTransformer(self.base.config)
        stand_ins = {
            name: torch.zeros((), device=device).expand(tensor.shape)
            for name, tensor in transformer.state_dict().items()
        }
        transformer.load_state_dict(stand_ins, assign=True)
        return transformer


def _put_on(model: nn.Module, base: nn.Module) -> None:
    """Give `model`, below its LoRA layers, the parameters of `base` and its quantised layers; in place."""
    for name, parameter in base.named_parameters(recurse=False):
        setattr(model, name, parameter)
    for name, layer in base.named_children():
        mine = getattr(model, name)
        is_lora = isinstance(mine, LoraLayer)
        if not isinstance(layer, QuantisedLinear):
            _put_on(mine.get_base_layer() if is_lora else mine, layer)
        elif is_lora:
            mine.base_layer = layer
        else:
            setattr(model, name, layer)


class SharedBaseHost:
    """An actor that holds the base model and runs trials on it, in turns of a step each; trials call it from theirs.

    A trial whose own actor is lost and started again takes its place over.
    """

    def __init__(self, seats: int):
        """`seats` trials run at a time."""
        self.seats = seats
        self.base: SharedBase | None = None
        self.turns = Turns()
        self.loops: dict[str, SteppedLoop] = {}
        # Held by whoever changes the above.
        self.lock = threading.Lock()

    def start(self, plan: TrialPlan, name: str, params: Params, mlflow_run: MLflowRun | None) -> bool:
        """Begin or take over a trial; False where no seat is free. The first one loads the base model."""
        self.leave(name)
        with self.lock:
            if len(self.loops) >= self.seats:
                return False
            device = torch.device("cuda" if plan.use_gpu else "cpu")
            if self.base is None:
                self.base = SharedBase(plan.config, device)
            self.loops[name] = start_loop(
                plan, name, params, mlflow_run, device, build=self.base.build, turns=self.turns
            )
            return True

    def next(self, name: str) -> tuple[Measured | None, dict[str, Any] | None]:
        """What the trial's next validation measures, or None and what the run returned."""
        loop = self.loops[name]
        return loop.next(), loop.outcome

    def leave(self, name: str) -> None:
        """End a trial and free its seat."""
        with self.lock:
            loop = self.loops.pop(name, None)
        if loop is not None:
            loop.stop()
