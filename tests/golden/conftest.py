"""The original's numbers, and the rule that makes every weight and input from a name."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

BUNDLED = Path(__file__).parent / "data"


class Golden:
    """One set of golden values: tensors, the manifest, and the deterministic weights that belong to them."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.manifest = self.json("manifest.json")
        self.tensors = load_file(directory / "golden.safetensors")
        self.salt: str = self.manifest["salt"]

    def json(self, name: str):
        # A set made for other sizes may leave out what belongs to the released model alone.
        path = self.directory / name
        return json.loads((path if path.exists() else BUNDLED / name).read_text(encoding="utf-8"))

    def random_state(self, tag: str) -> np.random.RandomState:
        return np.random.RandomState(zlib.crc32(tag.encode()) & 0x7FFFFFFF)

    def normal(self, tag: str, shape) -> torch.Tensor:
        return torch.from_numpy(self.random_state(tag).standard_normal(tuple(shape)).astype(np.float32))

    def weight(self, tag: str, shape) -> torch.Tensor:
        """The weight rule of the golden README for the parameter that `tag` names."""
        z = self.normal(tag, shape)
        if tag.endswith("bias") and z.ndim == 1:
            return 0.02 * z
        if z.ndim <= 1:
            return 1 + 0.02 * z
        return z / float(np.sqrt(np.prod(z.shape[1:])))

    def fill(self, module: torch.nn.Module, prefix: str = "") -> None:
        """Set every parameter of `module` by the rule, under `salt + prefix`."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(self.weight(f"{self.salt}{prefix}/{name}", parameter.shape))


@pytest.fixture(scope="session")
def golden() -> Golden:
    directory = Path(os.environ.get("ACESTEP_GOLDEN_DIR", BUNDLED))
    return Golden(directory)
