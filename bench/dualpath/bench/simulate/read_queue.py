"""What one node reads from storage: in the order of arrival, so many at a time.

The reads that run share the storage NIC and the node's memory as flows; the others wait. `tokens`
is the node's read queue, which the paper's scheduler looks at: whoever is going to `add` a read
adds its tokens when the read is decided, and they leave with its last byte.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from dualpath.bench.simulate.cluster import Node
from dualpath.bench.simulate.flow_network import FlowNetwork
from dualpath.bench.simulate.virtual_clock import Handler, VirtualClock

if TYPE_CHECKING:
    from dualpath.bench.simulate.job import Job

Read = tuple["Job", float, int]
"""The job, bytes, tokens of KV that they are."""


class ReadQueue:
    """`add` queues a read; `done(job)` is called when its last byte is in the node's memory."""

    __slots__ = ("_clock", "_done", "_most", "_network", "_route", "_running", "_waiting", "tokens")

    def __init__(
        self, clock: VirtualClock, network: FlowNetwork, node: Node, most: int, done: Handler
    ) -> None:
        self._clock = clock
        self._network = network
        self._route = network.route((node.snic_in, node.dram), node.meter)
        self._most = most
        self._done = done
        self._running = 0
        self._waiting: deque[Read] = deque()
        self.tokens = 0

    def add(self, job: Job, size: float, tokens: int) -> None:
        """Read `size` bytes, KV of `tokens` that the queue has counted, for a job."""
        read = (job, size, tokens)
        if self._running < self._most:
            self._start(read)
        else:
            self._waiting.append(read)

    def _start(self, read: Read) -> None:
        self._running += 1
        job = read[0]
        if job.read_begin_s < 0:
            job.read_begin_s = self._clock.now
        self._network.start(self._route, read[1], self._ended, read)

    def _ended(self, read: Read) -> None:
        self._running -= 1
        self.tokens -= read[2]
        if self._waiting:
            self._start(self._waiting.popleft())
        self._done(read[0])
