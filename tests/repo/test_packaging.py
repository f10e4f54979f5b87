"""The wheel holds every portion of the namespace and works in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

COMPONENTS = ("bench", "clients", "kvstore", "proto", "transfer")

_EXTENSIONS = {
    "dualpath/bench/transfer/_null_verbs.abi3.so",
    "dualpath/kvstore/_native.abi3.so",
    "dualpath/transfer/_native.abi3.so",
    "dualpath/transfer/rdma/_verbs.abi3.so",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, root],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "Could not find a version that satisfies the requirement scikit-build-core" in built.stderr:
        pytest.skip(f"no scikit-build-core to build with: {built.stderr[-300:]}")
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_portion_and_nothing_else(
    root: Path, files: tuple[Path, ...], wheel: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(path.parts[0]).as_posix()
        for path in files
        if path.parts[0] in COMPONENTS and path.parts[1] == "dualpath"
    }
    assert names - _EXTENSIONS == expected
    assert "dualpath/__init__.py" not in names
    assert any(name.endswith(".proto") for name in names)
    for package in ("agent", "bench", "cli", "client", "kvstore", "proto", "transfer"):
        assert f"dualpath/{package}/py.typed" in names, "typed packages say so (PEP 561)"


def test_without_a_compiler_the_wheel_is_pure_and_whole(root: Path, tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, root],
        env={**os.environ, "CC": "/bin/false"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "Could not find a version that satisfies the requirement scikit-build-core" in built.stderr:
        pytest.skip(f"no scikit-build-core to build with: {built.stderr[-300:]}")
    assert built.returncode == 0, built.stderr
    (path,) = tmp_path.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        assert "dualpath/kvstore/block_store.py" in archive.namelist()
        assert not _EXTENSIONS & set(archive.namelist())


def test_the_wheel_works_in_an_environment_without_extras(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", wheel],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if "No matching distribution" in installed.stderr or "Connection" in installed.stderr:
        pytest.skip(f"the dependencies cannot be fetched: {installed.stderr[-300:]}")
    assert installed.returncode == 0, installed.stderr
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    for arguments in (["--version"], ["--help"], ["serve", "--help"], ["doctor", "--json"]):
        ran = subprocess.run(
            [tmp_path / "venv" / "bin" / "dualpath", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, f"{arguments}: {ran.stdout}{ran.stderr}"
    imported = subprocess.run(
        [python, "-c", "import dualpath.transfer, dualpath.kvstore, dualpath.client"],
        cwd=tmp_path,
        env=environment,
        timeout=60,
        check=False,
    )
    assert imported.returncode == 0
