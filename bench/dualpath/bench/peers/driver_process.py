"""A driver as a process: asked one thing at a time, each with a deadline, ended for sure."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from dualpath.bench.testbed.process import dying_with_parent
from dualpath.transfer.errors import Unavailable

OPEN_S_MAX = 120.0
RUN_S_MAX = 300.0
CLOSE_S_MAX = 30.0
PIECE_BYTES = 64 << 20
DRIVERS = Path(__file__).parent / "drivers"
_TAIL_CHARS = 300


class DriverProcess:
    """Raises Unavailable, with the end of the driver's log, whenever it does not do as asked."""

    def __init__(
        self, python: Path, driver: str, log: Path, piece_bytes: int = PIECE_BYTES
    ) -> None:
        """`piece_bytes` is what one put or get moves at once."""
        self._log = log
        self._answers = b""
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                dying_with_parent([str(python), str(DRIVERS / f"{driver}.py")]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PEERS_PIECE_BYTES": str(piece_bytes),
                },
            )

    def open(self, settings: Mapping[str, object]) -> str:
        """Start the peer; its version."""
        return str(self._ask({"do": "open", "settings": dict(settings)}, OPEN_S_MAX)["version"])

    def run(self, block_bytes: int, total_bytes: int) -> Mapping[str, float]:
        """Put and get everything once; seconds and processor seconds."""
        asked = {"do": "run", "block_bytes": block_bytes, "total_bytes": total_bytes}
        answer = self._ask(asked, RUN_S_MAX)
        return {name: float(str(value)) for name, value in answer.items() if name != "ok"}

    def _ask(self, asked: Mapping[str, object], deadline_s: float) -> Mapping[str, object]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._line(time.monotonic() + deadline_s))
        except (OSError, ValueError) as error:
            raise Unavailable(f"{asked['do']}: {error}; last in its log: {self._tail()}") from error
        if not isinstance(answer, dict) or not answer.get("ok"):
            raise Unavailable(f"{asked['do']}: {answer.get('error', answer)}")
        return answer

    def _line(self, until: float) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._answers:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise OSError("no answer in time")
                came = os.read(self._process.stdout.fileno(), 1 << 16)
                if not came:
                    raise OSError(f"the driver ended (status {self._process.wait()})")
                self._answers += came
        line, _, self._answers = self._answers.partition(b"\n")
        return line

    def _tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "")[-_TAIL_CHARS:]

    def close(self) -> None:
        """End the peer, then the driver and whatever else is left in its process group."""
        try:
            if self._process.poll() is None:
                self._ask({"do": "close"}, CLOSE_S_MAX)
        except Unavailable:
            pass  # it is killed below
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
