"""The Dockerfile: what it promises, and its steps as far as they go without an engine."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

import acestep_ray
from tests.deploy.builder import ROOT, Instruction, Stage, expand, read_dockerfile

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
ARGUMENTS, STAGES = read_dockerfile(TEXT)
RUNTIME = next(stage for stage in STAGES if stage.name == "runtime")


def only(instructions: list[Instruction]) -> Instruction:
    (instruction,) = instructions
    return instruction


def ancestors(stage: Stage) -> list[Stage]:
    """The stages that a stage begins with, the nearest first."""
    found = [other for other in STAGES if other.name == stage.base]
    return [*found, *(each for other in found for each in ancestors(other))]


def test_every_stage_begins_with_a_pinned_base_or_an_earlier_stage():
    names: list[str] = []
    for stage in STAGES:
        assert stage.base in names or re.fullmatch(r"[\w/]+:[\w.-]+@sha256:[0-9a-f]{64}", stage.base), (
            stage.base
        )
        names.append(stage.name)


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_argument_chooses_between_a_cpu_and_a_cuda_stage(variant):
    _, stages = read_dockerfile(TEXT.replace("ARG VARIANT=cpu", f"ARG VARIANT={variant}"))
    dependencies = next(stage for stage in stages if stage.name == "dependencies")
    chosen = next(stage for stage in stages if stage.name == dependencies.base)
    index = next(i.value for i in chosen.all("ENV") if "TORCH_INDEX" in i.value)
    assert ("whl/cpu" in index) == (variant == "cpu")
    assert any("gcc" in i.value for i in chosen.all("RUN")) == (variant == "cuda")


def test_the_image_runs_as_a_user_by_number_which_is_not_root():
    user = only(RUNTIME.all("USER"))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user.value)
    uid = user.value.split(":")[0]
    assert any(f"--uid {uid} " in run.value for stage in ancestors(RUNTIME) for run in stage.all("RUN"))
    written_later = RUNTIME.instructions[RUNTIME.instructions.index(user) :]
    assert not {"RUN", "COPY", "ADD"} & {instruction.name for instruction in written_later}


def test_signals_reach_the_command_and_a_node_is_asked_for_its_health():
    assert json.loads(only(RUNTIME.all("ENTRYPOINT")).value) == ["/usr/bin/tini", "--"]
    assert only(RUNTIME.all("STOPSIGNAL")).value == "SIGTERM"
    assert len(RUNTIME.all("HEALTHCHECK")) == 1
    assert json.loads(only(RUNTIME.all("CMD")).value)


def test_dependencies_are_installed_before_our_source_is_there():
    dependencies = next(stage for stage in STAGES if stage.name == "dependencies")
    copied = [copy for stage in [dependencies, *ancestors(dependencies)] for copy in stage.all("COPY")]
    assert [copy.flag("from") for copy in copied] == ["requirements"]
    requirements = next(stage for stage in STAGES if stage.name == "requirements")
    assert [copy.words() for copy in requirements.all("COPY")] == [["pyproject.toml", "./"]]


def test_layers_keep_no_cache_and_hold_no_secret():
    for stage in STAGES:
        for run in stage.all("RUN"):
            for each in re.findall(r"pip (?:install|wheel)[^&]*", run.value):
                assert "--no-cache-dir" in each
            assert ("apt-get install" in run.value) == ("rm -rf /var/lib/apt/lists/*" in run.value)
        for instruction in [*stage.all("ARG"), *stage.all("ENV")]:
            assert not re.search(r"\w*(TOKEN|SECRET|PASSWORD|_KEY|CREDENTIAL)\w*=", instruction.value)
        assert not stage.all("ADD")


def test_ray_asks_for_a_token_in_every_container():
    variables = " ".join(i.value for stage in ancestors(RUNTIME) for i in stage.all("ENV"))
    assert "RAY_AUTH_MODE=token" in variables


def test_the_builder_is_sent_what_is_copied_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    allowed = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    copied = {
        source
        for stage in STAGES
        for copy in stage.all("COPY")
        if copy.flag("from") is None
        for source in copy.words()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_every_step_is_valid_shell():
    for stage in STAGES:
        for run in stage.all("RUN"):
            command = re.sub(r"^(--\S+\s+)+", "", run.value)
            done = subprocess.run(["sh", "-nc", command], capture_output=True, text=True, check=False)
            assert done.returncode == 0, (command, done.stderr)


def test_the_image_has_the_ray_that_pyproject_and_the_clusters_name():
    dependencies = next(stage for stage in STAGES if stage.name == "dependencies")
    versions = dict(argument.value.split("=") for argument in dependencies.all("ARG"))
    installs = expand(dependencies.all("RUN")[-1].value, versions)
    assert f'"ray=={versions["RAY_VERSION"]}"' in installs
    cluster = (ROOT / "cluster/kuberay/base/ray-cluster.yaml").read_text(encoding="utf-8")
    assert f"rayVersion: {versions['RAY_VERSION']}\n" in cluster
    for name in ("aws", "gcp"):
        assert f'"ray=={versions["RAY_VERSION"]}"' in (ROOT / f"cluster/{name}.yaml").read_text(
            encoding="utf-8"
        )


@pytest.mark.deploy
def test_hadolint_finds_nothing(linter):
    done = linter("hadolint", "Dockerfile")
    assert done.returncode == 0, done.stdout


@pytest.mark.deploy
def test_the_list_of_dependencies_is_that_of_the_wheel(image):
    (wheel,) = image.path("wheel", "/wheels").glob("*.whl")
    listed = image.path("requirements", "/build/requirements.txt").read_text(encoding="utf-8").splitlines()
    assert listed == (image.environment / "requirements.txt").read_text(encoding="utf-8").splitlines()
    script = (
        "import sys, zipfile, email; from packaging.requirements import Requirement as R\n"
        "names = zipfile.ZipFile(sys.argv[1]).namelist()\n"
        "data = zipfile.ZipFile(sys.argv[1]).read(next(n for n in names if n.endswith('METADATA'))).decode()\n"
        "for each in email.message_from_string(data).get_all('Requires-Dist'):\n"
        "    r = R(each)\n"
        "    if r.marker is None or any(r.marker.evaluate({'extra': e}) for e in ('s3', 'gcs', 'search')):\n"
        "        r.marker = None; print(r)"
    )
    done = subprocess.run([sys.executable, "-c", script, wheel], capture_output=True, text=True, check=True)
    assert {line.replace(" ", "") for line in listed} == {normal(line) for line in done.stdout.splitlines()}


def normal(requirement: str) -> str:
    """A requirement with its bounds in the order of pyproject.toml: the lower one first."""
    match = re.fullmatch(r"([^<>=!~]+)(.*)", requirement.replace(" ", ""))
    return match[1] + ",".join(sorted(match[2].split(","), key=lambda bound: bound.startswith("<")))


@pytest.mark.deploy
def test_the_installed_command_runs_from_anywhere(image, tmp_path):
    for command in (["acestep-ray"], ["python", "-m", "acestep_ray"]):
        done = image.run(*command, "--version", cwd=tmp_path)
        assert (done.returncode, done.stdout.strip()) == (0, acestep_ray.__version__), done.stderr
        assert "precompute" in image.run(*command, "--help", cwd=tmp_path).stdout
    where = image.run("python", "-c", "import acestep_ray; print(acestep_ray.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(image.environment)


@pytest.mark.deploy
def test_every_pipeline_of_the_image_starts(image, tmp_path):
    scripts = sorted((image.environment / "pipelines").glob("*.py"))
    assert [script.name for script in scripts] == sorted(
        path.name for path in (ROOT / "pipelines").glob("*.py")
    )
    for script in scripts:
        done = image.run("python", str(script), "--help", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert script.stem in done.stdout.splitlines()[0]


@pytest.fixture
def short_folder():
    """The names of Ray's sockets, which lie in it, may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield folder


@pytest.mark.deploy
@pytest.mark.ray
def test_the_health_check_tells_a_node_that_runs_from_one_that_does_not(tmp_path, short_folder):
    check = json.loads(only(RUNTIME.all("HEALTHCHECK")).value.split("CMD", 1)[1])
    gcs, agent, dashboard = free_ports(3)
    environment = {
        **os.environ,
        "RAY_AGENT_PORT": str(agent),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def is_healthy() -> bool:
        return subprocess.run(check, env=environment, capture_output=True, check=False).returncode == 0

    assert not is_healthy()
    log = (tmp_path / "log").open("w")
    command = ["ray", "start", "--head", "--block", "--num-cpus=1", "--object-store-memory=100000000"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    node = subprocess.Popen(
        [*command, f"--temp-dir={short_folder}"],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    processes = []
    try:
        deadline = time.monotonic() + 90
        while not is_healthy():
            assert node.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        processes = psutil.Process(node.pid).children(recursive=True)
        assert any("raylet" in process.name() for process in processes)
        node.send_signal(signal.SIGTERM)  # the image's STOPSIGNAL
        node.wait(timeout=60)
        _, alive = psutil.wait_procs(processes, timeout=30)
        assert not alive
        assert not is_healthy()
    finally:
        for process in [*processes, *([psutil.Process(node.pid)] if node.poll() is None else [])]:
            if process.is_running():
                process.kill()


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
