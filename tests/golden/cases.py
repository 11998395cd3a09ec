"""Golden cases as the project's own batches, and the small transformer that they were computed with."""

from __future__ import annotations

import torch
from torch import Tensor

from acestep_ray.diffusion.objective import SSLTarget, TrainingBatch
from acestep_ray.diffusion.schedule import sigma_index, training_sigmas
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.transformer_config import TransformerConfig


def build_transformer(golden) -> ACEStepTransformer:
    """The transformer of the golden values, weights by the rule."""
    model = ACEStepTransformer(TransformerConfig.from_dict(golden.manifest["transformer_config"]))
    golden.fill(model)
    return model


def pad_features(features: list[Tensor]) -> SSLTarget:
    """Features of several songs as one padded target."""
    lengths = torch.tensor([len(f) for f in features])
    return SSLTarget(torch.nn.utils.rnn.pad_sequence(features, batch_first=True), lengths)


def stored_batch(golden, case: str) -> TrainingBatch:
    """The batch of `forward/<case>`."""
    prefix = f"forward/{case}/in/"
    values = {k.removeprefix(prefix): v for k, v in golden.tensors.items() if k.startswith(prefix)}
    batch_size, _, _, width = values["latents"].shape
    return TrainingBatch(
        latents=values["latents"],
        noise=values["noise"],
        sigmas=training_sigmas()[sigma_index(values["u"])],
        frame_mask=torch.ones(batch_size, width, dtype=torch.bool),
        text=values["text"],
        text_mask=values["text_mask"].bool(),
        speaker=values["speaker"],
        lyric_ids=values["lyric_ids"],
        lyric_mask=values["lyric_mask"].bool(),
        ssl={
            name: pad_features([values[f"ssl_{name}_{i}"] for i in range(batch_size)])
            for name in golden.manifest["transformer_config"]["ssl_names"]
        },
    )


def trajectory_batch(golden, step: int) -> TrainingBatch:
    """The batch of one step of the ten-step trajectories: `forward/full`'s shapes, tensors by the rule."""
    like = stored_batch(golden, "full")
    tag = f"{golden.salt}/traj/{step}"
    lyric_mask = like.lyric_mask
    vocabulary = golden.manifest["transformer_config"]["lyric_encoder_vocab_size"]
    ids = golden.random_state(f"{tag}/lyric_ids").randint(1, vocabulary, size=tuple(lyric_mask.shape))
    u = torch.sigmoid(golden.normal(f"{tag}/u", (len(like.sigmas),)))
    return TrainingBatch(
        latents=golden.normal(f"{tag}/latents", like.latents.shape),
        noise=golden.normal(f"{tag}/noise", like.noise.shape),
        sigmas=training_sigmas()[sigma_index(u)],
        frame_mask=like.frame_mask,
        text=golden.normal(f"{tag}/text", like.text.shape),
        text_mask=like.text_mask,
        speaker=golden.normal(f"{tag}/speaker", like.speaker.shape),
        lyric_ids=torch.from_numpy(ids) * lyric_mask,
        lyric_mask=lyric_mask,
        ssl={
            name: pad_features(
                [
                    golden.normal(f"{tag}/ssl/{name}/{i}", (int(length), target.features.shape[-1]))
                    for i, length in enumerate(target.lengths)
                ]
            )
            for name, target in like.ssl.items()
        },
    )
