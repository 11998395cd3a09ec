"""The export job: a LoRA of ours or of anybody, in the form that a program reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from acestep_ray.config import ExportConfig
from acestep_ray.errors import InputError
from acestep_ray.export.card import read_run, write_card
from acestep_ray.export.fetched import fetched_lora
from acestep_ray.export.formats import DTYPES, FORMATS, format_files
from acestep_ray.export.hub import check_repository, planned_upload, upload
from acestep_ray.export.lora import ADAPTER_NAME, check_lora_fits
from acestep_ray.export.source import Source, open_source
from acestep_ray.hints import one_of
from acestep_ray.models.checkpoint import TRANSFORMER, CheckpointDir
from acestep_ray.models.weights import read_weights
from acestep_ray.storage import Store, check_new, fetched, is_url, output_folder
from acestep_ray.terminal import fact_table


@dataclass
class ExportSummary:
    """What was written and uploaded."""

    source: Source
    format_name: str
    directory: Path | str
    """A URL in object storage."""
    files: list[str]
    """Within the directory."""
    repository: str | None
    """Where it was uploaded, or would be."""
    planned: list[str]
    """What would be uploaded, of a dry run."""

    def render(self) -> str:
        """The summary as text."""
        loras = self.source.loras.values()
        ranks = sorted({update.rank for lora in loras for update in lora.updates.values()})
        rows: list[tuple[str, object]] = [
            *(("from", f"{lora.place} ({len(lora.updates)} modules)") for lora in loras),
            ("rank", ", ".join(map(str, ranks))),
            ("format", self.format_name),
            *(("wrote", Store.at(self.directory).url_of(name)) for name in self.files),
        ]
        if self.planned:
            told = [f"nothing was uploaded; {self.repository} would get", *self.planned]
            rows.append(("dry run", "\n  ".join(told)))
        elif self.repository is not None:
            rows.append(("Hub", f"uploaded {self.repository}"))
        return fact_table(rows)


def export(config: ExportConfig) -> ExportSummary:
    """Write a LoRA in a format, several adapters each into a folder of its name. Raises InputError."""
    check_export_config(config)
    with fetched_lora(config.input_path, config.checkpoint) as path:
        source = open_source(
            path,
            where="--input_path",
            checkpoint=config.checkpoint,
            fetched_from=config.input_path if is_url(config.input_path) else None,
        )
        facts = None
        if source.experiment is not None and source.step is not None:
            facts = read_run(source.experiment, source.step)
    if config.checkpoint_dir is not None:
        base = CheckpointDir.open(config.checkpoint_dir).path / TRANSFORMER
        shapes = {name: tuple(tensor.shape) for name, tensor, _ in read_weights(base)}
        for lora in source.loras.values():
            check_lora_fits(lora.updates, shapes, lora.place)
    files: dict[str, bytes] = {}
    for adapter, lora in source.loras.items():
        folder = "" if adapter == ADAPTER_NAME else f"{adapter}/"
        written = format_files(
            lora.updates,
            config.format,
            name=source.label + (f"-{adapter}" if folder else ""),
            dtype=DTYPES[config.dtype],
            notes=None if facts is None else facts.notes(),
        )
        files |= {f"{folder}{name}": content for name, content in written.items()}
    with output_folder(config.output_dir, last=files) as partial:
        for name, content in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        if facts is not None:
            write_card(partial, facts, format_name=config.format, files=list(files))
        names = sorted(file.relative_to(partial).as_posix() for file in partial.rglob("*") if file.is_file())
        planned = planned_upload(partial) if config.dry_run else []
    output = Store.at(config.output_dir)
    repository = config.push_to_hub
    if repository is not None and not config.dry_run:
        with fetched(output) as exported:
            repository = upload(exported, repository, exported_to=output.url)
    return ExportSummary(
        source=source,
        format_name=config.format,
        directory=output.place_of(""),
        files=names,
        repository=repository,
        planned=planned,
    )


def check_export_config(config: ExportConfig) -> None:
    """Raise InputError for settings that cannot be used."""
    if config.format not in FORMATS:
        raise InputError(
            "unknown format", where=f"--format {config.format}", fix=one_of(config.format, FORMATS)
        )
    if config.dtype not in DTYPES:
        raise InputError("unknown dtype", where=f"--dtype {config.dtype}", fix=one_of(config.dtype, DTYPES))
    if config.push_to_hub is not None:
        check_repository(config.push_to_hub)
    elif config.dry_run:
        raise InputError(
            "there is no upload to try", where="--dry_run", fix="give --push_to_hub USER/NAME too"
        )
    check_new(config.output_dir)
