"""Settings of `train` and of `tune`, which is many of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from acestep_ray.config.groups import Groups
from acestep_ray.config.paths import PathSettings


@dataclass
class TrainConfig(PathSettings):
    """Trains a LoRA on a feature cache, or on songs as they are."""

    GROUPS: ClassVar[Groups] = {
        "data": (
            "dataset_path",
            "texts",
            "tag_metas",
            "min_decoded",
            "num_workers",
            "reload_dataloaders_every_n_epochs",
            "keep_unknown_lyrics",
            "seed",
        ),
        "model and LoRA": ("checkpoint_dir", "lora_config_path", "init_lora_path", "train_parameters"),
        "experiment and tracking": (
            "exp_name",
            "exp_dir",
            "logger_dir",
            "checkpoints_dir",
            "tracking_uri",
            "tracking_experiment",
            "restore_experiment",
            "allow_changes",
        ),
        "length and batches": (
            "max_steps",
            "epochs",
            "batch_size",
            "batch_frames",
            "accumulate_grad_batches",
        ),
        "optimisation": (
            "learning_rate",
            "warmup_steps",
            "weight_decay",
            "optimizer",
            "gradient_clip_val",
            "gradient_clip_algorithm",
            "max_skipped_steps",
        ),
        "loss and conditions": ("shift", "ssl_coeff", "text_dropout", "speaker_dropout", "lyric_dropout"),
        "checkpoints": ("every_n_train_steps", "keep_last", "ckpt_path"),
        "validation and samples": (
            "val_songs",
            "val_check_interval",
            "early_stopping_patience",
            "every_plot_step",
            "plot_seconds",
        ),
        "precision, speed and memory": (
            "precision",
            "fused",
            "float8",
            "cuda_graphs",
            "quantize_base",
            "activation_checkpointing",
            "cpu_offload",
        ),
        "workers and placement": (
            "device",
            "devices",
            "num_nodes",
            "min_devices",
            "worker_resource",
            "max_failures",
        ),
    }

    dataset_path: str
    """Feature cache that `precompute` wrote, or a dataset, a folder of songs, a table (.csv, .jsonl, .json, .parquet):
    songs that every epoch decodes and encodes again; a path or a URL."""
    checkpoint_dir: str
    """Checkpoint directory of the base model, in the released layout."""
    lora_config_path: str | None = None
    """JSON file with the LoRA configuration (any field of PEFT's LoraConfig); none trains the model's own weights."""
    init_lora_path: str | None = None
    """LoRA to start from, a path or a URL: a file, or a directory with one; of several named adapters, one directory
    each."""
    train_parameters: str | None = None
    """Without a LoRA: the modules or parameters to train, with commas, `*` for anything; none trains all."""
    exp_name: str = "text2music_train_test"
    """Name of the experiment: its files lie in `exps/EXP_NAME`, its logs in LOGGER_DIR/EXP_NAME."""
    exp_dir: str = "./exps"
    """Folder of all experiments, a path or a URL (s3://…)."""
    logger_dir: str = "./exps/logs/"
    """Folder of the logs, a path or a URL (s3://…)."""
    checkpoints_dir: str | None = None
    """Folder of the checkpoints of all experiments, a path or a URL (s3://…); none keeps them in EXP_DIR/EXP_NAME."""
    tracking_uri: str | None = None
    """MLflow server or database; the default is a SQLite file in LOGGER_DIR, which has to be on a disk then. `none`
    turns MLflow off."""
    min_decoded: float = 0.95
    """On songs without a cache: share of a song's audio that must decode, above 0 and at most 1; less is rejected."""
    tracking_experiment: str = "acestep-ray"
    """MLflow's experiment, in which the run is shown."""
    restore_experiment: bool = False
    """Where MLflow's experiment, or this run in it, was deleted in MLflow's page: restore it and continue the run."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    optimizer: str = "adamw"
    """adamw, or adamw-8bit (its moments in a quarter of the memory, for all weights on one worker; needs torchao)."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises from 0, before it falls linearly to 0 at `max_steps`."""
    max_steps: int = 2_000_000
    """Optimizer steps."""
    epochs: int = -1
    """Passes over the data; -1 sets no limit, so that `max_steps` decides."""
    batch_size: int = 1
    """Songs in one micro-batch, unless `batch_frames` is given."""
    batch_frames: int | None = None
    """Latent frames (padding included) that one micro-batch may hold; a 240 s song has 2,584."""
    accumulate_grad_batches: int = 1
    """Micro-batches that each worker accumulates before an optimizer step."""
    devices: int = 1
    """Workers on each node, one GPU each where there are GPUs."""
    num_nodes: int = 1
    """Nodes; with `devices` on each."""
    min_devices: int | None = None
    """Workers in all with which the run also goes on when machines are lost; none waits for all of them."""
    worker_resource: str | None = None
    """Custom resource of the nodes that train, such as gpu_node; none takes any node."""
    max_failures: int = 3
    """Times that lost workers are started again, from the last checkpoint."""
    device: str = "auto"
    """Device to train on: auto, cpu or cuda."""
    precision: str = "bf16-mixed"
    """bf16-mixed, bf16-true (frozen weights stored in bfloat16), 16-mixed, or 32 (`fp32` says the same)."""
    quantize_base: str = "none"
    """With a LoRA: how the frozen weights of blocks and lyric encoder are stored: none (as they are), int8 or nf4."""
    fused: bool = True
    """On a GPU, in bfloat16: compute the model in few passes over memory; false takes the plain path, several times
    slower."""
    float8: bool = False
    """With a LoRA, on a GPU of the H100's generation or later: products with frozen weights in float8, which is faster
    and changes the numbers slightly."""
    cuda_graphs: bool = True
    """With a LoRA, on one GPU, in small batches: record the passes and start their kernels together; the GPU then does
    not wait for the host."""
    gradient_clip_val: float = 0.5
    """Largest norm of the gradient, or with `gradient_clip_algorithm: value` its largest element."""
    gradient_clip_algorithm: str = "norm"
    """norm (all gradients are scaled together) or value (every element is cut on its own)."""
    shift: float = 3.0
    """Shift of the flow-matching noise schedule."""
    ssl_coeff: float = 1.0
    """Weight of the SSL projection losses; 0 turns them off."""
    text_dropout: float = 0.15
    """Probability that a sample's prompt is dropped."""
    speaker_dropout: float = 0.5
    """Probability that a sample's speaker embedding is dropped."""
    lyric_dropout: float = 0.15
    """Probability that a sample's lyrics are dropped."""
    activation_checkpointing: float = 0.0
    """Share of the blocks, 0 to 1, that are computed again in the backward pass: less memory, up to a third slower."""
    cpu_offload: bool = False
    """Without a LoRA: keep weights, gradients and the optimizer in the host's memory."""
    num_workers: int = 8
    """Threads that read the cache ahead of the model; songs without a cache take one, 0 reads nothing ahead."""
    reload_dataloaders_every_n_epochs: int = 1
    """Epochs after which the songs get a new order; 0 keeps the first one."""
    keep_unknown_lyrics: bool = False
    """Without a cache: keep songs with lyrics of which more than half is unknown to the model, else rejected."""
    every_n_train_steps: int = 2000
    """Steps between checkpoints; the last step always writes one."""
    ckpt_path: str | None = None
    """Checkpoint of another run to start from, EXP/checkpoints/step=N; a run with checkpoints of its own does not."""
    allow_changes: bool = False
    """Go on with a run although its songs, model or settings are not those that it was started with."""
    max_skipped_steps: int = 10
    """Steps in a row without a finite loss, which are skipped, after which the run stops."""
    keep_last: int = 0
    """Checkpoints that are kept, besides the one with the lowest validation loss; 0 keeps all."""
    val_songs: int | None = None
    """Recordings held out from training for the validation loss; none takes one in twenty, at most eight."""
    val_check_interval: int | None = None
    """Steps between validations; none takes `every_plot_step`."""
    early_stopping_patience: int = 0
    """Validations in a row without a lower loss after which the run ends; 0 never ends it."""
    every_plot_step: int = 2000
    """Steps between generated samples, and between validations."""
    plot_seconds: float | None = None
    """Length of the generated samples, at most 240; none takes the length of the first song."""
    texts: str = "auto"
    """What NAME.txt beside a song of a folder holds, as in `prepare`: auto, v1, v15, side-step, ai-toolkit, caption."""
    tag_metas: bool = False
    """Add tempo and key of a song to its tags, where songs are trained on without a cache."""
    seed: int = 1234
    """Every random draw of the run is a function of this seed, the step and the song's key."""


@dataclass
class TuneConfig(TrainConfig):
    """Searches for the LoRA and the learning rate that fit held-out songs best: many short runs of `train`."""

    GROUPS: ClassVar[Groups] = {
        "search space": (
            "space",
            "search_rank",
            "search_alpha",
            "search_learning_rate",
            "search_targets",
            "search_dropout",
            "search_ssl_coeff",
        ),
        "trials": (
            "trials",
            "max_steps",
            "val_check_interval",
            "scheduler",
            "grace_steps",
            "reduction_factor",
            "searcher",
            "max_failures",
            "retrain_best",
        ),
        "workers and placement": (
            "gpus_per_trial",
            "cpus_per_trial",
            "workers_per_trial",
            "share_base",
            "device",
            "worker_resource",
        ),
        "data": (
            "dataset_path",
            "texts",
            "tag_metas",
            "min_decoded",
            "num_workers",
            "reload_dataloaders_every_n_epochs",
            "keep_unknown_lyrics",
            "val_songs",
            "seed",
        ),
        "model and LoRA": ("checkpoint_dir", "lora_config_path", "init_lora_path"),
        "experiment and tracking": (
            "exp_name",
            "exp_dir",
            "logger_dir",
            "tracking_uri",
            "tracking_experiment",
            "restore_experiment",
            "allow_changes",
        ),
        "batches of a trial": ("epochs", "batch_size", "batch_frames", "accumulate_grad_batches"),
        "optimisation": (
            "learning_rate",
            "warmup_steps",
            "weight_decay",
            "optimizer",
            "gradient_clip_val",
            "gradient_clip_algorithm",
            "max_skipped_steps",
        ),
        "loss and conditions": ("shift", "ssl_coeff", "text_dropout", "speaker_dropout", "lyric_dropout"),
        "early stopping": ("early_stopping_patience",),
        "precision, speed and memory": (
            "precision",
            "fused",
            "float8",
            "cuda_graphs",
            "quantize_base",
            "activation_checkpointing",
        ),
    }

    lora_config_path: str | None = None
    """JSON file with the LoRA configuration that the search starts from; none takes the original's."""
    exp_name: str = "search"
    """Name of the search: its files lie in `exps/EXP_NAME`, its logs in LOGGER_DIR/EXP_NAME."""
    max_steps: int = 2000
    """Optimizer steps of a trial that is not stopped."""
    val_check_interval: int | None = None
    """Steps between a trial's validations, which decide on it and are checkpoints; none makes eight of them."""
    max_failures: int = 3
    """Times that a trial which failed is started again, from its last checkpoint, before it is given up."""
    allow_changes: bool = False
    """Search although the feature cache was computed with other encoders than the checkpoint's."""
    space: str | None = None
    """YAML file with the search space, `dimension: distribution` a line; none takes the default one."""
    search_rank: str | None = None
    """Distribution of LoRA's rank in place of the space's: log2int(LOW, HIGH), choice(A, B, …) or a number."""
    search_alpha: str | None = None
    """Of its alpha: choice of r, 2r, rslora and numbers."""
    search_learning_rate: str | None = None
    """Of the learning rate: loguniform(LOW, HIGH), uniform(LOW, HIGH) or choice(A, B, …)."""
    search_targets: str | None = None
    """Of the modules: choice of groups with + between them: attention, cross_attention, feed_forward, lyric_encoder,
    speaker."""
    search_dropout: str | None = None
    """Of LoRA's dropout."""
    search_ssl_coeff: str | None = None
    """Of the weight of the SSL losses."""
    trials: int = 16
    """Trials in all; the first has the settings of a run without a search, as far as the space has them."""
    scheduler: str = "asha"
    """Which trials are stopped early: asha, median (the median stopping rule) or none."""
    grace_steps: int | None = None
    """Steps before which no trial is stopped; none takes `val_check_interval`."""
    reduction_factor: float = 3.0
    """ASHA lets one in so many trials pass each rung, and its rungs are so many times further apart."""
    searcher: str = "random"
    """How parameters are drawn: random, or optuna (TPE, which learns from earlier trials)."""
    gpus_per_trial: float | None = None
    """GPUs of a trial, which may be a fraction: several trials share a GPU. None takes one a worker, or no GPU."""
    cpus_per_trial: float = 1.0
    """CPUs of a trial."""
    workers_per_trial: int = 1
    """Workers of a trial, one GPU each where there are GPUs."""
    share_base: bool = False
    """The trials of a GPU, or of a machine without GPUs, share one frozen base model and take turns."""
    retrain_best: int | None = None
    """Train the winner anew at the end, with so many steps, as the experiment EXP_NAME_best."""
