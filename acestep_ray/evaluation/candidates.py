"""The models to compare: what `--models` names, checked against the base before any of them is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from acestep_ray.config import EvaluateConfig
from acestep_ray.errors import AceStepError, InputError
from acestep_ray.export.extract import check_same_layout, find_transformer
from acestep_ray.export.fetched import fetched_lora
from acestep_ray.export.lora import check_lora_fits, merge_loras
from acestep_ray.export.reading import LORA_FILE
from acestep_ray.export.source import checkpoint_folder, open_source
from acestep_ray.foreign_files import explained
from acestep_ray.models.checkpoint import TRANSFORMER, CheckpointDir
from acestep_ray.models.transformer import ACEStepTransformer
from acestep_ray.models.weights import read_weights
from acestep_ray.paths import split_paths
from acestep_ray.storage import Store, is_url
from acestep_ray.training.state import WEIGHTS_FILE, Checkpoints, DamagedCheckpointError

BASE = "base"
_WEIGHTS = Path(WEIGHTS_FILE).stem  # further files of one checkpoint are numbered


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate: the base, with or without changes."""

    label: str
    """A name that no other model of the evaluation has; also that of its folder of clips."""
    kind: str
    """`base`, `LoRA`, `trained weights` (of a training checkpoint) or `transformer` (a folder)."""
    path: str
    """As it was given."""
    strength: float = 1.0
    """Of its LoRA."""
    loras: tuple[Path, ...] = ()
    """Its files; those of one run's adapters belong together."""
    transformer: Path | None = None
    checkpoint: tuple[Checkpoints, int] | None = None
    """Where its trained weights lie, and the step."""
    experiment: Path | None = None
    """Folder of the run that made it, where it comes from one."""
    step: int | None = None
    """Of that run."""

    def load(self, base: CheckpointDir, device: torch.device) -> ACEStepTransformer:
        """The model, frozen. Raises InputError for files that are damaged."""
        model = base.load_transformer(device=device, directory=self.transformer)
        if self.loras:
            merge_loras(model, [(path, self.strength) for path in self.loras])
        if self.checkpoint is not None:
            checkpoints, step = self.checkpoint
            parameters = dict(model.named_parameters())
            try:
                weights = checkpoints.read_weights(step)
            except DamagedCheckpointError as error:
                raise InputError(f"this checkpoint is damaged ({error})", where=self.path) from None
            with torch.no_grad():
                for name, tensor in weights.items():
                    parameters[name].copy_(tensor)
        return model.eval().requires_grad_(False)


def find_candidates(config: EvaluateConfig, base: CheckpointDir, copies: ExitStack) -> list[Candidate]:
    """The models of `--models`, each found to fit the base; what is in object storage is copied as long as `copies`.

    Raises InputError for what is no model, is damaged, or was made for a model of another size.
    """
    paths = split_paths(config.models or "")
    if not paths:
        raise InputError("no model is given", where="--models", fix="give `base`, LoRAs or experiments")
    strengths = _strengths(config.lora_weight, len(paths))
    shapes = {name: tuple(t.shape) for name, t, _ in read_weights(base.path / TRANSFORMER)}
    found = []
    for path, strength in zip(paths, strengths, strict=True):
        candidate = _open(path, config.checkpoint, base, shapes, copies)
        if strength is not None and candidate.kind == "LoRA":
            candidate = replace(candidate, strength=strength)
        elif strength not in (None, 1.0):
            raise InputError(
                f"`{path}` has no LoRA whose strength could be changed",
                where=f"--lora_weight {config.lora_weight}",
                fix="give 1 in its place",
            )
        found.append(candidate)
    return _with_own_labels(found)


def _strengths(text: str | None, count: int) -> Sequence[float | None]:
    if text is None:
        return [None] * count
    try:
        numbers = [float(item) for item in text.split(",")]
    except ValueError:
        numbers = [float("nan")]
    if not all(abs(number) < float("inf") for number in numbers):
        raise InputError("not a list of numbers", where=f"--lora_weight {text}", fix="such as 1,0.5")
    if len(numbers) != count:
        raise InputError(
            f"{len(numbers)} strengths for {count} models",
            where=f"--lora_weight {text}",
            fix="give as many as there are in --models, with commas between them",
        )
    return numbers


def _open(
    path: str, checkpoint: str, base: CheckpointDir, shapes: Mapping[str, Sequence[int]], copies: ExitStack
) -> Candidate:
    if path == BASE:
        return Candidate(BASE, BASE, path)
    if is_url(path):
        return _open_lora(path, copies.enter_context(fetched_lora(path, checkpoint)), checkpoint, shapes)
    trained = _trained_weights(Path(path), checkpoint, shapes)
    if trained is not None:
        checkpoints, step = trained
        experiment = checkpoints.store.path.parent
        label = f"{experiment.name}-step{step}"
        return Candidate(label, "trained weights", path, checkpoint=trained, experiment=experiment, step=step)
    folder = Path(path)
    if (folder / "config.json").is_file() or (folder / TRANSFORMER / "config.json").is_file():
        transformer = find_transformer(path)
        check_same_layout(base.path / TRANSFORMER, transformer)
        named = transformer.resolve().parent if transformer.name == TRANSFORMER else transformer.resolve()
        return Candidate(named.name, "transformer", path, transformer=transformer)
    return _open_lora(path, folder, checkpoint, shapes)


def _open_lora(given: str, path: Path, checkpoint: str, shapes: Mapping[str, Sequence[int]]) -> Candidate:
    """The model with the LoRA in `path`, which is `given` or a copy of it."""
    fetched_from = given if is_url(given) else None
    source = open_source(path, where="--models", checkpoint=checkpoint, fetched_from=fetched_from)
    for lora in source.loras.values():
        check_lora_fits(lora.updates, shapes, lora.place)
    files = tuple(lora.path for lora in source.loras.values())
    return Candidate(source.label, "LoRA", given, loras=files, experiment=source.experiment, step=source.step)


def _trained_weights(
    path: Path, chosen: str, shapes: Mapping[str, Sequence[int]]
) -> tuple[Checkpoints, int] | None:
    """The checkpoint of a run that trained the model's own weights; None for anything else.

    Raises InputError where an experiment has no checkpoint of that name.
    """
    folder = checkpoint_folder(path, chosen)
    if folder is None:
        return None
    checkpoints, step = Checkpoints(Store.at(folder.parent)), int(folder.name.removeprefix("step="))
    try:
        files = checkpoints.read_state(step)["files"]
    except (DamagedCheckpointError, AceStepError):
        return None  # `open_source` says what is wrong
    if any(name.rpartition("/")[2] == LORA_FILE for name in files):
        return None
    _check_shapes([folder / name for name in files if name.startswith(_WEIGHTS)], shapes)
    return checkpoints, step


def _check_shapes(files: Iterable[Path], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise InputError where trained weights have other names or shapes than the base's."""
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            reason, fix = explained(path, error, "copy it again, or take another step")
            raise InputError(f"this checkpoint is damaged ({reason})", where=str(path), fix=fix) from None
        wrong = [name for name, shape in found.items() if shapes.get(name) != shape]
        if wrong:
            raise InputError(
                f"{len(wrong)} trained weights do not fit the checkpoint: `{wrong[0]}` is {found[wrong[0]]} in "
                f"the run, {shapes.get(wrong[0], 'missing')} in the checkpoint",
                where=str(path),
                fix="give the checkpoint that the run was started from",
            )


def _with_own_labels(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with labels that can name folders, and that differ."""
    labels: list[str] = []
    for candidate in candidates:
        label = candidate.label if candidate.strength == 1 else f"{candidate.label}@{candidate.strength:g}"
        same = sum(other == label or other.startswith(f"{label} (") for other in labels)
        labels.append(f"{label} ({same + 1})" if same else label)
    return [replace(candidate, label=label) for candidate, label in zip(candidates, labels, strict=True)]
