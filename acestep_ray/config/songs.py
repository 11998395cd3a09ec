"""Settings of the jobs that read songs: `prepare` and `precompute`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from acestep_ray.config.groups import Groups
from acestep_ray.config.paths import PathSettings


@dataclass
class PrepareConfig(PathSettings):
    """A folder of songs, a CSV or a JSON-lines file becomes a dataset."""

    GROUPS: ClassVar[Groups] = {
        "songs and dataset": ("data_dir", "output_dir", "texts", "tag_metas"),
        "repeats and splits": ("repeat_count", "test_fraction", "seed"),
    }

    data_dir: str
    """Folder of audio with texts beside each file (of this project, ACE-Step 1.5, Side-Step, ai-toolkit), a table
    (.csv, .jsonl, .json, .parquet), a WebDataset, or a Hugging Face dataset with audio inside; a path or a URL."""
    output_dir: str
    """Where the dataset is written (a Hugging Face `datasets` directory): a path or a URL."""
    texts: str = "auto"
    """What NAME.txt beside a song holds: `v1` tags, `v15` lyrics, `side-step` lines, `ai-toolkit` markup, `caption` a
    description, `auto` by its content."""
    tag_metas: bool = False
    """Add tempo and key (`96 bpm`, `A minor`) to the tags, for ACE-Step v1, which has no other place for them."""
    repeat_count: int = 1
    """How many times each song appears in the dataset; repeats get keys of their own."""
    test_fraction: float = 0.0
    """Share of the songs that goes to a `test` split; 0 makes a single dataset."""
    seed: int = 0
    """Chooses which songs go to the test split."""


@dataclass
class PrecomputeConfig(PathSettings):
    """Runs the frozen models once over songs and writes the feature cache."""

    GROUPS: ClassVar[Groups] = {
        "songs and cache": (
            "dataset_path",
            "split",
            "texts",
            "tag_metas",
            "output_dir",
            "retry_rejects",
            "keep_unknown_lyrics",
        ),
        "models and precision": ("checkpoint_dir", "features", "device", "precision"),
        "what of each song": (
            "window",
            "window_seconds",
            "loudness_lufs",
            "min_decoded",
            "tag_shuffles",
            "ssl_frame_stride",
            "seed",
        ),
        "workers and placement": (
            "batch_frames",
            "decode_workers",
            "decode_resource",
            "encode_resource",
            "encoder_workers",
            "encoder_gpus",
        ),
        "a pool for each encoder": (
            "separate_encoders",
            "codec_workers",
            "codec_gpus",
            "text_workers",
            "text_gpus",
            "ssl_workers",
            "ssl_gpus",
        ),
    }

    dataset_path: str
    """Dataset that `prepare` wrote, a folder of songs, or a table (.csv, .jsonl, .json, .parquet); a path or a URL."""
    checkpoint_dir: str
    """Checkpoint directory in the released layout."""
    output_dir: str
    """Where the feature cache is written: a path or a URL."""
    split: str = "train"
    """Split to read when the dataset has several."""
    texts: str = "auto"
    """What NAME.txt beside a song of a folder holds, as in `prepare`: auto, v1, v15, side-step, ai-toolkit, caption."""
    tag_metas: bool = False
    """Add tempo and key of a song to its tags, for ACE-Step v1."""
    features: str = "latents,text,ssl"
    """Groups of features to compute, with commas between them; `text` is prompts and lyrics."""
    window: str = "first"
    """Part of each song that is used: `first`, `all` (one window after another), or `random` (one, anywhere)."""
    window_seconds: float = 240.0
    """Seconds of a window, 3 to 240."""
    loudness_lufs: float | None = None
    """Integrated loudness (LUFS) that every window is brought to; none leaves songs as loud as they are."""
    min_decoded: float = 0.95
    """Share of a song's audio, or of a window's, that must decode, above 0 and at most 1; less is rejected."""
    tag_shuffles: int = 4
    """How many orders of a song's tags are cached as prompts; each recaption adds one more."""
    ssl_frame_stride: int = 4
    """Keep every n-th frame of the SSL features; 1 keeps all."""
    seed: int = 0
    """Chooses the orders of the tags, and the random windows."""
    retry_rejects: bool = False
    """Try songs again that an earlier run rejected; else only those whose files or texts have changed."""
    keep_unknown_lyrics: bool = False
    """Keep songs with lyrics of which more than half is unknown to the model, such as Thai; else they are rejected."""
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
    """Encoder actors; none chooses up to six a GPU, one for every 12 GB, or one a node where there are no GPUs."""
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
