"""What posting RDMA writes costs the processor, by batch: against a library that does nothing.

Measures our own part only: from the slices of a write to the device's `post_send`, which here
walks the list and counts (`transfer/native/null_verbs.c`). What a real device's driver adds, and
how it fares with a network, was never run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TextIO

from dualpath.bench.machine import busy_line
from dualpath.bench.table import Row, markdown_table, print_table
from dualpath.transfer.errors import Unavailable
from dualpath.transfer.lane import Lane
from dualpath.transfer.outbox import Outbox
from dualpath.transfer.rdma.messages import SKIP_BYTES, Grant
from dualpath.transfer.rdma.native_device import MISSING, NativeQueuePair, NativeVerbs
from dualpath.transfer.rdma.verbs import Piece, QueueLimits
from dualpath.transfer.rdma.write_requests import WriteRequests
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import Write

BATCHES = (1, 8, 64)
JUDGED_BATCH = 64
NATIVE_NS_MAX = 200.0
"""A work request of a batch of JUDGED_BATCH may cost so much."""
SLICE_BYTES = 40 << 10
CALLS, NATIVE_CALLS = 1000, 10_000
"""Of a sample."""
HEADINGS = (
    "requests a post",
    "native ns a request",
    "one call from Python, ns",
    "ns a request of it",
    "making the rows, ns a request",
    "both from Python, ns a request",
)


@dataclass(frozen=True, slots=True)
class BatchCost:
    """Nanoseconds, medians: of a request natively; of the whole call from Python; of a request in
    turning slices into rows before that; and of a request in both together."""

    native_ns: float
    call_ns: float
    rows_ns: float
    whole_ns: float


@dataclass(frozen=True, slots=True)
class Posting:
    """What a batch costs, by its size."""

    batches: Mapping[int, BatchCost]
    rounds: int
    machine: Mapping[str, object]
    date: str

    def misses(self) -> list[str]:
        """The target, if it is missed."""
        found = self.batches[JUDGED_BATCH].native_ns
        if found <= NATIVE_NS_MAX:
            return []
        return [
            f"posting {JUDGED_BATCH}: {found:.0f} ns a request, must be {NATIVE_NS_MAX:g} at most"
        ]

    def to_json(self) -> dict[str, object]:
        """By batch."""
        one = self.batches[BATCHES[0]]
        return {
            "provider": "null",
            "hardware": "not run",
            "batches": {
                str(count): {
                    "native_ns_a_request": cost.native_ns,
                    "call_ns": cost.call_ns,
                    "call_ns_a_request": cost.call_ns / count,
                    "rows_ns_a_request": cost.rows_ns,
                    "whole_ns_a_request": cost.whole_ns,
                    "call_ratio_to_single_posts": cost.call_ns / count / one.call_ns,
                }
                for count, cost in self.batches.items()
            },
            "misses": self.misses(),
            "rounds": self.rounds,
            "date": self.date,
            "machine": dict(self.machine),
        }


def measure_posting(rounds: int, machine: Mapping[str, object]) -> Posting:
    """Rounds over all batches in turn. Raises Unavailable where the native part was not built."""
    if MISSING:
        raise Unavailable(f"posting cannot be measured: {MISSING}; a C compiler is needed")
    from dualpath.bench.transfer import _null_verbs  # noqa: PLC0415 - built with the native part
    from dualpath.transfer.rdma import _verbs  # noqa: PLC0415

    _null_verbs.begin(-1, False, True)
    device = NativeVerbs(_null_verbs.__file__).open("null0")
    queue = device.completion_queue(16)
    pair = device.queue_pair(queue, QueueLimits(1024, 1, 16), 1)
    assert isinstance(pair, NativeQueuePair)
    try:
        found: dict[int, list[tuple[float, ...]]] = {count: [] for count in BATCHES}
        for _ in range(rounds):
            for count in BATCHES:
                make = scattered(count)
                rows = make()
                native = _verbs.time_posts(pair.pair, rows, NATIVE_CALLS) / NATIVE_CALLS
                call = _ns(partial(pair.post_rows, rows), CALLS)
                made = _ns(make, CALLS)
                whole = _ns(partial(_make_and_post, make, pair), CALLS)
                found[count].append((native / count, call, made / count, whole / count))
    finally:
        pair.close()
        queue.close()
        device.close()
    batches = {
        count: BatchCost(*(median(each[at] for each in samples) for at in range(4)))
        for count, samples in found.items()
    }
    return Posting(batches, rounds, machine, time.strftime("%Y-%m-%d"))


def scattered(count: int) -> Callable[[], bytearray]:
    """What makes the rows of a write of `count` slices of 40 KiB that lie apart in the target."""
    nbytes = count * SLICE_BYTES
    write = Write(
        _REGION,
        Slices.contiguous(0, nbytes),
        RegionDescriptor(1, 1, 0, 2 * nbytes),
        Slices.strided(0, 2 * SLICE_BYTES, count, SLICE_BYTES),
        Lane.LOAD_PREFILL,
        1,
        1.0,
    )
    pending = Outbox("peer", nbytes).add(write, lambda _: None, 0.0)
    grant = Grant(1, 1 << 40, 7, bytes(SKIP_BYTES))
    source = Piece(1 << 32, 0, 5)
    return lambda: WriteRequests(pending, 0, nbytes, grant, source, 16).take(count)[0]


def _make_and_post(make: Callable[[], bytearray], pair: NativeQueuePair) -> None:
    pair.post_rows(make())


_REGION = Region.of(bytearray(1))  # its bytes are never looked at


def _ns(call: Callable[[], object], times: int) -> float:
    begun = time.perf_counter_ns()
    for _ in range(times):
        call()
    return (time.perf_counter_ns() - begun) / times


def rows(posting: Posting) -> list[Row]:
    """A row a batch, in the order of HEADINGS."""
    return [
        (
            str(count),
            f"{cost.native_ns:.0f}",
            f"{cost.call_ns:.0f}",
            f"{cost.call_ns / count:.0f}",
            f"{cost.rows_ns:.0f}",
            f"{cost.whole_ns:.0f}",
        )
        for count, cost in posting.batches.items()
    ]


def lines(posting: Posting) -> Sequence[str]:
    """What it was measured on, and the target."""
    machine = posting.machine
    said = [
        f"RDMA posting against a null provider, {posting.rounds} rounds, medians; hardware: not "
        f"run; {machine['cores']} cores of {machine['processor']}, {machine['system']} "
        f"{machine['kernel']}; {posting.date}"
    ]
    said += [text for text in (busy_line(machine),) if text]
    return said + [f"missed: {miss}" for miss in posting.misses()]


def print_posting(posting: Posting, stream: TextIO | None = None) -> None:
    """Write everything to `stream` (default: stdout)."""
    out = stream if stream is not None else sys.stdout
    print_table(HEADINGS, rows(posting), out)
    print(*lines(posting), sep="\n", file=out, flush=True)


def markdown(posting: Posting) -> str:
    """The same for a document."""
    listed = "\n".join(f"- {line}" for line in lines(posting))
    return f"{markdown_table(HEADINGS, rows(posting))}\n\n{listed}\n"
