"""The model card of a LoRA that a run of ours trained: README.md and a picture of its losses."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from acestep_ray import __version__
from acestep_ray.cache.stats import cache_stats
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.models.checkpoint import ACE_STEP_V1, TRANSFORMER
from acestep_ray.plain_files import NOTES
from acestep_ray.plain_json import load_json
from acestep_ray.plain_text import read_utf8
from acestep_ray.plain_yaml import load_yaml
from acestep_ray.reporting.curves import Log, read_log
from acestep_ray.reporting.plots import TRAINING, draw_losses
from acestep_ray.storage import Store
from acestep_ray.training.experiment import (
    CHECKPOINTS,
    FINGERPRINTS,
    IDENTITY_FILE,
    SETTINGS_FILE,
    noted_place,
)
from acestep_ray.training.scan import SONGS, read_songs
from acestep_ray.training.state import Checkpoints
from acestep_ray.training.throughput import seconds_of
from acestep_ray.training.validation import FIXED_NOISE, VALIDATION

CARD = "README.md"
PICTURE = "loss.png"
NOTES_KEY = "acestep_ray_training"
"""Entry of a file's metadata that holds a run's facts as JSON."""

# What decides what was learned; paths and machines are nobody's business.
_SETTINGS = (
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "batch_size",
    "batch_frames",
    "accumulate_grad_batches",
    "devices",
    "num_nodes",
    "precision",
    "shift",
    "ssl_coeff",
    "text_dropout",
    "speaker_dropout",
    "lyric_dropout",
    "seed",
)
_CURVES = {TRAINING: "loss", "fixed noise": f"loss/{FIXED_NOISE}", "held-out songs": f"loss/{VALIDATION}"}
"""TensorBoard's name of each curve."""
_PICTURE_DPI = 120
# Line ends of any kind, controls, and marks that turn the direction of what follows.
_NOT_ON_A_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")
_MARKS = re.compile(r"[\\`*\[\]|!~$]")


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run at one of its checkpoints."""

    name: str
    step: int
    is_release: bool | None
    """Whether it was trained on the released transformer; None where that was not noted."""
    songs: dict[str, Any] | None
    """Counts of the songs: `songs`, `hours`, and of a cache `languages` and `rejects`; None where they are gone."""
    settings: dict[str, Any]
    lora: dict[str, Any]
    """The LoRA configuration's fields."""
    losses: dict[str, dict[int, float]]
    """Curves by name, each by step; none where nothing was measured."""

    def notes(self) -> dict[str, str]:
        """The facts as an entry of a file's metadata."""
        facts = {"name": self.name, "step": self.step, "songs": self.songs, "settings": self.settings}
        return {NOTES_KEY: json.dumps({**facts, "lora": self.lora, "program": f"acestep-ray {__version__}"})}


def read_run(experiment: Path, step: int) -> RunFacts:
    """What a run's folder, its logs and its songs tell; what is not at hand any more is left out.

    Raises InputError for settings that cannot be read.
    """
    settings = _read(experiment / SETTINGS_FILE, load_yaml)
    identity = _read(experiment / IDENTITY_FILE, load_json)
    transformer = identity.get(FINGERPRINTS["transformer"])
    return RunFacts(
        name=experiment.name,
        step=step,
        is_release=None if transformer is None else transformer == _release_fingerprint(),
        songs=_count_songs(noted_place(settings.get("dataset_path"), experiment), experiment),
        settings={name: settings[name] for name in _SETTINGS if settings.get(name) is not None},
        lora={name.removeprefix("LoRA "): v for name, v in identity.items() if name.startswith("LoRA ")},
        losses=_read_losses(experiment, settings.get("logger_dir"), step),
    )


def write_card(folder: Path, facts: RunFacts, *, format_name: str, files: list[str]) -> None:
    """Write README.md, and loss.png where there are losses, into `folder`."""
    if facts.losses:
        figure = draw_losses(facts.losses, f"{facts.name}, step {facts.step}")
        figure.savefig(folder / PICTURE, dpi=_PICTURE_DPI)
    (folder / CARD).write_text(render_card(facts, format_name, files), encoding="utf-8")


def render_card(facts: RunFacts, format_name: str, files: list[str]) -> str:
    """The card as Markdown, with the Hub's entries at its beginning."""
    head: dict[str, Any] = {"pipeline_tag": "text-to-audio", "tags": ["lora", "music", "ace-step"]}
    if facts.is_release:
        head = {"base_model": ACE_STEP_V1.repository, "base_model_relation": "adapter", **head}
    base = {
        True: f"[{ACE_STEP_V1.repository}](https://huggingface.co/{ACE_STEP_V1.repository})",
        False: "an ACE-Step v1 transformer that is not the released one",
        None: "an ACE-Step v1 transformer",
    }[facts.is_release]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {_text(facts.name)}",
        "",
        f"A LoRA for {base}, after {facts.step:,} steps of training with acestep-ray {__version__}.",
        "",
        "## Songs",
        "",
        *_song_lines(facts.songs),
        "",
        "## Settings",
        "",
        *_table(facts.lora | facts.settings),
        "",
    ]
    if facts.losses:
        lines += ["## Loss", "", f"![Losses by step]({PICTURE})", "", *_loss_lines(facts.losses), ""]
    lines += ["## Files", "", *(f"- {_code(name)}" for name in files), "", _usage(format_name), ""]
    return "\n".join(lines)


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """A file's mapping; an empty one where there is no file."""
    try:
        values = parse(read_utf8(path, NOTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the run's settings ({error})", where=str(path)) from None
    return values if isinstance(values, dict) else {}


def _release_fingerprint() -> str:
    """What `CheckpointDir.fingerprint` gives for the released transformer."""
    digest = hashlib.sha256()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        digest.update(f"{name} {ACE_STEP_V1.files[f'{TRANSFORMER}/{name}']}\n".encode())
    return digest.hexdigest()


def _count_songs(dataset_path: str | None, experiment: Path) -> dict[str, Any] | None:
    if (experiment / SONGS).is_file():  # a run without a cache noted its songs itself
        frames = read_songs(Store.at(experiment))["latent_frames"].to_numpy()
        return {"songs": len(frames), "hours": round(seconds_of(int(frames.sum())) / 3600, 3)}
    try:
        stats = cache_stats(dataset_path or "")
    except (AceStepError, OSError):
        return None  # the card says so
    languages = {name or "none": count for name, count in stats.languages.items()}
    return {
        "songs": stats.songs,
        "hours": round(stats.seconds / 3600, 3),
        "languages": languages,
        "rejects": sum(stats.rejects.values()),
    }


def _read_losses(experiment: Path, logger_dir: str | None, step: int) -> dict[str, dict[int, float]]:
    """TensorBoard's curves up to a step, else those that the checkpoint itself holds."""
    try:
        log = read_log(experiment, logger_dir)
    except (AceStepError, OSError):
        log = Log()  # then the checkpoint's own losses are all there is
    curves = {curve: dict(log[name]) for curve, name in _CURVES.items() if log[name]}
    noted = Checkpoints(Store.at(experiment / CHECKPOINTS)).read_state(step)["losses"]
    for curve, name in (("fixed noise", FIXED_NOISE), ("held-out songs", VALIDATION)):
        curves.setdefault(curve, {int(n): value for n, value in (noted.get(name) or {}).items()})
    curves = {name: {n: v for n, v in sorted(curve.items()) if n <= step} for name, curve in curves.items()}
    return {name: curve for name, curve in curves.items() if curve}


def _song_lines(songs: Mapping[str, Any] | None) -> list[str]:
    if songs is None:
        return ["The songs were not at hand when this card was written."]
    lines = [f"{songs['songs']:,} songs, {songs['hours']:.2f} hours."]
    if "languages" in songs:
        sung = ", ".join(f"{_text(name)} {count}" for name, count in songs["languages"].items())
        lines.append(f"Languages of the lyrics: {sung}. Songs that could not be used: {songs['rejects']}.")
    return lines


def _text(text: str) -> str:
    """A text of somebody else's as Markdown that shows it: no HTML, picture, link, cell or heading begins in it."""
    shown = html.escape(_NOT_ON_A_LINE.sub(" ", text), quote=False)
    # A bare address becomes a link on the Hub.
    return _MARKS.sub(r"\\\g<0>", shown).replace("://", r"\://").replace("www.", r"www\.")


def _code(text: str) -> str:
    """A name as code; the bar would end a cell of a table."""
    name = _NOT_ON_A_LINE.sub(" ", text).replace("`", "'").replace("|", "¦")
    return f"`{name.strip() or ' '}`"


def _table(values: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {_code(name)} | {_text(', '.join(map(str, value)) if isinstance(value, list) else str(value))} |"
        for name, value in values.items()
        if value not in (None, {}, [])
    ]
    return ["| setting | value |", "|---|---|", *rows]


def _loss_lines(losses: Mapping[str, Mapping[int, float]]) -> list[str]:
    lines = ["| | first | last |", "|---|---|---|"]
    for name, curve in losses.items():
        values = list(curve.values())
        lines.append(f"| {name} | {values[0]:.4f} | {values[-1]:.4f} |")
    return lines


def _usage(format_name: str) -> str:
    return {
        "universal": "Give the directory to the original's `lora_name_or_path`, put the file into ComfyUI's "
        "`models/loras`, or use `acestep-ray generate --lora_path DIRECTORY`.",
        "peft": "Load the directory with `peft.PeftModel.from_pretrained(transformer, DIRECTORY)`.",
        "comfyui": "Put the file into ComfyUI's `models/loras`.",
        "kohya": "Put the file where a program that reads kohya's names looks for LoRAs.",
    }[format_name]
