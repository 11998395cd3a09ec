"""GPUs: what there is, whether torch can use it, and whether the model takes its fast path on it."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from acestep_ray.doctor.finding import Finding, ok, problem, warning
from acestep_ray.models.fusing import why_not_fused

_GB = 1e9
# Below this the released model is trained with --quantize_base; see docs/training.md.
_SMALL_GPU = 12 * _GB


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int
    """Bytes."""
    capability: tuple[int, int]


@dataclass(frozen=True)
class GpuFacts:
    """What torch and the driver say."""

    torch: str
    torch_cuda: str | None
    """CUDA that torch is built with; None for a build for CPUs."""
    architectures: tuple[str, ...]
    """That torch is built for: `sm_80`, `compute_90`, …"""
    driver_cuda: tuple[int, int] | None
    """Newest CUDA that the driver runs; None without an NVIDIA driver."""
    gpus: tuple[Gpu, ...]
    error: str
    """Why torch uses none; empty where it does."""


def look_at_gpus() -> GpuFacts:
    gpus, error = [], ""
    if torch.version.cuda is not None:
        try:
            torch.cuda.init()
            for i in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(i)
                capability = (properties.major, properties.minor)
                gpus.append(Gpu(properties.name, properties.total_memory, capability))
        except (RuntimeError, AssertionError) as failure:
            error = str(failure).splitlines()[0]
    return GpuFacts(
        torch=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()),
        driver_cuda=_driver_cuda(),
        gpus=tuple(gpus),
        error=error,
    )


def _driver_cuda() -> tuple[int, int] | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def check_torch(facts: GpuFacts) -> Finding:
    """Whether this build of torch can use the GPUs' driver."""
    driver = (
        "no NVIDIA driver"
        if facts.driver_cuda is None
        else f"the driver runs CUDA {_dotted(facts.driver_cuda)}"
    )
    build = f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "CPUs alone"
    found = f"{facts.torch} built for {build}; {driver}"
    if facts.driver_cuda is None:
        return ok("torch", found)
    if facts.torch_cuda is None:
        return problem(
            "torch",
            f"{found}: its GPUs are not used",
            f"install a torch built for CUDA {_dotted(facts.driver_cuda)} or older from pytorch.org",
        )
    # From one minor version to the next, CUDA stays compatible.
    if int(facts.torch_cuda.partition(".")[0]) > facts.driver_cuda[0]:
        return problem(
            "torch",
            f"{found}, which is too old for it",
            f"a newer NVIDIA driver, or a torch built for CUDA {facts.driver_cuda[0]}",
        )
    return ok("torch", found)


def check_gpus(facts: GpuFacts) -> Iterator[Finding]:
    """A finding for each GPU; one where there is none."""
    if not facts.gpus:
        reason = f" ({facts.error})" if facts.error else ""
        if facts.driver_cuda is not None and facts.torch_cuda is not None:
            yield problem(
                "GPU",
                f"torch uses none{reason}",
                "look at `nvidia-smi` and $CUDA_VISIBLE_DEVICES; in a container, start it with its GPUs",
            )
        else:
            yield warning(
                "GPU",
                "none on this machine",
                "the released model wants one; other nodes of a cluster may have it",
            )
        return
    for i, gpu in enumerate(facts.gpus):
        found = f"{i}: {gpu.name}, {gpu.memory / _GB:.0f} GB, compute capability {_dotted(gpu.capability)}"
        if not _is_built_for(gpu.capability, facts.architectures):
            yield problem(
                "GPU",
                f"{found}, which this torch is not built for ({', '.join(facts.architectures)})",
                "another build of torch",
            )
        elif gpu.memory < _SMALL_GPU:
            yield warning("GPU", found, "train with --quantize_base nf4 --activation_checkpointing 1")
        else:
            yield ok("GPU", found)


def check_fast_path(facts: GpuFacts, head_size: int) -> Iterator[Finding]:
    """Whether a transformer with heads of this size takes the fused path, on the first GPU of each kind.

    Compiles a Triton kernel.
    """
    seen = set()
    for i, gpu in enumerate(facts.gpus):
        if gpu.name in seen:
            continue
        seen.add(gpu.name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reason = why_not_fused(head_size, torch.device("cuda", i))
        told = "; ".join(str(each.message) for each in caught)
        if reason is None:
            yield ok("fast path", f"taken on {gpu.name}: bfloat16 in few passes")
        else:
            yield warning(
                "fast path",
                f"not taken on {gpu.name}: {told or reason}",
                "training works, three to four times slower; Triton needs a C compiler (`apt-get install gcc`)",
            )


def _is_built_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether torch brings code for a GPU: of its generation and no later, or text that its driver compiles."""
    major, minor = capability
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = "".join(filter(str.isdigit, number))
        built = (int(digits[:-1]), int(digits[-1]))
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return False


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
