"""What the `acestep-ray` command can do: its jobs and actions, their settings, functions and pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from acestep_ray.config import (
    EvaluateConfig,
    ExportConfig,
    ExtractConfig,
    GenerateConfig,
    MergeConfig,
    MixConfig,
    PrecomputeConfig,
    PrepareConfig,
    QuickstartConfig,
    TrainConfig,
    TuneConfig,
)
from acestep_ray.config.groups import Settings


@dataclass(frozen=True)
class Job:
    """A subcommand: its settings and the function that does the work, `module:function`."""

    config: type[Settings]
    target: str
    page: str
    """Where it is described, below `docs/`."""
    decides: frozenset[str] = frozenset()
    """Settings that the job makes itself, and that are no flags of it."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """What the job has in place of some of these."""

    @property
    def help(self) -> str:
        """The first line that the settings' docstring has."""
        return (self.config.__doc__ or "").partition("\n")[0]


JOBS = {
    "prepare": Job(PrepareConfig, "acestep_ray.data.prepare:prepare_dataset", "guide.md"),
    "precompute": Job(PrecomputeConfig, "acestep_ray.cache.precompute:precompute", "precompute.md"),
    "train": Job(TrainConfig, "acestep_ray.training.job:train", "training.md"),
    "tune": Job(
        TuneConfig,
        "acestep_ray.tuning.job:tune",
        "tuning.md",
        decides=frozenset(
            (
                "train_parameters",
                "cpu_offload",
                "devices",
                "num_nodes",
                "min_devices",
                "every_n_train_steps",
                "every_plot_step",
                "plot_seconds",
                "ckpt_path",
                "checkpoints_dir",
                "keep_last",
            )
        ),
        instead={
            "devices": "--workers_per_trial and --gpus_per_trial",
            "num_nodes": "--workers_per_trial and --gpus_per_trial",
            "min_devices": "--workers_per_trial",
            "every_n_train_steps": "--val_check_interval: every validation is a checkpoint",
            "every_plot_step": "--val_check_interval; trials make no samples",
            "plot_seconds": "no samples: `acestep-ray generate` plays the winner",
            "keep_last": "no such setting: it keeps the last and the best checkpoint of a trial",
            "checkpoints_dir": "--exp_dir, which holds the checkpoints of the trials",
            "ckpt_path": "--init_lora_path",
            "train_parameters": "no such setting: it searches for a LoRA",
            "cpu_offload": "no such setting: it searches for a LoRA",
        },
    ),
    "generate": Job(GenerateConfig, "acestep_ray.generation.job:generate", "generate.md"),
    "evaluate": Job(EvaluateConfig, "acestep_ray.evaluation.job:evaluate", "evaluate.md"),
    "quickstart": Job(QuickstartConfig, "acestep_ray.quickstart:quickstart", "guide.md"),
}
EXPORT_ACTIONS = {
    "lora": Job(ExportConfig, "acestep_ray.export.job:export", "export.md"),
    "merge": Job(MergeConfig, "acestep_ray.export.merge:merge", "export.md"),
    "extract": Job(ExtractConfig, "acestep_ray.export.extract:extract", "export.md"),
    "mix": Job(MixConfig, "acestep_ray.export.mix:mix", "export.md"),
}
CHECKPOINT_ACTIONS = {
    "tiny": (
        "acestep_ray.tiny_checkpoint:write_tiny_checkpoint",
        "Write a complete tiny checkpoint with random weights.",
    ),
    "fetch": (
        "acestep_ray.fetch.job:fetch_checkpoint",
        "Download the released checkpoint and the SSL models, 10 GB; goes on where it was broken off.",
    ),
}
CACHE_ACTIONS = {
    "verify": (
        "acestep_ray.cache.verify:verify_cache",
        "Read every song of a feature cache and tell what is wrong.",
    ),
    "stats": (
        "acestep_ray.cache.stats:cache_stats",
        "Show how many songs a feature cache holds, their lengths, languages and bytes.",
    ),
    "prune": (
        "acestep_ray.cache.prune:prune_cache",
        "Delete what killed runs have left in a feature cache; not while precompute runs on it.",
    ),
}
CACHE_HELP = "Verify a feature cache, show what it holds, or delete what killed runs have left in it."
EXPORT_HELP = "Write a LoRA for other programs (`lora`, may be left out), or merge, extract or mix LoRAs."
INFO_HELP = "Show what a LoRA file holds: rank, alpha, targets, size, metadata, norm of each layer."
DOCTOR_HELP = "Check this machine, a cluster and what jobs read and write: a line each, with what to do."
REPORT_HELP = (
    "Write one HTML page of a run, a search or a quickstart: curves, samples to play, songs, speed, settings."
)
CHECKPOINT_HELP = "Write a tiny checkpoint with random weights, or download the released one."

COMMAND_GROUPS: Mapping[str, tuple[str, ...]] = {
    "to begin": ("quickstart", "doctor"),
    "the road": (
        "checkpoint",
        "prepare",
        "precompute",
        "train",
        "tune",
        "generate",
        "evaluate",
        "export",
    ),
    "what was made": ("report", "info", "cache"),
}
"""All subcommands, in the order of the help."""
