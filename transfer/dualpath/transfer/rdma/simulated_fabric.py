"""What joins the simulated RDMA devices: carries out their requests, and can be disturbed.

One thread gives all queue pairs their turn, a packet at a time. A device can be held, also in the
middle of a write, and packets can be lost; nothing depends on time.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from typing import Protocol

from dualpath.transfer.rdma.verbs import RETRIES_EXHAUSTED, Opcode, WorkRequest


class Sender(Protocol):
    """What the fabric needs of a queue pair; it calls with `changed` held."""

    device_name: str
    sends: deque[WorkRequest]
    retried: int

    def carry_out(self, request: WorkRequest) -> None:
        """A packet of the first request."""

    def retry(self, status: int) -> None:
        """The packet goes again or, over the limit, the queue pair fails with `status`."""


class SimulatedFabric:
    """Joins the devices that were made with it. Context manager; `close` ends its thread."""

    def __init__(self) -> None:
        self.changed = threading.Condition()  # guards everything of all its devices
        self.pairs: dict[int, Sender] = {}
        self.numbers = itertools.count(17)
        self._held: dict[str, int] = {}  # device -> write packets that still pass
        self._lost: dict[str, int] = {}  # device -> packets to lose
        self._turn: deque[Sender] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="simulated-fabric", daemon=True)
        self._thread.start()

    def hold(self, device: str, *, after_writes: int = 0) -> None:
        """Let the device carry out nothing more, once that many packets of writes went."""
        with self.changed:
            self._held[device] = after_writes

    def release(self, device: str) -> None:
        """Undo `hold`."""
        with self.changed:
            self._held.pop(device, None)
            self.changed.notify_all()

    def lose(self, device: str, packets: int) -> None:
        """Lose the next packets that the device sends; each is sent again, up to the limit."""
        with self.changed:
            self._lost[device] = packets

    def wait_held(self, device: str, timeout_s: float) -> bool:
        """Wait until a held device has a request that it does not carry out."""

        def stuck() -> bool:
            waiting = any(pair.device_name == device and pair.sends for pair in self.pairs.values())
            return self._held.get(device, 1) == 0 and waiting

        with self.changed:
            return self.changed.wait_for(stuck, timeout_s)

    def enqueue(self, pair: Sender) -> None:
        """Let `pair` have its turn; called with `changed` held."""
        if pair not in self._turn:
            self._turn.append(pair)
        self.changed.notify_all()

    def close(self) -> None:
        """End it."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        self._thread.join(5)

    def __enter__(self) -> SimulatedFabric:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self.changed:
                if self._closed:
                    return
                if not self._step():
                    self.changed.notify_all()
                    self.changed.wait()

    def _step(self) -> bool:
        """One packet of the next queue pair that may send one; False if there is none."""
        for _ in range(len(self._turn)):
            pair = self._turn.popleft()
            if not pair.sends:
                continue
            self._turn.append(pair)
            name = pair.device_name
            left = self._held.get(name)
            request = pair.sends[0]
            writes = request.opcode in (Opcode.WRITE, Opcode.WRITE_IMM)
            if left == 0:
                continue
            if request.opcode not in (Opcode.BIND, Opcode.INVALIDATE) and self._loses(pair, name):
                return True
            if left is not None and writes:
                self._held[name] = left - 1
            pair.carry_out(request)
            return True
        return False

    def _loses(self, pair: Sender, name: str) -> bool:
        left = self._lost.get(name, 0)
        if not left:
            pair.retried = 0
            return False
        self._lost[name] = left - 1
        pair.retry(RETRIES_EXHAUSTED)
        return True
