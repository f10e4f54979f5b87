"""The processes of an isolation run on their links: a writer and a reader of KV, and the model.

Owns the cases: on which link the KV goes, and how it is marked. `window` measures one case for a
while; KV goes on in it from before the first operation until after the last.
"""

from __future__ import annotations

import contextlib
import enum
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dualpath.bench.isolation.link import SharedLink, address_of
from dualpath.bench.testbed.process import dying_with_parent
from dualpath.bench.transfer.far_end import FarEnd
from dualpath.transfer.errors import Corrupt, Unavailable

GRAIN = "256K"
PORT = 7999
ENDLESS_BATCHES = 1 << 40
LINE_S_MAX = 60.0
LEAD_S = 0.3
"""KV alone, before the model's first operation: its queues are full by then."""


class Case(enum.Enum):
    """Where the KV goes. CONTROL_AGAIN is CONTROL once more, for the noise of the machine."""

    CONTROL = "control"
    LANES = "lanes"
    NO_LANES = "no_lanes"
    CONTROL_AGAIN = "control_again"


_TRANSPORTS = {
    Case.CONTROL: ("other", "all=8"),
    Case.LANES: ("compute", "all=8"),
    Case.NO_LANES: ("compute", "all=0"),
    Case.CONTROL_AGAIN: ("other", "all=8"),
}


@dataclass(frozen=True, slots=True)
class Window:
    """What one case did in one round: milliseconds by size, and the KV's rate meanwhile."""

    times_ms: Mapping[str, Sequence[float]]
    kv_bytes_per_s: float


class _Line:
    """A child that answers lines with lines."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            dying_with_parent(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.read("its start")
        except BaseException:
            self.close()
            raise

    def ask(self, text: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()
        return self.read(text)

    def read(self, what: str) -> str:
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], LINE_S_MAX)[0]:
            raise Unavailable(f"the model's traffic did not answer to {what} in {LINE_S_MAX:g} s")
        line = out.readline()
        if not line:
            raise Unavailable(f"the model's traffic ended at {what}; its stderr says why")
        return line

    def close(self) -> None:
        with self._process:
            self._process.kill()


class Scene:
    """Everything runs; nothing flows yet."""

    def __init__(self, writer: FarEnd, reader: FarEnd, driver: _Line) -> None:
        self._writer = writer
        self._reader = reader
        self._driver = driver
        self._windows: dict[Case, str] = {}
        for case in Case:
            self._connect(case)

    def _connect(self, case: Case) -> None:
        link, marks = _TRANSPORTS[case]
        name = case.value
        for end, listen in ((self._writer, f"{address_of('a', link)}:0"), (self._reader, "")):
            address = end.ask("open", transport=name, kind="tcp", lane_dscp=[marks], listen=listen)
            if listen:
                where = address
        self._writer.ask("source", transport=name, grain=GRAIN)
        self._windows[case] = self._reader.ask("target", transport=name, grain=GRAIN)
        secret = self._writer.ask("invite", transport=name, peer=name)
        self._reader.ask("connect", transport=name, peer=name, address=where, invitation=secret)

    def window(self, case: Case, seconds: float) -> Window:
        """Measure. Raises Unavailable, Corrupt."""
        name = case.value
        first = self._reader.ask("arm", transport=name, batches=ENDLESS_BATCHES)
        self._writer.ask(
            "send",
            transport=name,
            peer=name,
            window=self._windows[case],
            first=first,
            batches=ENDLESS_BATCHES,
        )
        time.sleep(LEAD_S)
        before = self._reader.ask("count", transport=name)
        times = json.loads(self._driver.ask(f"{seconds:g}"))
        after = self._reader.ask("count", transport=name)
        self._writer.ask("stop", transport=name)
        if after["wrong_parts"]:
            raise Corrupt(f"{after['wrong_parts']} parts arrived with other bytes than were sent")
        moved = after["landed_bytes"] - before["landed_bytes"]
        return Window(times, moved / (after["at_s"] - before["at_s"]))


@contextmanager
def scene(rate_bytes_per_s: float) -> Iterator[Scene]:
    """Namespaces and processes, for as long as the context lasts. Raises Unavailable."""
    with contextlib.ExitStack() as stack:
        link = SharedLink(rate_bytes_per_s)
        stack.callback(link.close)
        program = [sys.executable, "-m", "dualpath.bench.isolation.protected"]
        where = [address_of("b", "compute"), str(PORT)]
        server = _Line([*link.enter("b"), *program, "serve", *where])
        stack.callback(server.close)
        driver = _Line([*link.enter("a"), *program, "drive", *where])
        stack.callback(driver.close)
        writer = stack.enter_context(FarEnd(link.enter("a")))
        reader = stack.enter_context(FarEnd(link.enter("b")))
        yield Scene(writer, reader, driver)
