"""`acestep-ray info`: what a LoRA file holds."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from acestep_ray.export.adapter_config import METADATA_KEY
from acestep_ray.export.card import NOTES_KEY
from acestep_ray.export.fetched import fetched_lora
from acestep_ray.export.lora import ADAPTER_NAME
from acestep_ray.export.names import short_name
from acestep_ray.export.reading import LoraFile
from acestep_ray.export.source import open_source
from acestep_ray.plain_json import load_json
from acestep_ray.storage import is_url
from acestep_ray.terminal import visible_line
from acestep_ray.terminal.numbers import number_text

# `transformer_blocks.3.` or `lyric_encoder.encoders.0.`: a row of the table.
_LAYER = re.compile(r"(?P<layer>(?:transformer_blocks|lyric_encoder\.encoders)\.\d+)\.(?P<part>.+)")
_SHOWN, _LISTED = 200, 100


@dataclass
class InfoSummary:
    """Figures of one LoRA, or of each adapter of a run."""

    loras: dict[str, LoraFile]
    as_json: bool

    def render(self) -> str:
        """The figures as text, or as one JSON object by adapter."""
        if self.as_json:
            figures = {adapter: lora_figures(lora) for adapter, lora in self.loras.items()}
            (only, *others) = figures.values()
            return json.dumps(figures if others else only, indent=1, ensure_ascii=False)
        return "\n\n".join(
            ("" if adapter == ADAPTER_NAME else f"adapter   {adapter}\n") + _described(lora)
            for adapter, lora in self.loras.items()
        )


def info(path: str, as_json: bool = False) -> InfoSummary:
    """Read a LoRA, or those of an experiment's last checkpoint. Raises InputError."""
    with fetched_lora(path) as local:
        source = open_source(local, where="info", fetched_from=path if is_url(path) else None)
    return InfoSummary(source.loras, as_json)


def lora_figures(lora: LoraFile) -> dict[str, Any]:
    """Everything that is told of a LoRA, in JSON's types; norms are of what is added to the weights."""
    modules = {
        name: {
            "rank": update.rank,
            "alpha": lora.scales[name] * update.rank,
            "out": update.shape[0],
            "in": update.shape[1],
            "norm": update.norm(),
        }
        for name, update in lora.updates.items()
    }
    return {
        "file": lora.place,
        "bytes": lora.num_bytes,
        "dtypes": list(lora.dtypes),
        "parameters": sum(update.a.numel() + update.b.numel() for update in lora.updates.values()),
        "dora": lora.is_dora,
        "key": lora.example,
        "ranks": sorted({module["rank"] for module in modules.values()}),
        "scale_from": lora.scale_source,
        "targets": targets(lora),
        "modules": modules,
        "metadata": {name: _parsed(value) for name, value in lora.metadata.items()},
    }


def targets(lora: LoraFile) -> dict[str, int]:
    """How many modules there are of each name: its last part, or two where the last is a number or `conv`."""
    return dict(sorted(Counter(map(short_name, lora.updates)).items()))


def norm_table(lora: LoraFile) -> list[str]:
    """Norms of what is added to the weights: a row for each layer, a column for each of its modules."""
    rows: dict[str, dict[str, float]] = {}
    for name, update in lora.updates.items():
        match = _LAYER.fullmatch(name)
        layer, part = (match["layer"], match["part"]) if match else ("", name)
        rows.setdefault(layer, {})[part] = update.norm()
    lines = []
    for part, norm in sorted(rows.pop("", {}).items()):
        lines.append(f"  {part:<32} {number_text(norm, 4):>10}")
    columns: list[str] = []
    for layer in sorted(rows, key=lambda name: (name.rpartition(".")[0], int(name.rpartition(".")[2]))):
        if list(rows[layer]) != columns:
            columns = list(rows[layer])
            lines.append(f"  {'':<32} " + " ".join(f"{column:>10}" for column in columns))
        lines.append(
            f"  {layer:<32} "
            + " ".join(f"{number_text(norm, 4):>{max(10, len(n))}}" for n, norm in rows[layer].items())
        )
    return lines


def _described(lora: LoraFile) -> str:
    figures = lora_figures(lora)
    ranks = Counter(update.rank for update in lora.updates.values())
    rank = ", ".join(f"{rank} ({count} modules)" for rank, count in ranks.most_common())
    lines = [
        f"file      {lora.place}",
        f"size      {figures['bytes']:,} bytes, {figures['parameters']:,} numbers in {', '.join(lora.dtypes)}",
        f"kind      {'DoRA' if lora.is_dora else 'LoRA'}, keys such as {lora.example}",
        f"rank      {rank}",
        f"alpha     {_strength(lora)}",
        "targets   " + ", ".join(f"{name} × {count}" for name, count in figures["targets"].items()),
    ]
    others = [(name, value) for name, value in lora.metadata.items() if name not in (METADATA_KEY, NOTES_KEY)]
    lines += [f"metadata  {_fact(name, value)}" for name, value in others[:_LISTED]]
    if len(others) > _LISTED:
        lines.append(f"metadata  … and {len(others) - _LISTED:,} more")
    trained = _parsed(lora.metadata.get(NOTES_KEY, "{}"))
    if isinstance(trained, dict):
        facts = list(trained.items())[:_LISTED]
        lines += [f"trained   {_fact(name, value)}" for name, value in facts]
    return "\n".join([*lines, "norms     of what is added to each weight", *norm_table(lora)])


def _strength(lora: LoraFile) -> str:
    """Alpha and scale, with a warning where programs would not agree on them."""
    alphas = Counter(lora.scales[name] * update.rank for name, update in lora.updates.items())
    told = ", ".join(number_text(alpha, 6) for alpha, _ in alphas.most_common(3))
    differs = any(abs(scale - 1) > 1e-6 for scale in lora.scales.values())
    if lora.scale_source is None:
        return f"{told}: the file says nothing of its strength, so alpha is taken to be the rank"
    text = f"{told} (from {lora.scale_source})"
    if differs:
        scales = Counter(round(scale, 6) for scale in lora.scales.values()).most_common(1)
        reader = (
            "that read no `.alpha`"
            if lora.scale_source == "alpha"
            else "that read no metadata, such as ComfyUI,"
        )
        text += (
            f"; programs {reader} play it at another strength, 1 instead of {number_text(scales[0][0], 6)}: "
            "`acestep-ray export` makes a file that plays alike everywhere"
        )
    return text


def _fact(name: str, value: object) -> str:
    """A name and its value on one line, each cut at `_SHOWN` characters."""
    return f"{visible_line(name[:_SHOWN])}: {visible_line(str(value)[:_SHOWN])}"


def _parsed(text: str) -> Any:
    try:
        value = load_json(text)
        json.dumps(value, indent=1)  # more levels can be read than written
    except (ValueError, RecursionError):
        return text
    return value
