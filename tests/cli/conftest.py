from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

READY_S = 30.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A daemon of its own process; what its ready line said."""
    folder: Path = tmp_path_factory.mktemp("daemon")
    flags = ["--data", str(folder / "store"), "--listen", "127.0.0.1:0"]
    flags += ["--dram-bytes", "32MiB", "--disk-bytes", "256MiB"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dualpath.cli.main", "serve", *flags],
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
