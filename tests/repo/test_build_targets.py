"""The Makefile: its targets, its stamps, and what it says when something is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

TARGETS = ("demo", "demo-model", "test", "lint", "bench", "proto", "clean", "help")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(folder: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path or os.environ["PATH"], "HOME": str(folder)}
    program = shutil.which("make")
    assert program is not None
    return subprocess.run(
        [program, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """A folder with what the Makefile reads, and no environment."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(root / name, folder)
    return folder


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH without any Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cksum", "cut", "grep", "awk", "mkdir", "rm", "touch"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def test_every_target_is_there_and_shown_by_help(checkout: Path) -> None:
    shown = make(checkout, "help").stdout
    for target in TARGETS:
        assert f"make {target} " in shown
        assert make(checkout, "-n", target).returncode == 0


def test_a_current_stamp_means_that_nothing_is_installed(checkout: Path) -> None:
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    plan = make(checkout, "-n", "env").stdout
    assert "pip" in plan
    (stamp,) = {word.strip("'") for word in plan.split() if "/.dualpath-dev-" in word} - {
        ".venv/.dualpath-dev-*"
    }
    (checkout / stamp).touch()
    assert "pip" not in make(checkout, "-n", "env").stdout
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("\n# another dependency\n")
    assert "pip" in make(checkout, "-n", "env").stdout


def test_a_change_of_any_native_source_means_another_build(root: Path, checkout: Path) -> None:
    shutil.copy(root / "CMakeLists.txt", checkout)
    sources = set(re.findall(r"\S+\.c\b", (root / "CMakeLists.txt").read_text()))
    assert {source.split("/")[0] for source in sources} == {"kvstore", "transfer"}
    for source in sources:
        (checkout / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / source, checkout / source)
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    plans = {make(checkout, "-n", "env").stdout}
    for source in sources:
        with (checkout / source).open("a") as file:
            file.write("/* another line */\n")
        plans.add(make(checkout, "-n", "env").stdout)
    assert len(plans) == 1 + len(sources)


def test_no_python_is_said_with_the_command_that_helps(checkout: Path, tools: Path) -> None:
    ran = make(checkout, "env", path=str(tools))
    assert ran.returncode != 0
    assert "no Python >= 3.11 found" in ran.stderr
    assert "apt install python3" in ran.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_without_venv_is_said_with_the_command_that_helps(
    checkout: Path, tools: Path
) -> None:
    python = tools / "python3"
    python.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; *print*) echo 3.12 ;; esac\n')
    python.chmod(0o755)
    ran = make(checkout, "env", path=str(tools))
    assert ran.returncode != 0
    assert "apt install python3.12-venv" in ran.stderr
    assert not (checkout / ".venv").exists()
