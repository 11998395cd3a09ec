"""The precompute pipeline on Ray: what its stages make of the cores and of a GPU, and what memory it takes.

    python benchmarks/precompute.py --device cpu --tiny
    python benchmarks/precompute.py --device cuda --json precompute.json

`decode`: songs a second of the decoding stage on one core and on several, against a bare loop in one process that reads
the same files with soundfile and resamples them. `pipeline`: every stage, encoders of the released sizes with random
weights; the share of the time that the GPU is busy is sampled from nvidia-smi. `memory`: the most that the object store
holds for few songs and for many. What one core and one encoder do alone is measured by `audio.py` and `encoders.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# A worker of the decoding stage is one core; the libraries read this when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import ray
import soundfile
import soxr
import torch
from ray.data import DataContext
from released_sizes import AUTOENCODER, HUBERT, UMT5

from acestep_ray.cache.graph import Graph
from acestep_ray.cache.pools import choose_pools
from acestep_ray.cache.precompute import make_recipe, precompute
from acestep_ray.cache.schema import FEATURE_GROUPS
from acestep_ray.cache.songs import Song
from acestep_ray.config import PrecomputeConfig
from acestep_ray.data.audio import SAMPLE_RATE
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.storage import Store
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint

FORMATS = ("mp3", "flac", "wav", "ogg")
SAMPLED_EVERY = 0.1
VARIANTS = {
    "together": {},
    "two": {"encoder_workers": 2},
    "three": {"encoder_workers": 3},
    "four": {"encoder_workers": 4},
    "five": {"encoder_workers": 5},
    "six": {"encoder_workers": 6},
    "apart": {"separate_encoders": True},
}


def write_songs(folder: Path, count: int, seconds: float, distinct: int = 4) -> list[Song]:
    """`count` songs of noisy tones at 44.1 kHz in turn in each format; files of one content are links."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    time_axis = np.arange(int(seconds * 44_100)) / 44_100
    for i in range(distinct):
        pitch = 200 * (1 + i) * (1 + (time_axis % 1 > 0.5))
        tone = 0.3 * np.sin(2 * np.pi * pitch * time_axis)[:, None] + random.normal(
            0, 0.05, (len(time_axis), 2)
        )
        with soundfile.SoundFile(folder / f"original{i}.{FORMATS[i % 4]}", "w", 44_100, 2) as file:
            # libsndfile's Vorbis encoder crashes on minutes of audio at once.
            for start in range(0, len(tone), 44_100):
                file.write(tone[start : start + 44_100].astype(np.float32))
    songs = []
    for i in range(count):
        suffix = FORMATS[i % distinct % 4]
        name = f"song{i:06d}.{suffix}"
        os.link(folder / f"original{i % distinct}.{suffix}", folder / name)
        (folder / f"song{i:06d}_prompt.txt").write_text("pop, piano, female vocals, slow, 90 bpm")
        (folder / f"song{i:06d}_lyrics.txt").write_text("[verse]\n" + "la la la, the night is long\n" * 20)
        songs.append(Song(f"song{i:06d}", name, ["pop"], {}, "", "", ""))
    for original in folder.glob("original*"):
        original.unlink()
    return songs


def bare_songs_per_second(folder: Path, songs: list[Song]) -> float:
    """Read with soundfile, resample with soxr, nothing else: the most that a core can do."""
    started = time.perf_counter()
    for song in songs:
        samples, rate = soundfile.read(folder / song.filename, dtype="float32", always_2d=True)
        soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
    return len(songs) / (time.perf_counter() - started)


def stage_songs_per_second(graph: Graph, songs: list[Song], workers: int) -> float:
    """Of the decoding stage with that many workers, once all have begun; all songs are equally long."""
    dataset = graph.decoded(songs, len(songs))
    times = []
    for bundle in dataset.iter_internal_ref_bundles():
        times += [time.perf_counter()] * bundle.num_rows()
        del bundle
    # The first songs wait for their processes, the last ones find some idle.
    first, last = len(times) // 4, len(times) - workers
    # A row is a batch of songs.
    return (last - first) * len(songs) / len(times) / (times[last - 1] - times[first - 1])


def measure_decoding(
    work: Path, checkpoint: CheckpointDir, count: int, seconds: float, cores: list[int]
) -> dict:
    """The decoding stage with some numbers of workers, `count` songs a worker, and the bare loop before and after."""
    songs = write_songs(work / "songs", count * cores[-1], seconds)
    folder = work / "songs"
    bare, rates = [bare_songs_per_second(folder, songs[:8])], {}
    config = PrecomputeConfig(str(folder), str(checkpoint.path), str(work / "cache"))
    for workers in cores:
        graph = Graph(
            root=Store.at(folder),
            cache=Store.at(work / f"cache{workers}"),
            checkpoint_dir=str(checkpoint.path),
            recipe=make_recipe(config, checkpoint, (), "cpu"),
            pools=[],
            batch_frames=config.batch_frames,
            decode_workers=workers,
        )
        with DataContext.current(graph.context()):
            rates[workers] = stage_songs_per_second(graph, songs[: count * workers], workers)
    bare.append(bare_songs_per_second(folder, songs[:8]))
    mean = sum(bare) / len(bare)
    return {
        "bare_songs_per_second": round(mean, 3),
        "bare_before_and_after": [round(rate, 3) for rate in bare],
        "seconds": seconds,
        "stage": {
            workers: {
                "songs_per_second": round(rate, 3),
                "times_realtime": round(rate * seconds),
                "of_bare_loop_per_core": round(rate / workers / mean, 3),
            }
            for workers, rate in rates.items()
        },
    }


@contextlib.contextmanager
def sampled(read) -> Iterator[list[float]]:
    """Values of `read()` every tenth of a second, while the block runs."""
    values: list[float] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLED_EVERY):
            values.append(read())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield values
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def gpu_utilisation() -> Iterator[list[tuple[float, float]]]:
    """(time, percent busy) as nvidia-smi samples it."""
    values: list[tuple[float, float]] = []
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def read() -> None:
        values.extend((time.time(), float(line)) for line in process.stdout)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield values
    finally:
        process.kill()
        process.wait()
        thread.join()


def cpu_seconds() -> tuple[float, float]:
    """Seconds that the cores of this machine have worked so far, and seconds in all; Linux."""
    user, nice, system, idle, io, *others = map(int, Path("/proc/stat").read_text().split()[1:9])
    busy = user + nice + system + sum(others)
    return busy, busy + idle + io


def object_store_bytes() -> float:
    """What the object store of this machine holds now."""
    total = ray.cluster_resources().get("object_store_memory", 0)
    return total - ray.available_resources().get("object_store_memory", 0)


def measure_pipeline(
    work: Path, checkpoint: CheckpointDir, count: int, seconds: float, device: str, name: str, **settings
) -> dict:
    """One run of precompute; rates between the first and the last tenth of the stored songs."""
    folder = work / f"songs-{name}"
    write_songs(folder, count, seconds)
    config = PrecomputeConfig(
        str(folder), str(checkpoint.path), str(work / f"cache-{name}"), device=device, **settings
    )
    stored: list[tuple[float, int]] = []
    cpu: dict[float, tuple[float, float]] = {}

    def watch() -> float:
        ledgers = Path(config.output_dir, ".incoming", "ledgers")
        stored.append((time.time(), sum(1 for _ in ledgers.glob("*")) if ledgers.exists() else 0))
        cpu[stored[-1][0]] = cpu_seconds()
        return 0.0

    started = time.time()
    busy: list[tuple[float, float]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(sampled(watch))
        held = stack.enter_context(sampled(object_store_bytes))
        if device == "cuda":
            busy = stack.enter_context(gpu_utilisation())
        summary = precompute(config)
    wall = time.time() - started
    files = max(n for _, n in stored)
    per_file = count / files
    # Between the first fifth, when every stage is at work, and the last tenth, when decoding has ended.
    begin = next((t, n) for t, n in stored if n >= 0.2 * files)
    end = next((t, n) for t, n in stored if n >= 0.9 * files)
    rate = (end[1] - begin[1]) * per_file / max(end[0] - begin[0], 1e-9)
    steady = [percent for t, percent in busy if begin[0] <= t <= end[0]]
    cpu_busy, cpu_all = (b - a for a, b in zip(cpu[begin[0]], cpu[end[0]], strict=True))
    pools = choose_pools(config, FEATURE_GROUPS, checkpoint)
    return {
        "name": name,
        "songs": count,
        "seconds": seconds,
        "settings": settings,
        "wall_seconds": round(wall, 1),
        "steady_songs_per_second": round(rate, 2),
        "steady_times_realtime": round(rate * seconds),
        "gpu_busy_percent": round(sum(steady) / len(steady), 1) if steady else None,
        "cpu_busy_percent": round(100 * cpu_busy / max(cpu_all, 1), 1),
        "object_store_peak_gb": round(max(held, default=0) / 1e9, 2),
        "bytes_per_song": summary.num_bytes // max(summary.samples, 1),
        "samples": summary.samples,
        "actors": [pool.actors for pool in pools],
    }


def write_released_sizes(directory: Path) -> CheckpointDir:
    """A checkpoint whose frozen models have the released sizes and random weights; the transformer is left small."""
    from diffusers import AutoencoderDC
    from safetensors.torch import save_file
    from transformers import HubertConfig, HubertModel, UMT5Config, UMT5EncoderModel

    write_tiny_checkpoint(directory)
    released = {
        "music_dcae_f8c8": (AutoencoderDC, AUTOENCODER, "diffusion_pytorch_model.safetensors"),
        "umt5-base": (UMT5EncoderModel, UMT5, "model.safetensors"),
        "mert": (HubertModel, HUBERT["mert"], "model.safetensors"),
        "mhubert": (HubertModel, HUBERT["m-hubert"], "model.safetensors"),
    }
    configs = {UMT5EncoderModel: UMT5Config, HubertModel: HubertConfig}
    torch.manual_seed(0)
    for folder, (kind, settings, name) in released.items():
        model = kind(**settings) if kind is AutoencoderDC else kind(configs[kind](**settings))
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        weights.pop("encoder.embed_tokens.weight", None)
        save_file(weights, directory / folder / name, {"format": "pt"})
        (directory / folder / "config.json").write_text(json.dumps(settings))
    config_file = directory / "ace_step_transformer" / "config.json"
    config = json.loads(config_file.read_text())
    return _with_widths(directory, config)


def _with_widths(directory: Path, config: dict) -> CheckpointDir:
    """The small transformer with the widths of the released frozen models, which it has to agree with."""
    from safetensors.torch import save_file

    from acestep_ray.models.transformer import ACEStepTransformer
    from acestep_ray.models.transformer_config import TransformerConfig

    config |= {"text_embedding_dim": 768, "ssl_latent_dims": [1024, 768]}
    folder = directory / "ace_step_transformer"
    transformer = ACEStepTransformer(TransformerConfig.from_dict(config))
    save_file(transformer.state_dict(), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return CheckpointDir.open(directory)


def main() -> None:
    """Measure the sections that are asked for and print a table of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--sections", default="decode,pipeline,memory", help="with commas between them")
    parser.add_argument(
        "--variants", default="together,apart", help=f"of the pipeline: {', '.join(VARIANTS)}"
    )
    parser.add_argument("--songs", type=int, help="songs of each run, or to decode by each worker")
    parser.add_argument("--workers", help="of the decoding stage; the default is 1, 2 and half the cores")
    parser.add_argument("--seconds", type=float, help="length of every song, 240 or, with --tiny, 10")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument(
        "--object_store_gb", type=float, help="size of Ray's object store; the default is Ray's"
    )
    arguments = parser.parse_args()
    sections = arguments.sections.split(",")
    seconds = arguments.seconds or (10.0 if arguments.tiny else 240.0)
    cores = os.cpu_count()
    workers = [int(n) for n in (arguments.workers or f"1,2,{cores // 2}").split(",") if int(n) <= cores]
    work = Path(tempfile.mkdtemp(prefix="precompute-benchmark-"))
    store = arguments.object_store_gb
    ray.init(
        address="local",
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
        object_store_memory=None if store is None else int(store * 1e9),
    )
    results: dict = {
        "host": f"{cores} cores, {platform.python_version()}, torch {torch.__version__}, ray {ray.__version__}",
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor(),
    }
    try:
        tiny = write_tiny_checkpoint(work / "tiny")
        checkpoint = (
            tiny if arguments.tiny or arguments.device == "cpu" else write_released_sizes(work / "released")
        )
        if "decode" in sections:
            results["decode"] = measure_decoding(
                work, tiny, arguments.songs or 24, seconds, sorted(set(workers))
            )
            print(json.dumps(results["decode"], indent=1))
        if "pipeline" in sections:
            count = arguments.songs or (200 if arguments.device == "cuda" else 12)
            results["pipeline"] = []
            for name in dict.fromkeys(arguments.variants.split(",")):
                settings = VARIANTS[name]
                try:
                    found = measure_pipeline(
                        work, checkpoint, count, seconds, arguments.device, name, **settings
                    )
                except Exception as error:  # one variant that fails must not lose the others' figures
                    found = {"name": name, "error": f"{type(error).__name__}: {error}"}
                results["pipeline"].append(found)
                print(json.dumps(found, indent=1), flush=True)
        if "memory" in sections:
            few = arguments.songs or (64 if arguments.device == "cuda" else 24)
            results["memory"] = [
                measure_pipeline(
                    work, tiny, few * times, seconds, "cpu", f"memory{times}", features="latents"
                )
                for times in (1, 4)
            ]
            print(json.dumps(results["memory"], indent=1))
    finally:
        ray.shutdown()
        shutil.rmtree(work, ignore_errors=True)
    print_table(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def print_table(results: dict) -> None:
    print(f"\n{results['device']} · {results['host']}")
    if decode := results.get("decode"):
        print(
            f"bare loop, one process: {decode['bare_songs_per_second']} songs of {decode['seconds']:g} s a second"
        )
        print(f"{'cores':>6} {'songs/s':>9} {'x realtime':>11} {'of the bare loop, a core':>25}")
        for workers, row in decode["stage"].items():
            print(
                f"{workers:>6} {row['songs_per_second']:>9} {row['times_realtime']:>11,} "
                f"{row['of_bare_loop_per_core']:>25}"
            )
    for row in [*results.get("pipeline", []), *results.get("memory", [])]:
        if "error" in row:
            print(f"{row['name']}: {row['error']}")
            continue
        print(
            f"{row['name']:>9}: {row['songs']} songs, steady {row['steady_songs_per_second']} songs/s "
            f"({row['steady_times_realtime']:,} x realtime), GPU busy {row['gpu_busy_percent']} %, "
            f"CPUs {row['cpu_busy_percent']} %, "
            f"object store {row['object_store_peak_gb']} GB at most, {row['bytes_per_song']:,} bytes a song, "
            f"{row['wall_seconds']} s in all"
        )


if __name__ == "__main__":
    sys.exit(main())
