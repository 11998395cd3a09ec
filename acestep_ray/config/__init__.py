"""The settings of every job: one dataclass a job, defaults of the original's training guide.

Nothing heavy is imported here, so that `acestep-ray --help` answers at once.
"""

from __future__ import annotations

from acestep_ray.config.loras import ExportConfig, ExtractConfig, MergeConfig, MixConfig
from acestep_ray.config.music import EvaluateConfig, GenerateConfig, QuickstartConfig
from acestep_ray.config.songs import PrecomputeConfig, PrepareConfig
from acestep_ray.config.training import TrainConfig, TuneConfig

__all__ = [
    "EvaluateConfig",
    "ExportConfig",
    "ExtractConfig",
    "GenerateConfig",
    "MergeConfig",
    "MixConfig",
    "PrecomputeConfig",
    "PrepareConfig",
    "QuickstartConfig",
    "TrainConfig",
    "TuneConfig",
]
