"""The import contract covers every package, and does catch what it forbids."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

COMPONENTS = ("bench", "clients", "kvstore", "proto", "transfer")

_LINT = (
    "import sys\n"
    # The finder of the editable install knows one tree only and comes before PYTHONPATH.
    "sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith('Scikit')]\n"
    "from importlinter.cli import lint_imports_command\n"
    "lint_imports_command()\n"
)

pytest.importorskip("importlinter", reason="import-linter is not installed (make env)")


def contract(root: Path) -> dict[str, Any]:
    with (root / "pyproject.toml").open("rb") as file:
        section: dict[str, Any] = tomllib.load(file)["tool"]["importlinter"]
    return section


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(tree / component) for component in COMPONENTS)
    return subprocess.run(
        [sys.executable, "-c", _LINT, "--no-logo", "--no-cache"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_package_is_under_the_contract(root: Path) -> None:
    packages = {
        f"dualpath.{path.name}"
        for component in COMPONENTS
        for path in (root / component / "dualpath").iterdir()
        if (path / "__init__.py").exists()
    }
    section = contract(root)
    assert set(section["root_packages"]) == packages
    layers = next(one for one in section["contracts"] if one["id"] == "layers")["layers"]
    assert {name.strip() for layer in layers for name in layer.split(":")} == packages


@pytest.mark.parametrize(
    ("module", "statement", "broken"),
    [
        ("transfer/dualpath/transfer/slices.py", "import dualpath.kvstore.layout", "lies below"),
        ("transfer/dualpath/transfer/region.py", "import grpc", "knows no gRPC"),
        ("kvstore/dualpath/kvstore/layout.py", "import threading", "are pure"),
        ("kvstore/dualpath/kvstore/layout.py", "import grpc.aio", "only in edge modules"),
        ("clients/dualpath/agent/__init__.py", "import dualpath.bench", "lies below"),
    ],
)
def test_a_violation_is_caught(
    root: Path, tmp_path: Path, module: str, statement: str, broken: str
) -> None:
    for component in COMPONENTS:
        shutil.copytree(
            root / component, tmp_path / component, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(root / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{statement}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    verdicts = [line for line in result.stdout.splitlines() if line.endswith("BROKEN")]
    assert any(broken in line for line in verdicts), result.stdout


def test_the_contract_is_kept(root: Path) -> None:
    result = lint_imports(root)
    assert result.returncode == 0, result.stdout + result.stderr
