"""A storage daemon as a process of its own, for measurements: started, told about, ended."""

from __future__ import annotations

import contextlib
import json
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dualpath.bench.testbed.process import dying_with_parent
from dualpath.transfer.errors import Unavailable

READY_S_MAX = 60.0
STOP_S_MAX = 60.0
_TAIL_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Serving:
    """A process that is ready, and what it announced."""

    pid: int
    ready: Mapping[str, object]

    def address(self, name: str) -> str:
        """A value of the ready line."""
        return str(self.ready[name])


@contextmanager
def daemon(folder: Path, **settings: object) -> Iterator[Serving]:
    """Run `dualpath serve` with its data and its log in `folder`; `settings` are its flags.

    Raises Unavailable with the end of its log if it does not become ready.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The path of a Unix socket must be short, wherever the data is.
    with tempfile.TemporaryDirectory(prefix="dualpath-") as sockets:
        flags: dict[str, object] = {
            "data": folder / "data",
            "listen": "127.0.0.1:0",
            "unix": f"{sockets}/daemon.sock",
            **settings,
        }
        argv = [sys.executable, "-m", "dualpath.cli.main", "serve", "--log-level", "warning"]
        for name, value in flags.items():
            argv += [f"--{name.replace('_', '-')}", str(value)]
        with process("daemon", argv, folder / "daemon.log") as serving:
            yield serving


@contextmanager
def process(name: str, argv: list[str], log: Path) -> Iterator[Serving]:
    """Run a program that prints `ready {json}`; end it with SIGTERM, then SIGKILL."""
    with log.open("wb") as stderr:
        child = subprocess.Popen(
            dying_with_parent(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    try:
        yield Serving(child.pid, _ready(name, child, log))
    finally:
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_S_MAX)
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _ready(name: str, child: subprocess.Popen[bytes], log: Path) -> Mapping[str, object]:
    assert child.stdout is not None
    deadline_s = time.monotonic() + READY_S_MAX
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        if selector.select(deadline_s - time.monotonic()):
            word, _, value = child.stdout.readline().decode(errors="replace").partition(" ")
            if word == "ready":
                found = json.loads(value)
                if isinstance(found, dict):
                    return found
    tail = log.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARS:]
    raise Unavailable(f"{name} did not become ready: {tail.strip() or 'nothing in its log'}")
