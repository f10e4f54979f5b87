"""Server processes of a driver: started with a log, waited for, ended; they end with the driver."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

START_S_MAX = 60.0
STOP_S_MAX = 10.0
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def free_port() -> int:
    """A TCP port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Children:
    """The processes of one driver, in the order of their start."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._running: list[subprocess.Popen[bytes]] = []

    @property
    def pids(self) -> list[int]:
        """Of all of them."""
        return [child.pid for child in self._running]

    def start(self, name: str, argv: list[str], **environment: str) -> subprocess.Popen[bytes]:
        """Run a program in the folder, its output in `name`.log there."""
        with (self._folder / f"{name}.log").open("wb") as log:
            child = subprocess.Popen(
                argv,
                cwd=self._folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - loads nothing
            )
        self._running.append(child)
        return child

    def wait_port(self, port: int) -> None:
        """Until somebody listens. Raises RuntimeError when a child ended or time is over."""
        deadline = time.monotonic() + START_S_MAX
        while time.monotonic() < deadline:
            for child in self._running:
                if child.poll() is not None:
                    raise RuntimeError(f"{child.args!r} ended with {child.returncode}")
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"nobody listens on port {port} after {START_S_MAX:g} s")

    def stop(self) -> None:
        """End all, the last one first."""
        for child in reversed(self._running):
            child.terminate()
            try:
                child.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._running.clear()


def drop_page_cache(paths: list[str]) -> None:
    """Make files cold in this machine's page cache: written back, then dropped."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
