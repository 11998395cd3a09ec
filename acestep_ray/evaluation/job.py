"""The evaluate job: losses on held-out songs, music made and measured, several models compared."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from acestep_ray.cache.reader import CacheReader
from acestep_ray.config import EvaluateConfig
from acestep_ray.device import check_device_name, resolve_device
from acestep_ray.diffusion.objective import denoising_losses
from acestep_ray.diffusion.schedule import training_sigmas
from acestep_ray.errors import InputError
from acestep_ray.evaluation.candidates import Candidate, find_candidates
from acestep_ray.evaluation.clips import Clip, find_clips, generate_clips
from acestep_ray.evaluation.embeddings import find_audio
from acestep_ray.evaluation.notes import Notes
from acestep_ray.evaluation.report import (
    CLIPS_TABLE,
    MODELS_TABLE,
    PAGE_FILE,
    SCORES_FILE,
    EvaluateSummary,
    write_page,
    write_tables,
)
from acestep_ray.evaluation.runs import evaluation_run, log_models, log_report
from acestep_ray.evaluation.scores import (
    ModelScore,
    Yardsticks,
    read_yardsticks,
    score_clips,
    score_rows,
)
from acestep_ray.evaluation.songs import check_lyrics, choose_songs, open_cache
from acestep_ray.export.card import read_run
from acestep_ray.generation.models import AUTO, PRECISIONS, is_bfloat16
from acestep_ray.generation.render import write_mel_picture
from acestep_ray.hints import one_of
from acestep_ray.models.checkpoint import CheckpointDir
from acestep_ray.models.codec import SAMPLE_RATE, latent_frames
from acestep_ray.models.fusing import fuse_where_possible
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.reporting.plots import draw_losses
from acestep_ray.storage import Store, check_new, fetched, output_folder
from acestep_ray.tracking import check_mlflow, mlflow_uri
from acestep_ray.training.experiment import make_folder
from acestep_ray.training.validation import fixed_noise_losses

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIPS = "clips"
AUDIO_FLAGS = ("generated_dir", "reference_dir", "training_dir")
MOST_SECONDS = 240.0


@dataclass(frozen=True)
class Plan:
    """What is to be generated."""

    candidates: list[Candidate]
    reader: CacheReader
    chosen: list[int]
    """Positions of the songs in the cache."""


def evaluate(config: EvaluateConfig) -> EvaluateSummary:
    """Measure and compare models, or audio that is there already. Raises InputError before work starts."""
    started = time.monotonic()
    check_evaluate_config(config)
    checkpoint = CheckpointDir.open(config.checkpoint_dir)
    check_encoders(config, checkpoint)
    device, notes = resolve_device(config.device), Notes()
    uri = mlflow_uri(config.tracking_uri, Path(config.logger_dir))
    output = Store.at(config.output_dir)
    settings = asdict(config)
    experiment = config.tracking_experiment
    if uri is not None:
        check_mlflow(uri, experiment, restore=config.restore_experiment)
    with contextlib.ExitStack() as copies:
        config = brought_here(config, copies)
        plan, found = None, {}
        if config.generated_dir is None:
            plan = make_plan(config, checkpoint, copies, notes)
        else:
            found = find_clips(config.generated_dir)
        if uri is not None:
            make_folder(Path(config.logger_dir), "--logger_dir")
        folder = copies.enter_context(output_folder(config.output_dir, last=[SCORES_FILE]))
        run = copies.enter_context(
            evaluation_run(uri, experiment, output.name, settings, restore=config.restore_experiment)
        )
        yardsticks = load_yardsticks(config, checkpoint, device, notes)
        curves: dict[str, Figure] = {}
        if plan is not None:
            curves = draw_curves(plan.candidates)
            made = measure_models(plan, checkpoint, folder, config, device, notes)
        else:
            made = [
                (ModelScore(name, "audio", settings["generated_dir"], 1.0), clips)
                for name, clips in found.items()
            ]
        for score, clips in made:
            score_model(score, clips, yardsticks, folder, notes)
        scores = [score for score, _ in made]
        write_page(folder / PAGE_FILE, output.name, scores, yardsticks, curves, notes.lines)
        write_tables(folder, scores, yardsticks, settings, notes.lines)
        if run is not None:
            log_models(run, experiment, output.name, scores, notes)
            files = [folder / name for name in (PAGE_FILE, SCORES_FILE, MODELS_TABLE, CLIPS_TABLE)]
            log_report(run, files, notes)
    return EvaluateSummary(
        rows=score_rows(scores),
        encoders=list(yardsticks.encoders),
        notes=notes.lines,
        output=output,
        tracking_uri=uri,
        wall_seconds=time.monotonic() - started,
    )


def brought_here(config: EvaluateConfig, copies: contextlib.ExitStack) -> EvaluateConfig:
    """The settings with folders of audio that are on this machine; of URLs there are copies as long as `copies`.

    Raises InputError for a folder without audio.
    """
    there = {flag: getattr(config, flag) for flag in AUDIO_FLAGS if getattr(config, flag) is not None}
    for flag, place in there.items():
        there[flag] = str(copies.enter_context(fetched(place)))
        find_audio(there[flag], f"--{flag}")
    return replace(config, **there)


def make_plan(
    config: EvaluateConfig, checkpoint: CheckpointDir, copies: contextlib.ExitStack, notes: Notes
) -> Plan:
    """The models and the songs, all checked. Raises InputError."""
    candidates = find_candidates(config, checkpoint, copies)
    reader = CacheReader(open_cache(config, checkpoint))
    songs = choose_songs(reader.index, candidates, config, notes)
    check_lyrics(reader, songs, checkpoint, config, notes)
    return Plan(candidates, reader, songs)


def check_evaluate_config(config: EvaluateConfig) -> None:
    """Raise InputError for settings that cannot be used."""
    check_device_name(config.device)
    check_new(config.output_dir)
    if config.generated_dir is None and (config.models is None or config.dataset_path is None):
        raise InputError(
            "there is nothing to evaluate",
            where="--models" if config.models is None else "--dataset_path",
            fix="give --models and --dataset_path, or --generated_dir with audio",
        )
    if config.generated_dir is not None and config.models is not None:
        raise InputError(
            "audio that is there already and models to make some cannot be evaluated in one run",
            where="--generated_dir and --models",
            fix="give one of the two",
        )
    if config.songs < 1:
        raise InputError("at least one song is needed", where=f"--songs {config.songs}")
    frames = latent_frames(int(config.duration * SAMPLE_RATE)) if math.isfinite(config.duration) else 0
    if not (config.duration <= MOST_SECONDS and frames >= 1):
        raise InputError("out of range", where=f"--duration {config.duration}", fix="from 1 to 240 seconds")
    if config.infer_steps < 1:
        raise InputError("at least one step is needed", where=f"--infer_steps {config.infer_steps}")
    if config.precision not in (AUTO, *PRECISIONS):
        fix = one_of(config.precision, (AUTO, *PRECISIONS))
        raise InputError("unknown precision", where=f"--precision {config.precision}", fix=fix)


def check_encoders(config: EvaluateConfig, checkpoint: CheckpointDir) -> None:
    """Raise InputError where what was asked for needs SSL encoders and there are none."""
    asked = [flag for flag in ("reference_dir", "training_dir") if getattr(config, flag) is not None]
    if asked and not checkpoint.ssl_names:
        raise InputError(
            "the checkpoint has no SSL encoder, in whose features music is compared",
            where=config.checkpoint_dir,
            fix=f"give a checkpoint that holds mert/ or mhubert/, or leave out {' and '.join(f'--{f}' for f in asked)}",
        )


def load_yardsticks(
    config: EvaluateConfig, checkpoint: CheckpointDir, device: torch.device, notes: Notes
) -> Yardsticks:
    """The real music that is given, embedded; what is left out without it is told."""
    if config.reference_dir is None:
        notes.tell("note: without --reference_dir no Fréchet distance is measured")
    if config.reference_dir is None and config.training_dir is None:
        notes.tell("note: without --training_dir nothing is said of repeated training songs")
        return Yardsticks({}, {}, {}, {}, {})
    if config.training_dir is None:
        notes.tell("note: --reference_dir is taken for the songs trained on; --training_dir names others")
    encoders = checkpoint.load_ssl_encoders(device, precision="16" if device.type == "cuda" else "32")
    return read_yardsticks(encoders, config.reference_dir, config.training_dir, notes)


def measure_models(
    plan: Plan,
    checkpoint: CheckpointDir,
    folder: Path,
    config: EvaluateConfig,
    device: torch.device,
    notes: Notes,
) -> list[tuple[ModelScore, list[Clip]]]:
    """Each model's losses, and the clips that it makes of the songs; one model is in memory at a time."""
    codec, sigmas = checkpoint.load_codec(device), training_sigmas(config.shift)
    songs = [plan.reader.read(song) for song in plan.chosen]
    made = []
    for model in plan.candidates:
        transformer = model.load(checkpoint, device)
        with mixed_precision(transformer, config, device):
            losses = fixed_noise_losses(
                partial(denoising_losses, transformer),
                plan.reader.read,
                plan.chosen,
                sigmas,
                device,
                say=notes.tell,
            )
            clips = generate_clips(transformer, codec, songs, folder / CLIPS / model.label, config, device)
        if not all(map(math.isfinite, losses)):
            notes.warn(f"the loss of {model.label} is not finite")
        score = ModelScore(model.label, model.kind, model.path, model.strength, losses=losses)
        made.append((score, clips))
    return made


def mixed_precision(
    transformer: ACEStepTransformer, config: EvaluateConfig, device: torch.device
) -> torch.autocast:
    """The context that a model computes in, as the settings ask; in bfloat16 it takes the fused path where it can."""
    half = is_bfloat16(config.precision, on_gpu=device.type == "cuda")
    if half:
        fuse_where_possible(transformer, device)
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def score_model(
    score: ModelScore, clips: Sequence[Clip], yardsticks: Yardsticks, folder: Path, notes: Notes
) -> None:
    """Add what the clips say of a model to its score, and write their pictures.

    Raises InputError where none of them can be read.
    """
    pictures = folder / CLIPS / score.label
    pictures.mkdir(parents=True, exist_ok=True)

    def draw(clip: Clip, wave: np.ndarray) -> Path:
        name = clip.key.replace("/", "_") if clip.path is None or clip.seed is None else clip.path.name
        picture = pictures / f"{name}.png"
        write_mel_picture(picture, wave, f"{clip.key} · {score.label}")
        return picture

    score.clips, score.frechet = score_clips(score.label, clips, yardsticks, notes, draw)
    score.marks = yardsticks.marks
    if not score.clips:
        raise InputError("none of these clips can be read", where=f"{score.path} ({score.label})")


def draw_curves(candidates: Sequence[Candidate]) -> dict[str, Figure]:
    """The training losses of models that come from a run, by model, as far as they are still known."""
    curves = {}
    for candidate in candidates:
        if candidate.experiment is not None and candidate.step is not None:
            losses = read_run(candidate.experiment, candidate.step).losses
            if losses:
                title = f"{candidate.experiment.name}, up to step {candidate.step}"
                curves[candidate.label] = draw_losses(losses, title)
    return curves
