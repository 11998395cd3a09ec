"""What the package's source never does, read from its syntax: no test can run every file that a stranger writes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "acestep_ray").rglob("*.py"), *(ROOT / "pipelines").glob("*.py")])

# Where the one careful use of it is.
EXCEPT = {
    "yaml.load": {"plain_yaml.py"},
    "zipfile": {"torch_archive.py"},
    # As a stream, of which regular files alone are copied, below one folder.
    "tarfile": {"unpacking.py", "tars.py"},
    "tarfile.open": {"tars.py"},
}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads"),
    *("dill.load", "dill.loads", "marshal.load", "marshal.loads", "shelve.open", "joblib.load"),
    *("pandas.read_pickle", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
    *(
        "yaml.load",
        "yaml.safe_load",
        "yaml.full_load",
        "yaml.unsafe_load",
        "yaml.load_all",
        "yaml.safe_load_all",
    ),
    *("tarfile.open", "shutil.unpack_archive", "pyarrow.parquet.read_table", "datasets.load_dataset"),
}
FORBIDDEN_METHODS = {"extractall", "read_parquet"}
FORBIDDEN_IMPORTS = {"marshal", "shelve", "joblib", "dill", "cloudpickle", "tarfile", "zipfile"}
FORBIDDEN_FLAGS = {"trust_remote_code", "shell"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a file with the full name of what is called, as its imports say."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, _, rest = ast.unparse(node.func).partition(".")
            yield f"{names.get(first, first)}{'.' * bool(rest)}{rest}", node


def problems(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            yield from (
                f"import {name}"
                for name in (module.partition(".")[0] for module in modules)
                if name in FORBIDDEN_IMPORTS and path.name not in EXCEPT.get(name, ())
            )
    for name, call in calls(path):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in FORBIDDEN_CALLS and path.name not in EXCEPT.get(name, ()):
            yield f"{name}()"
        if isinstance(call.func, ast.Attribute) and call.func.attr in FORBIDDEN_METHODS:
            yield f"….{call.func.attr}()"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load() without weights_only=True"
        if name == "numpy.load" and given.get("allow_pickle") != "False":
            yield "numpy.load() without allow_pickle=False"
        yield from (
            f"{flag}={given[flag]}" for flag in FORBIDDEN_FLAGS if given.get(flag, "False") != "False"
        )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_runs_what_a_file_says_is_called(path):
    assert list(problems(path)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('a', weights_only=False)",
        "from torch import load as read\nread('a')",
        "import numpy as np\nnp.load('a')",
        "import pickle\npickle.loads(b'')",
        "import yaml\nyaml.safe_load('')",
        "eval('1')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "Model.from_pretrained('a', trust_remote_code=True)",
        "import zipfile\nzipfile.ZipFile('a').extractall()",
        "import tarfile",
        "import pyarrow.parquet as pq\npq.read_table('a')",
    ],
)
def test_each_of_these_would_be_found(tmp_path, source):
    (tmp_path / "module.py").write_text(source)
    assert list(problems(tmp_path / "module.py"))


def test_variables_of_the_environment_are_not_handed_to_rays_job_metadata():
    """Whoever sees the dashboard sees a runtime environment."""
    for path in SOURCES:
        assert "runtime_env" not in {keyword.arg for _, call in calls(path) for keyword in call.keywords}, (
            path
        )
