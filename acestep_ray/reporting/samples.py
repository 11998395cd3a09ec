"""The music that a run made as it went, and what each piece was made from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acestep_ray.errors import AceStepError, InputError
from acestep_ray.plain_files import JSON, read_limited
from acestep_ray.plain_json import load_json
from acestep_ray.reporting.page import Page, shown
from acestep_ray.reporting.run import Run, step_of
from acestep_ray.training.experiment import noted_place

CLIPS = 12
"""At most so many are in a page: the last, the first, and others evenly between."""
_SHOWN_CHARACTERS = 20_000
_LANGUAGE = re.compile(r"\[[a-z]{2}(?:-[a-z]{2})?\]")
_SHOWN = ("prompt", "seed", "seconds", "steps", "guidance_scale", "omega", "shift")


def add_samples(page: Page, run: Run) -> None:
    """Add the sounds of a run, the last first."""
    if not run.samples:
        page.note("This run has made no samples (yet): `--every_plot_step` says when it does.")
        return
    chosen = spread(run.samples, CLIPS)
    if len(chosen) < len(run.samples):
        page.text(f"{len(chosen)} of {len(run.samples)} samples; all are in {run.place}/samples.")
    vocabulary = find_vocabulary(noted_place(run.settings.get("checkpoint_dir"), run.experiment))
    for path in reversed(chosen):
        with page.guarded(str(path)):
            add_sample(page, path, vocabulary)


def add_sample(page: Page, path: Path, vocabulary: Path | None) -> None:
    """Add one sound, with its picture and what it was made from; `vocabulary` is that of the lyrics.

    Raises InputError where it cannot be read.
    """
    noted = path.with_suffix(".json")
    try:
        made_from: dict[str, Any] = dict(load_json(read_limited(noted, JSON)))
    except FileNotFoundError:
        made_from = {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"what this sample was made from cannot be read ({error})", where=str(noted)
        ) from None
    picture = path.with_suffix(".png")
    step = step_of(path)
    page.clip(
        path,
        f"Step {step}: {made_from.get('key', path.stem)}" if step >= 0 else path.name,
        picture=picture if picture.exists() else None,
        text=_brief(lyrics_text(made_from["lyrics"], vocabulary)) if "lyrics" in made_from else None,
        facts={
            name.replace("_", " "): value if isinstance(value, (int, float)) else _brief(shown(value))
            for name in _SHOWN
            if (value := made_from.get(name)) is not None
        },
    )


def _brief(text: str) -> str:
    """The text as far as anybody sings it."""
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def find_vocabulary(checkpoint_dir: str | None) -> Path | None:
    """The lyric vocabulary of a checkpoint; None where it is not at hand."""
    from acestep_ray.models.checkpoint import CheckpointDir

    if checkpoint_dir is None:
        return None
    try:
        return CheckpointDir.open(checkpoint_dir).lyric_vocab_path()
    except (AceStepError, OSError):
        return None  # of lyrics, the page then tells how many tokens there are


def lyrics_text(lyrics: str | Sequence[int], vocabulary: Path | None) -> str:
    """Lyrics as they are, or as the model reads them where there are only their tokens.

    Raises InputError for a vocabulary that cannot be read.
    """
    if not lyrics:
        return "(no lyrics)"
    if isinstance(lyrics, str):
        return lyrics
    if vocabulary is None:
        return f"({len(lyrics)} tokens of lyrics; the checkpoint's vocabulary, which would tell them, is not at hand)"
    return _decoded(lyrics, vocabulary)


def _decoded(ids: Sequence[int], vocabulary: Path) -> str:
    """The text of lyric tokens: a line begins with its language's token."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(vocabulary))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"the lyric vocabulary cannot be read ({error})", where=str(vocabulary)) from None
    text = ""
    for number in ids:
        token = tokenizer.id_to_token(number) or "\N{REPLACEMENT CHARACTER}"
        if token == "[START]":
            continue
        if _LANGUAGE.fullmatch(token):
            text += "\n"
        else:
            text += token.replace("[SPACE]", " ")
    return "\n".join(line.strip() for line in text.strip().splitlines())


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
