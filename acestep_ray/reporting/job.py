"""The report job: one page of a run, a search, or a quickstart's folder."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from acestep_ray.errors import InputError
from acestep_ray.reporting.fetched import fetched_experiment
from acestep_ray.reporting.page import Page
from acestep_ray.reporting.run import is_run, read_run
from acestep_ray.reporting.run_page import write_run
from acestep_ray.reporting.samples import add_sample
from acestep_ray.reporting.search_page import is_search, write_search
from acestep_ray.storage import Store, StoredFile, lock_name, only_writer
from acestep_ray.terminal import fact_table
from acestep_ray.units import size_text

PAGE_FILE = "report.html"
_MUSIC = "music.wav"
_EXPERIMENTS = "exps"


@dataclass(frozen=True)
class ReportSummary:
    """A page that was written."""

    page: str
    """Path or URL."""
    num_bytes: int
    notes: list[str]
    """What it warns of."""

    def render(self) -> str:
        """The summary as text."""
        page = ("report", f"{self.page} ({size_text(self.num_bytes)})")
        return fact_table([page, *(("note", note) for note in self.notes)])


def report(experiment: str, output_path: str | None = None, *, output: str | None = None) -> ReportSummary:
    """Write the page of a run, finished or not, of a search, or of what `quickstart` made; paths may be URLs.

    `output` is the earlier name of `output_path`. Raises InputError where there is nothing of these, and where the page
    cannot be written.
    """
    store = Store.at(experiment)
    page = Page(store.name)
    with fetched_experiment(store) as folder:
        if not folder.is_dir():
            raise InputError(
                "no such folder", where=experiment, fix="give the folder of an experiment, such as exps/NAME"
            )
        target = output_path or output or store.url_of(PAGE_FILE)
        with only_report(target):
            fill(page, folder, store.url)
            return ReportSummary(target, page.write(target), page.notes)


def only_report(target: str) -> contextlib.AbstractContextManager[None]:
    """Hold the place of a page. Raises InputError where another process is writing it."""
    file = StoredFile.at(target)
    return only_writer(file.store, f"--output_path {target}", lock=lock_name(file.name))


def fill(page: Page, folder: Path, place: str) -> None:
    """Fill a page with what is in a folder, or in a copy of the one at `place`. Raises InputError for nothing known."""
    if is_search(folder):
        write_search(page, folder, place)
        return
    if is_run(folder):
        write_run(page, read_run(folder, place))
        return
    runs = _runs_below(folder)
    if runs and (folder / _EXPERIMENTS).is_dir():
        write_quickstart(page, folder, runs[-1])
        return
    known = f"; in it are the experiments {', '.join(run.name for run in runs)}" if runs else ""
    raise InputError(
        f"nothing of a run is here{known}",
        where=place,
        fix="give the folder of a run or a search, such as exps/NAME, or that of a quickstart",
    )


def write_quickstart(page: Page, folder: Path, run: Path) -> None:
    """Fill a page with the music and the last run of a quickstart."""
    if (folder / _MUSIC).is_file():
        page.section("The music", "Made at the end, with the LoRA.")
        with page.guarded(_MUSIC):
            add_sample(page, folder / _MUSIC, None)
    page.section("The run", f"{run.name}, the last one in {folder / _EXPERIMENTS}.")
    write_run(page, read_run(run))


def _runs_below(folder: Path) -> list[Path]:
    """Runs in a folder, or in its folder of experiments, the last one last."""
    below = folder / _EXPERIMENTS if (folder / _EXPERIMENTS).is_dir() else folder
    runs = [path for path in below.iterdir() if path.is_dir() and (is_run(path) or is_search(path))]
    return sorted(runs, key=lambda path: path.stat().st_mtime)
