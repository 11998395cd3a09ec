"""What docs/architecture.md says of the packages."""

from __future__ import annotations

import ast

import pytest

from tests.docs.pages import ROOT

PACKAGE = ROOT / "acestep_ray"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def imported(package: str) -> set[str]:
    """Top-level modules that a package's files import, anywhere in them."""
    found = set()
    for file in (PACKAGE / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").split(".")[0])
    return found


def test_every_package_is_on_the_page():
    packages = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    assert [
        name for name in packages if f"`{name}`" not in PAGE and f"`acestep_ray/{name}`" not in PAGE
    ] == []


@pytest.mark.parametrize("package", ["models", "diffusion", "data"])
def test_the_inner_packages_know_no_ray_and_no_tracker(package):
    assert "`models`, `diffusion` and `data` know no Ray and no MLflow" in PAGE
    assert "torch" in imported(package)
    assert not imported(package) & {"ray", "mlflow", "tensorboard"}
