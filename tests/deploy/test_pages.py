"""The commands in the pages on deployment are ones that `acestep-ray` takes, and the files that they name are there."""

from __future__ import annotations

import re
import shlex

import pytest

from acestep_ray.cli import build_parser, with_export_action, with_switches_on
from tests.deploy.builder import ROOT

PAGES = ("cluster/README.md", "docs/deploy.md")
_OURS = re.compile(r"(?:python (pipelines/\w+\.py)|(?:^|\s)acestep-ray (?=[a-z]))(.*)", re.DOTALL)


def commands(page: str) -> list[str]:
    """The commands in a page's shell blocks, continued lines joined."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line) for line in lines if line and not line.startswith("#")]


def our_commands() -> list[str]:
    found = [match for page in PAGES for line in commands(page) if (match := _OURS.search(line))]
    return [f"{match[1] or ''} {match[2]}" for match in found if "…" not in match[2]]


@pytest.mark.parametrize("command", our_commands())
def test_a_command_has_flags_that_its_job_has(command):
    words = shlex.split(command)
    if words[0].startswith("pipelines/"):
        script = ROOT / words[0]
        assert script.exists()
        words[0] = script.stem
    build_parser().parse_args(with_switches_on(with_export_action(words)))


@pytest.mark.parametrize("page", PAGES)
def test_folders_and_files_that_commands_name_are_there(page):
    named = re.findall(r"(?:apply -k|ray (?:up|down|dashboard)) (\S+)", "\n".join(commands(page)))
    assert all((ROOT / name).exists() for name in named)


def test_every_job_of_a_cluster_has_its_command_in_the_page():
    submitted = {
        words[1] for command in our_commands() if (words := re.match(r"pipelines/(\w+)\.py", command))
    }
    assert submitted == {path.stem for path in (ROOT / "pipelines").glob("*.py")} - {"quickstart"}


def test_every_overlay_is_in_the_page_s_table():
    text = (ROOT / "cluster/README.md").read_text(encoding="utf-8")
    overlays = {path.parent.name for path in ROOT.glob("cluster/kuberay/overlays/*/kustomization.yaml")}
    assert overlays == set(re.findall(r"^\| `([\w-]+)` \| \d+ CPUs", text, re.MULTILINE))
