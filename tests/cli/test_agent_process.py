"""Commands through a node's agent instead of one of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dualpath.cli.main import main


@pytest.fixture(scope="module")
def agent(daemon: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """An agent of its own process; what its ready line said."""
    folder = Path(tempfile.mkdtemp(prefix="dp-"))  # short: Unix paths have 107 characters
    program = [sys.executable, "-m", "dualpath.cli.main", "agent"]
    flags = ["--daemons", daemon["listen"], "--unix", str(folder / "agent.sock")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*program, *flags], stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready "), (folder / "log").read_text()
        yield json.loads(line.removeprefix("ready "))
        process.terminate()
        assert process.wait(30) == 0, (folder / "log").read_text()
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def test_a_file_goes_through_the_agent_of_the_node(
    agent: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = ["--agent", f"unix:{agent['unix']}"]
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.write_bytes(os.urandom(3_000_000))
    flags = [*address, "--key", "by-agent", "--batch-bytes", "1MiB"]
    assert main(["put", str(original), *flags]) == 0
    assert main(["put", str(original), *flags]) == 0
    assert main(["get", "-o", str(copy), *flags]) == 0
    assert copy.read_bytes() == original.read_bytes()
    capsys.readouterr()
    assert main(["stat", *address, "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["loads_done"] >= 1
    assert stats["name"] == agent["name"]


def test_an_agent_is_named_after_its_host_unless_told(agent: dict[str, Any]) -> None:
    assert agent["name"]
    assert main(["agent", "--daemons", "not an address"]) == 2


def test_a_crash_of_native_code_leaves_where_every_thread_was(
    daemon: dict[str, Any], tmp_path: Path
) -> None:
    program = [sys.executable, "-m", "dualpath.cli.main", "agent"]
    flags = ["--daemons", daemon["listen"], "--unix", ""]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*program, *flags], stdout=subprocess.PIPE, stderr=log, text=True
        )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready ")
        process.send_signal(signal.SIGSEGV)
        assert process.wait(30) == -signal.SIGSEGV
    told = (tmp_path / "log").read_text()
    assert "Fatal Python error: Segmentation fault" in told
    assert "run_agent" in told or "selectors.py" in told
