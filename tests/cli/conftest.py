from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

READY_S = 30.0


@contextmanager
def started(folder: Path, *flags: str) -> Iterator[dict[str, Any]]:
    """A daemon of its own process, its data in `folder`; what its ready line said."""
    words = ["--data", str(folder / "store"), "--listen", "127.0.0.1:0", *flags]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dualpath.cli.main", "serve", *words],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready "), (folder / "log").read_text()
        yield json.loads(line.removeprefix("ready "))
        process.terminate()
        assert process.wait(READY_S) == 0, (folder / "log").read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def start_daemon() -> Callable[..., AbstractContextManager[dict[str, Any]]]:
    """`started`, for tests that need a daemon of their own."""
    return started


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The daemon of a module's tests."""
    folder: Path = tmp_path_factory.mktemp("daemon")
    with started(folder, "--dram-bytes", "32MiB", "--disk-bytes", "256MiB") as told:
        yield told
