"""A reader of the Dockerfile, and its steps in folders of this machine in place of an image's layers."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What the dependencies stage takes from an index: minutes, gigabytes, and another build of torch than the one here.
_FROM_AN_INDEX = re.compile(r"pip install .*(--index-url|--requirement)", re.DOTALL)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, its continued lines joined."""

    name: str
    value: str

    def words(self) -> list[str]:
        """The value's words that are no `--flag=…`."""
        return [word for word in shlex.split(self.value) if not word.startswith("--")]

    def flag(self, name: str) -> str | None:
        """The value of the leading flag `--name=…`."""
        match = re.search(rf"(?:^|\s)--{name}=(\S+)", self.value)
        return match[1] if match else None


@dataclass
class Stage:
    """A stage: what it begins with, and what is done in it."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.name == name]


def read_dockerfile(text: str) -> tuple[dict[str, str], list[Stage]]:
    """The arguments before the first stage, and the stages; `${…}` in a FROM is replaced by the argument's default."""
    lines = [line for line in text.splitlines() if not line.strip().startswith("#")]
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        name, _, value = line.strip().partition(" ")
        instruction = Instruction(name.upper(), value.strip())
        if instruction.name == "FROM":
            base, _, stage = expand(instruction.value, arguments).partition(" AS ")
            stages.append(Stage(stage.strip(), base.strip()))
        elif stages:
            stages[-1].instructions.append(instruction)
        else:
            key, _, default = instruction.value.partition("=")
            arguments[key] = default
    return arguments, stages


def expand(text: str, values: dict[str, str]) -> str:
    """`${NAME}` in `text` replaced by the value."""
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)


@dataclass(frozen=True)
class Image:
    """The folders that the Dockerfile's stages made."""

    folder: Path

    def path(self, stage: str, absolute: str) -> Path:
        """Where a stage's absolute path lies."""
        return self.folder / stage / absolute.lstrip("/")

    @property
    def environment(self) -> Path:
        """The virtual environment of the last stage."""
        return self.path("dependencies", "/opt/acestep")

    def run(self, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the image away from the checkout."""
        variables = {"PATH": f"{self.environment}/bin:/usr/bin:/bin", "HOME": str(cwd), **variables}
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "LANG") if name in os.environ}
        return subprocess.run(
            command, cwd=cwd, env=kept | variables, capture_output=True, text=True, timeout=600, check=False
        )


class Builder:
    """Carries out the stages `requirements`, `wheel`, `dependencies` and `runtime`.

    Two things are not as in an image. The distribution's packages and the user are left out, and what is installed from
    an index is taken from the environment that the tests run in, which a `.pth` file adds.
    """

    def __init__(self, folder: Path):
        self.image = Image(folder)
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        (self.bin / "python").symlink_to(sys._base_executable)

    def build(self, stages: list[Stage]) -> Image:
        """Run the stages in their order."""
        for stage in stages:
            if stage.name in ("requirements", "wheel", "dependencies"):
                self._build(stage, stage.name)
            elif stage.name == "runtime":
                self._build(stage, "dependencies")
        return self.image

    def _build(self, stage: Stage, folder: str) -> None:
        directory = self.image.folder / folder
        directory.mkdir(exist_ok=True)
        values = {}
        for instruction in stage.instructions:
            if instruction.name == "WORKDIR":
                directory = self.image.path(folder, instruction.value)
                directory.mkdir(parents=True, exist_ok=True)
            elif instruction.name == "ARG":
                name, _, default = instruction.value.partition("=")
                values[name] = default
            elif instruction.name == "COPY":
                self._copy(instruction, folder, directory)
            elif instruction.name == "RUN" and _FROM_AN_INDEX.search(instruction.value):
                self._add_present_packages()
            elif instruction.name == "RUN":
                self._run(instruction, folder, directory, values)

    def _copy(self, instruction: Instruction, folder: str, directory: Path) -> None:
        *sources, target = instruction.words()
        stage = instruction.flag("from")
        destination = self.image.path(folder, target) if target.startswith("/") else directory / target
        for name in sources:
            source = ROOT / name if stage is None else self.image.path(stage, name)
            if source.is_dir():
                shutil.copytree(source, destination, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, destination)

    def _run(self, instruction: Instruction, folder: str, directory: Path, values: dict[str, str]) -> None:
        command = re.sub(r"^(--\S+\s+)+", "", instruction.value)
        command = command.replace("/opt/acestep", str(self.image.environment))
        command = command.replace("/wheels", str(self.image.path("wheel", "/wheels")))
        path = f"{self.image.environment}/bin:{self.bin}:/usr/bin:/bin"
        subprocess.run(
            ["sh", "-ec", command],
            cwd=directory,
            env={**os.environ, **values, "PATH": path},
            check=True,
            timeout=600,
        )

    def _add_present_packages(self) -> None:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = self.image.environment / "lib" / version / "site-packages"
        (packages / "present.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
