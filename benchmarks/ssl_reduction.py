"""What the cache's reduction of SSL features (directions as int8, every n-th frame) does to the projection losses.

    python benchmarks/ssl_reduction.py --songs path/to/songs
    python benchmarks/ssl_reduction.py --songs path/to/songs --checkpoint_dir checkpoint --device cuda

The same steps (songs, noise, noise levels, weights at the start) are trained once from the encoders' full float32
features and once from each reduction. Shown is the difference of the projection losses, relative to the full ones, over
all steps of the run, and of the two trained models on full features afterwards, which is what counts. Fails if the
default stride is off by 1 % or more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from acestep_ray.cache.decoding import decode_song, file_versions
from acestep_ray.cache.encoding import Encoder, quantise_directions
from acestep_ray.cache.precompute import make_recipe
from acestep_ray.cache.schema import FEATURE_GROUPS
from acestep_ray.cache.songs import Song
from acestep_ray.config import PrecomputeConfig
from acestep_ray.data.demo import write_demo_songs
from acestep_ray.data.songs import SongTable
from acestep_ray.diffusion.objective import SSLTarget, TrainingBatch, flow_matching_losses
from acestep_ray.diffusion.schedule import training_sigmas
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.tiny_checkpoint import write_tiny_checkpoint

STRIDES = (1, 2, 4, 8)
MOST_RELATIVE = 0.01


def encode_songs(checkpoint: CheckpointDir, songs: str, seconds: float, device: str) -> list[dict]:
    """Latents and full SSL features of every usable song."""
    config = PrecomputeConfig(
        songs, str(checkpoint.path), "", window="all", window_seconds=seconds, precision="32"
    )
    recipe = make_recipe(config, checkpoint, FEATURE_GROUPS, device)
    encoder = Encoder.load(checkpoint, recipe, device, ("latents", "ssl"))
    table = SongTable.open(songs)
    encoded = []
    for row in table:
        song = Song.from_row(row)
        for window in decode_song(table.root, song, recipe, file_versions(table.root, song)):
            if hasattr(window, "wave"):
                (features,) = encoder._features([window.wave], [[]])
                ssl = {name: tensor.cpu() for name, tensor in features["ssl"].items()}
                encoded.append({"latents": features["latents"].cpu(), "ssl": ssl})
    return encoded


def ssl_target(features: torch.Tensor, stride: int | None) -> SSLTarget:
    """Full features, or every `stride`-th frame of their int8 directions."""
    length = torch.tensor([len(features)])
    if stride is None:
        return SSLTarget(features[None], length)
    kept = quantise_directions(features[::stride])
    return SSLTarget(kept[None], length, stride)


def batch_of(
    song: dict, step: int, sigmas: torch.Tensor, widths: tuple[int, int], stride: int | None
) -> TrainingBatch:
    """One song under the noise of a step, without text and lyrics."""
    text_dim, speaker_dim = widths
    latents = song["latents"].float()[None]
    random = torch.Generator().manual_seed(step)
    return TrainingBatch(
        latents=latents,
        noise=torch.randn(latents.shape, generator=random),
        sigmas=sigmas[torch.randint(len(sigmas), (1,), generator=random)],
        frame_mask=torch.ones(1, latents.shape[-1], dtype=torch.bool),
        text=torch.zeros(1, 1, text_dim),
        text_mask=torch.ones(1, 1, dtype=torch.bool),
        speaker=torch.zeros(1, speaker_dim),
        lyric_ids=torch.zeros(1, 1, dtype=torch.int64),
        lyric_mask=torch.zeros(1, 1, dtype=torch.bool),
        ssl={name: ssl_target(features, stride) for name, features in song["ssl"].items()},
    )


def train(checkpoint: CheckpointDir, songs: list[dict], steps: int, stride: int | None, device: str) -> dict:
    """Projection losses of each step, and of the trained model on full features."""
    transformer = checkpoint.load_transformer(device=device)
    config = checkpoint.transformer_config
    widths = (config.text_embedding_dim, config.speaker_embedding_dim)
    sigmas = training_sigmas(3.0)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    losses: dict[str, list[float]] = {}
    for step in range(steps):
        batch = batch_of(songs[step % len(songs)], step, sigmas, widths, stride)
        found = flow_matching_losses(transformer, batch.to(device))
        found.total(1.0).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, values in found.ssl.items():
            losses.setdefault(name, []).append(values.item())
    final: dict[str, float] = {}
    with torch.no_grad():
        for number, song in enumerate(songs):
            batch = batch_of(song, 10_000 + number, sigmas, widths, None)
            for name, values in flow_matching_losses(transformer, batch.to(device)).ssl.items():
                final[name] = final.get(name, 0.0) + values.item() / len(songs)
    return {"mean": {name: sum(values) / steps for name, values in losses.items()}, "final": final}


def main() -> int:
    """Train from full features and from each reduction, and print the differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--songs", help="songs to train on; the default makes demonstration songs")
    parser.add_argument("--checkpoint_dir", help="the default writes a tiny one with random weights")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the windows")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        songs = arguments.songs or str(Path(work, "songs"))
        if not arguments.songs:
            write_demo_songs(Path(songs))
        place = arguments.checkpoint_dir
        checkpoint = CheckpointDir.open(place) if place else write_tiny_checkpoint(Path(work, "checkpoint"))
        encoded = encode_songs(checkpoint, songs, arguments.seconds, arguments.device)
        full = train(checkpoint, encoded, arguments.steps, None, arguments.device)
        rows = []
        for stride in STRIDES:
            reduced = train(checkpoint, encoded, arguments.steps, stride, arguments.device)
            for name, loss in full["final"].items():
                dim, frames = encoded[0]["ssl"][name].shape[1], encoded[0]["ssl"][name].shape[0]
                rows.append(
                    {
                        "model": name,
                        "stride": stride,
                        "full_loss": loss,
                        "training": reduced["mean"][name] / full["mean"][name] - 1,
                        "trained": reduced["final"][name] / loss - 1,
                        "bytes": -(-frames // stride) * dim,
                        "bf16_bytes": 2 * frames * dim,
                    }
                )
    print(f"{len(encoded)} windows of {arguments.seconds:g} s, {arguments.steps} steps")
    print(
        f"{'model':>9} {'stride':>6} {'of bf16 size':>12} {'loss (full)':>12} {'while training':>15} {'trained':>9}"
    )
    for row in rows:
        print(
            f"{row['model']:>9} {row['stride']:>6} {row['bytes'] / row['bf16_bytes']:>12.3f} {row['full_loss']:>12.4f} "
            f"{row['training']:>+15.3%} {row['trained']:>+9.3%}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    default = PrecomputeConfig("", "", "").ssl_frame_stride
    worst = max(max(abs(row["training"]), abs(row["trained"])) for row in rows if row["stride"] == default)
    print(f"default stride {default}: off by {worst:.3%} at most, {MOST_RELATIVE:.0%} is allowed")
    return int(worst >= MOST_RELATIVE)


if __name__ == "__main__":
    sys.exit(main())
