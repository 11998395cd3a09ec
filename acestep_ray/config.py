"""The settings of every job: one dataclass a job, defaults of the original's training guide.

Nothing heavy is imported here, so that `acestep-ray --help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PrepareConfig:
    """A folder of songs, a CSV or a JSON-lines file becomes a dataset."""

    data_dir: str
    """Folder of audio with NAME_prompt.txt and NAME_lyrics.txt beside each file, or a .csv or .jsonl file; a path or a
    URL."""
    output_dir: str
    """Where the dataset is written (a Hugging Face `datasets` directory): a path or a URL."""
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
    decode_resource: str | None = None
    """Custom resource of the nodes that decode, such as cpu_node; none takes any node."""
    encode_resource: str | None = None
    """Custom resource of the nodes that encode, such as gpu_node; none takes any node."""
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
    """Makes music from a prompt and lyrics, or from a file of many."""

    checkpoint_dir: str
    """Checkpoint directory of the base model, in the released layout."""
    output_path: str | None = None
    """Audio file to write (.wav, .flac, .ogg or .mp3), of several seeds NAME-seedN; its mel picture lies beside it as
    .png."""
    batch_path: str | None = None
    """Instead of `output_path`: a JSON-lines file with a song a line, which may set prompt, lyrics, language, duration,
    seed, infer_steps, guidance_scale, scheduler, omega, shift, speaker_emb_path, name; flags are its defaults."""
    output_dir: str | None = None
    """With `batch_path`: folder of the songs and of `results.jsonl`, a path or a URL; a rerun makes what is missing."""
    format: str | None = None
    """With `batch_path`: wav, flac, ogg or mp3; none is wav."""
    workers: int | None = None
    """With `batch_path`: models loaded on the cluster; none is one a GPU, or one a node where there are no GPUs."""
    batch_size: int = 1
    """Songs, of one length and sampled alike, that go through the transformer together."""
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
    seed: int | str | list[int] = 0
    """Same seed, same music; several with commas between them make a song each."""
    infer_steps: int = 60
    """Steps of the sampler."""
    scheduler: str = "euler"
    """euler, heun (of second order: twice the work a step) or pingpong (fresh noise in every step)."""
    guidance_scale: float = 15.0
    """Strength of the guidance; 1 turns it off."""
    omega: float = 10.0
    """Granularity of the sampler's steps; pingpong has none."""
    shift: float = 3.0
    """Shift of the noise schedule."""
    lora_path: str | None = None
    """LoRA of any known form, training checkpoint or experiment; several with commas between them."""
    lora_weight: float | str | None = None
    """Strength of each LoRA, with commas between them; none is 1 for all."""
    speaker_emb_path: str | None = None
    """Speaker embedding (.pt, .npy or .safetensors with 512 floats)."""
    overlapped_decode: bool | None = None
    """Decode in overlapping windows, which bounds the memory of long songs; none does where it would not suffice."""
    precision: str = "auto"
    """Precision of the transformer: 32, or bf16, which is several times as fast on a GPU (auto there)."""
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


@dataclass
class ExportConfig:
    """Writes a LoRA for other programs, with a model card where it comes from a run."""

    input_path: str
    """Experiment, training checkpoint, or a LoRA's file or directory in any known form; a path or a URL."""
    output_dir: str
    """New directory to write, a path or a URL."""
    format: str = "universal"
    """universal (one file that plays everywhere), peft (adapter directory), comfyui or kohya."""
    checkpoint: str = "last"
    """Of an experiment: last, best (the lowest validation loss), or a step."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    checkpoint_dir: str | None = None
    """Checkpoint directory that the LoRA is to fit; none looks at the names of its modules alone."""
    push_to_hub: str | None = None
    """Repository on the Hugging Face Hub, USER/NAME, that gets the files; a new one is private."""
    dry_run: bool = False
    """With `push_to_hub`: only say what would be uploaded."""


@dataclass
class MergeConfig:
    """Merges LoRAs into a base model: a complete checkpoint directory."""

    checkpoint_dir: str
    """Checkpoint directory of the base model, in the released layout."""
    lora_path: str
    """LoRA, training checkpoint or experiment, a path or a URL; several with commas between them."""
    output_dir: str
    """New checkpoint directory to write, a path or a URL."""
    lora_weight: str | None = None
    """Strength of each LoRA, with commas between them; none is 1 for all."""
    dtype: str = "float32"
    """float32 or bfloat16, of the transformer."""
    max_shard_size: str = "5GB"
    """Largest file of the transformer's weights, such as 5GB or 500MB."""


@dataclass
class ExtractConfig:
    """Makes a LoRA of the difference between a fine-tuned model and its base."""

    checkpoint_dir: str
    """Checkpoint directory of the base model, in the released layout."""
    finetuned_path: str
    """Fine-tuned transformer: its folder, the experiment that trained it, or a checkpoint directory; path or URL."""
    output_dir: str
    """New directory to write, a path or a URL."""
    rank: int = 64
    """Rank of the LoRA."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    device: str = "auto"
    """Device to compute on: auto, cpu or cuda."""


@dataclass
class MixConfig:
    """Makes one LoRA of the weighted sum of several."""

    lora_path: str
    """LoRAs, training checkpoints or experiments, paths or URLs with commas between them."""
    output_dir: str
    """New directory to write, a path or a URL."""
    lora_weight: str | None = None
    """Weight of each LoRA, with commas between them; none is 1 for all."""
    rank: int | None = None
    """Largest rank of the result; none adds the ranks up, which is exact."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""


@dataclass
class EvaluateConfig:
    """Measures how good models are and compares them: losses, distances from real music, and a page to listen to."""

    checkpoint_dir: str
    """Checkpoint directory of the base model, with the SSL encoders, in the released layout."""
    output_dir: str
    """New directory to write."""
    models: str | None = None
    """`base`, LoRAs, training checkpoints, experiments and fine-tuned transformers, with commas between them."""
    lora_weight: str | None = None
    """Strength of each model's LoRA, with commas between them; none is 1 for all."""
    checkpoint: str = "last"
    """Of experiments: last, best (the lowest validation loss), or a step."""
    dataset_path: str | None = None
    """Feature cache with the songs whose loss is measured, and whose prompts and lyrics the models sing anew."""
    val_songs: int | None = None
    """Recordings that training held out of that cache (its --val_songs); none asks the experiments among the models."""
    generated_dir: str | None = None
    """Score the audio in this folder, or of each of its subfolders as a model, instead of generating any."""
    reference_dir: str | None = None
    """Folder of audio, the music that the models are to come near; none leaves the Fréchet distance out."""
    training_dir: str | None = None
    """Folder of audio, the songs trained on, that may not be repeated; none takes `reference_dir`."""
    songs: int = 8
    """Songs to measure on."""
    duration: float = 30.0
    """Seconds of each generated clip, at most 240."""
    infer_steps: int = 60
    """Steps of the sampler."""
    guidance_scale: float = 15.0
    """Strength of the guidance; 1 turns it off."""
    omega: float = 10.0
    """Granularity of the sampler's steps."""
    shift: float = 3.0
    """Shift of the noise schedule."""
    seed: int = 0
    """Chooses the noise that each song is made from, the same for all models."""
    logger_dir: str = "./exps/logs/"
    """Folder of MLflow's database, where `tracking_uri` names no other."""
    tracking_uri: str | None = None
    """MLflow server or database; the default is a SQLite file in LOGGER_DIR. `none` turns MLflow off."""
    precision: str = "auto"
    """Precision of the transformer: 32, or bf16 (auto on a GPU)."""
    device: str = "auto"
    """Device to run on: auto, cpu or cuda."""


@dataclass
class TuneConfig(TrainConfig):
    """Searches for the LoRA and the learning rate that fit held-out songs best: many short runs of `train`."""

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
