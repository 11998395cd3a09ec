"""What a path given to `export` means: an experiment, one of its checkpoints, or a LoRA from anywhere."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from acestep_ray.errors import AceStepError, InputError
from acestep_ray.export.keys import other_model
from acestep_ray.export.lora import ADAPTER_NAME
from acestep_ray.export.names import is_module
from acestep_ray.export.reading import LORA_FILE, PEFT_FILE, LoraFile, find_lora_file, open_lora, some
from acestep_ray.foreign_files import seems_to_be
from acestep_ray.paths import expand_home, shell_command
from acestep_ray.storage import Store
from acestep_ray.training.experiment import CHECKPOINTS, SETTINGS_FILE
from acestep_ray.training.state import WEIGHTS_FILE, Checkpoints, DamagedCheckpointError, best_step

_OTHER_NAMES = "; if this is one, rename its keys as docs/export.md lists them"
_EXTRACT = ("acestep-ray", "export", "extract", "--finetuned_path")
_STEP = re.compile(r"step=(\d+)")


@dataclass(frozen=True)
class Source:
    """The LoRAs that a path means."""

    loras: dict[str, LoraFile]
    """By adapter; one without a name is `ADAPTER_NAME`."""
    experiment: Path | None
    """The folder of the run that trained them, where the path is of one."""
    step: int | None

    @property
    def label(self) -> str:
        """A short name for what is made of it."""
        if self.experiment is not None:
            return f"{self.experiment.name}-step{self.step}"
        (first, *_) = self.loras.values()
        # Files of these names say what form they have, not what they are.
        is_named_by_form = first.path.name in (LORA_FILE, PEFT_FILE)
        return first.path.resolve().parent.name if is_named_by_form else first.path.stem


def open_source(
    path: str | Path, *, where: str, checkpoint: str = "last", fetched_from: str | None = None
) -> Source:
    """Read the LoRAs of an experiment, a training checkpoint, or a LoRA's file or directory.

    Of an experiment `checkpoint` chooses: `last`, `best` (the lowest validation loss), or a step. `where` names the
    flag in messages, `fetched_from` the URL of what `path` is a copy of (`fetched_lora`). Raises InputError for what
    holds no whole LoRA of an ACE-Step v1 model.
    """
    path = Path(expand_home(os.fspath(path)))
    if not path.exists():
        raise InputError(
            "nothing here", where=f"{where} {path}", fix="give an experiment, a training checkpoint or a LoRA"
        )
    folder = checkpoint_folder(path, checkpoint)
    if folder is None:
        files, experiment, step = {ADAPTER_NAME: find_lora_file(path)}, None, None
    else:
        files = _files_of_checkpoint(folder)
        experiment, step = folder.resolve().parent.parent, _step_of(folder)
    loras = {adapter: open_lora(file) for adapter, file in files.items()}
    for lora in loras.values():
        check_is_ace_step(lora)
    if fetched_from is not None:
        loras = {adapter: replace(lora, place=fetched_from) for adapter, lora in loras.items()}
    return Source(loras, experiment, step)


def check_is_ace_step(lora: LoraFile) -> None:
    """Raise InputError for a LoRA with modules that no ACE-Step v1 transformer has."""
    others = [name for name in lora.updates if not is_module(name)]
    if others:
        shape = lora.updates[others[0]].shape
        model = other_model(others)
        raise InputError(
            f"this LoRA is not one of ACE-Step v1: {len(others)} of its {len(lora.updates)} modules are unknown, "
            f"{some(others)} (the first is {shape[0]} × {shape[1]})",
            where=str(lora.path),
            fix="give a LoRA of ACE-Step v1" + (f"; these are modules of {model}" if model else _OTHER_NAMES),
        )


def checkpoint_folder(path: Path, chosen: str) -> Path | None:
    """The folder `step=N` that an experiment, its checkpoints or one of these means; None for anything else."""
    path = path.resolve()
    if _STEP.fullmatch(path.name) and path.is_dir():
        # A folder that was copied out of its run is a folder with a LoRA.
        return path if path.parent.name == CHECKPOINTS else None
    folder = path if path.name == CHECKPOINTS else path / CHECKPOINTS
    checkpoints = Checkpoints(Store.at(folder))
    steps = checkpoints.steps() if folder.is_dir() else []
    if not steps:
        # The winner of a search has settings and a LoRA.
        if (path / SETTINGS_FILE).exists() and not (path / LORA_FILE).exists():
            raise InputError("this run has no checkpoint yet", where=str(path), fix="train it further")
        return None
    step = {"last": str(steps[-1])}.get(chosen, chosen)
    if chosen == "best":
        best = best_step((checkpoints.latest_state() or {"losses": {}})["losses"], steps)
        if best is None:
            raise InputError(
                "this run measured no validation loss at its checkpoints",
                where="--checkpoint best",
                fix=f"choose a step: {', '.join(map(str, steps))}",
            )
        step = str(best)
    if step not in map(str, steps):
        raise InputError(
            "the run has no such checkpoint",
            where=f"--checkpoint {chosen}",
            fix=f"last, best, or a step: {', '.join(map(str, steps))}",
        )
    return folder / f"step={step}"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step="))


def _files_of_checkpoint(folder: Path) -> dict[str, Path]:
    """The LoRA files of a training checkpoint by adapter, each found to be what was written."""
    checkpoints = Checkpoints(Store.at(folder.parent))
    step = _step_of(folder)
    try:
        noted = checkpoints.read_state(step)["files"]
    except (DamagedCheckpointError, FileNotFoundError) as error:
        raise InputError(
            f"this checkpoint is not whole ({error})", where=str(folder), fix="take another step"
        ) from None
    except AceStepError as error:
        raise InputError(str(error), where=str(folder)) from None
    names = [name for name in noted if name.rsplit("/", 1)[-1] == LORA_FILE]
    if not names:
        raise InputError(
            f"this run trained the model's own weights ({WEIGHTS_FILE}), not a LoRA",
            where=str(folder),
            fix=f"`{shell_command(*_EXTRACT, folder.parent.parent)}` makes a LoRA of them",
        )
    for name in names:
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != noted[name]["sha256"]:
            found = seems_to_be(path)
            raise InputError(
                "this file is not what training wrote" + (f": it is {found.what}" if found else ""),
                where=str(path),
                fix=found.fix if found else "copy the run again, or take another step",
            )
    return {(name.rpartition("/")[0] or ADAPTER_NAME): folder / name for name in names}
