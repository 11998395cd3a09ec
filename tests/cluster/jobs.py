"""Jobs on a cluster of several nodes, handed in as a user does."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.local.nodes import LocalCluster

ROOT = Path(__file__).parent.parent.parent
# Processes of a node that do no job's work: Ray's own, actors of Ray Data that all jobs share, and Ray Train's watcher
# of a run, which reserves nothing and sometimes fails to end itself after a run that was killed.
_OWN = (
    *("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::JobSupervisor"),
    *("ray::ActorLocationTracker", "ray::_AutoscalingCoordinatorActor", "ray::_StatsActor"),
    "ray::PlacementGroupCleaner",
)
TRIAL = "ResourceTrainable"
"""What Ray Tune calls the actors of trials."""


def command(job: str, **flags: object) -> str:
    """The command line of a pipeline."""
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    return shlex.join(["python", f"pipelines/{job}.py", *given])


@dataclass
class Jobs:
    """A cluster's jobs."""

    cluster: LocalCluster

    def __post_init__(self):
        self.client = JobSubmissionClient(self.cluster.dashboard, headers=self.cluster.headers)

    def submit(self, job: str, **flags: object) -> str:
        """Hand in a pipeline with the checkout as its working directory; returns the job's id."""
        return self.client.submit_job(
            entrypoint=command(job, **flags),
            runtime_env={"working_dir": str(ROOT), "env_vars": {"OMP_NUM_THREADS": "1"}},
        )

    def run(self, job: str, **flags: object) -> str:
        """Run a pipeline to its end; returns what it said."""
        submitted = self.submit(job, **flags)
        details = self.wait(submitted)
        said = self.client.get_job_logs(submitted)
        assert details.status == JobStatus.SUCCEEDED, f"{details.message}\n{said}"
        return said

    def wait(self, job: str, seconds: float = 900) -> JobDetails:
        """Wait for a job's end."""
        deadline = time.monotonic() + seconds
        while not (details := self.client.get_job_info(job)).status.is_terminal():
            assert time.monotonic() < deadline, f"{job} goes on\n{self.client.get_job_logs(job)}"
            time.sleep(0.2)
        return details

    def wait_until(self, condition: Callable[[], bool], job: str, seconds: float = 300) -> None:
        """Wait for a moment at which a job is to be disturbed."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.client.get_job_info(job).status.is_terminal() or time.monotonic() > deadline:
                raise AssertionError(f"the moment has not come\n{self.client.get_job_logs(job)}")
            time.sleep(0.1)

    def stop(self, job: str) -> JobDetails:
        """Stop a job and wait until nothing of it is left; returns how it ended."""
        self.client.stop_job(job)
        details = self.wait(job)
        deadline = time.monotonic() + 60
        while left := self.processes():
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
        return details

    def stop_all(self) -> None:
        """Stop what a test that has failed left running."""
        for details in self.client.list_jobs():
            if details.submission_id is not None and not details.status.is_terminal():
                self.stop(details.submission_id)

    def processes(self) -> list[str]:
        """Titles of the processes that work for jobs, on all nodes."""
        titles = []
        for node in self.cluster.nodes.values():
            for process in node.processes():
                with contextlib.suppress(psutil.Error):
                    title = " ".join(process.cmdline()).strip()
                    if (title.startswith("ray::") and not title.startswith(_OWN)) or "pipelines/" in title:
                        titles.append(title)
        return titles

    def working_places(self, title: str) -> list[str]:
        """Names of the nodes where a process whose title has this in it runs now."""
        return [name for name, node in self.cluster.nodes.items() if node.processes(title)]

    def places(self, what: str, name: str) -> set[str]:
        """Names of the nodes that `tasks` or `actors` of this name have run on."""
        names = {node: name for name, node in self.cluster.alive().items()}
        column = {"tasks": "name", "actors": "class_name"}[what]
        return {
            names[row["node_id"]] for row in self.cluster.rows(what) if name in row[column] and row["node_id"]
        }
