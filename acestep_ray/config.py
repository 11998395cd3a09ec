"""The settings of every job: one dataclass a job, defaults of the original's training guide.

Nothing heavy is imported here, so that `acestep-ray --help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PrepareConfig:
    """A folder of songs, a CSV or a JSON-lines file becomes a dataset."""

    data_dir: str
    """Folder of audio with NAME_prompt.txt and NAME_lyrics.txt beside each file, or a .csv or .jsonl file."""
    output_dir: str
    """Where the dataset is written (a Hugging Face `datasets` directory)."""
    repeat_count: int = 1
    """How many times each song appears in the dataset; repeats get keys of their own."""
    test_fraction: float = 0.0
    """Share of the songs that goes to a `test` split; 0 makes a single dataset."""
    seed: int = 0
    """Chooses which songs go to the test split."""


@dataclass
class PrecomputeConfig:
    """Runs the frozen models once over songs and writes the feature cache."""

    dataset_path: str
    """Dataset that `prepare` wrote, a folder of songs, or a .csv or .jsonl file; a path or a URL."""
    checkpoint_dir: str
    """Checkpoint directory in the released layout."""
    output_dir: str
    """Where the feature cache is written: a path or a URL."""
    split: str = "train"
    """Split to read when the dataset has several."""
    features: str = "latents,text,ssl"
    """Groups of features to compute, with commas between them; `text` is prompts and lyrics."""
    window: str = "first"
    """Part of each song that is used: `first`, `all` (one window after another), or `random` (one, anywhere)."""
    window_seconds: float = 240.0
    """Seconds of a window, 3 to 240."""
    loudness_lufs: float | None = None
    """Integrated loudness (LUFS) that every window is brought to; none leaves songs as loud as they are."""
    tag_shuffles: int = 4
    """How many orders of a song's tags are cached as prompts; each recaption adds one more."""
    ssl_frame_stride: int = 4
    """Keep every n-th frame of the SSL features; 1 keeps all."""
    seed: int = 0
    """Chooses the orders of the tags, and the random windows."""
    retry_rejects: bool = False
    """Try songs again that an earlier run rejected; else only those whose files or texts have changed."""
    device: str = "auto"
    """Device of the encoders: auto, cpu or cuda."""
    precision: str = "auto"
    """Precision of the encoders: 32, or 16 (auto on a GPU)."""
    batch_frames: int = 2584
    """Latent frames (padding included) that go through the encoders at once; a 240 s song has 2,584."""
    decode_workers: int | None = None
    """Songs that are decoded at a time; none uses the CPUs that are free."""
    encoder_workers: int | None = None
    """Encoder actors; none chooses up to four a GPU, one for every 12 GB, or one a node where there are no GPUs."""
    encoder_gpus: float | None = None
    """Share of a GPU that each encoder actor reserves; none divides the GPUs among them."""
    separate_encoders: bool = False
    """A pool of actors of its own for each of codec, text and SSL encoders, sized by the flags below."""
    codec_workers: int | None = None
    """Actors of the codec, with separate encoders; none chooses one a GPU, or one a node."""
    codec_gpus: float | None = None
    """Share of a GPU for each; 0 runs them on CPUs."""
    text_workers: int | None = None
    """Actors of the text encoder, with separate encoders."""
    text_gpus: float | None = None
    """Share of a GPU for each; 0 runs them on CPUs."""
    ssl_workers: int | None = None
    """Actors of the SSL encoders, with separate encoders."""
    ssl_gpus: float | None = None
    """Share of a GPU for each; 0 runs them on CPUs."""


@dataclass
class TrainConfig:
    """Trains a LoRA on a feature cache, or on songs as they are."""

    dataset_path: str
    """Feature cache that `precompute` wrote, or a dataset, a folder of songs, a .csv or .jsonl file: songs that every
    epoch decodes and encodes again; a path or a URL."""
    checkpoint_dir: str
    """Checkpoint directory of the base model, in the released layout."""
    lora_config_path: str | None = None
    """JSON file with the LoRA configuration (any field of PEFT's LoraConfig); none trains the model's own weights."""
    init_lora_path: str | None = None
    """LoRA to start from: a file, or a directory with one; of several named adapters, one directory each."""
    train_parameters: str | None = None
    """Without a LoRA: the modules or parameters to train, with commas, `*` for anything; none trains all."""
    exp_name: str = "text2music_train_test"
    """Name of the experiment: its files lie in `exps/EXP_NAME`, its logs in LOGGER_DIR/EXP_NAME."""
    exp_dir: str = "./exps"
    """Folder of all experiments."""
    logger_dir: str = "./exps/logs/"
    """Folder of the logs."""
    tracking_uri: str | None = None
    """MLflow server or database; the default is a SQLite file in LOGGER_DIR. `none` turns MLflow off."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
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
    max_failures: int = 3
    """Times that lost workers are started again, from the last checkpoint."""
    device: str = "auto"
    """Device to train on: auto, cpu or cuda."""
    precision: str = "bf16-mixed"
    """bf16-mixed, bf16-true (frozen weights stored in bfloat16), 16-mixed, or 32 (`fp32` says the same)."""
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
    """Length of the generated samples; none takes the length of the first song."""
    seed: int = 1234
    """Every random draw of the run is a function of this seed, the step and the song's key."""


@dataclass
class GenerateConfig:
    """Makes music from a prompt and lyrics."""

    checkpoint_dir: str
    """Checkpoint directory of the base model, in the released layout."""
    output_path: str
    """Audio file to write (.wav, .flac, .ogg or .mp3); its mel picture lies beside it as .png."""
    transformer_path: str | None = None
    """Fine-tuned transformer to take instead of the checkpoint's: the folder that training all weights wrote."""
    prompt: str = ""
    """Tags or a description of the music."""
    lyrics: str = ""
    """The lyrics, or a path to a text file that holds them."""
    language: str | None = None
    """Language of all lyrics (en, de, fr, …); none detects it line by line."""
    duration: float = 60.0
    """Length in seconds, at most 240."""
    seed: int = 0
    """Same seed, same music."""
    infer_steps: int = 60
    """Steps of the sampler."""
    guidance_scale: float = 15.0
    """Strength of the guidance; 1 turns it off."""
    omega: float = 10.0
    """Granularity of the sampler's steps."""
    shift: float = 3.0
    """Shift of the noise schedule."""
    lora_path: str | None = None
    """LoRA: a `pytorch_lora_weights.safetensors` file or a directory that holds one."""
    lora_weight: float = 1.0
    """Strength of the LoRA."""
    speaker_emb_path: str | None = None
    """Speaker embedding (.pt, .npy or .safetensors with 512 floats)."""
    overlapped_decode: bool = False
    """Decode in overlapping windows: bounded memory for long songs."""
    precision: str = "32"
    """Precision of the transformer: 32 or bf16."""
    device: str = "auto"
    """Device to run on: auto, cpu or cuda."""


@dataclass
class QuickstartConfig:
    """The whole road once: songs, dataset, cache, LoRA, music."""

    songs: str | None = None
    """Folder of your songs; none makes a few demonstration songs."""
    output_dir: str = "./quickstart"
    """Where everything is written."""
    checkpoint_dir: str | None = None
    """Checkpoint to train on; none writes a tiny one with random weights."""
    max_steps: int = 60
    """Training steps."""
    device: str = "auto"
    """Device to run on: auto, cpu or cuda."""
    seed: int = 0
    """Seed of the run."""
