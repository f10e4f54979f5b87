"""What the scheduler decides: an assignment, and what becomes of requests whose engines go.

What is made for every request is a named tuple: it costs a third of a frozen dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dualpath.scheduler.request import Request


class ReadShares(NamedTuple):
    """Which part of a request's hits each side's storage links read; together 1."""

    prefill: float
    decode: float


PREFILL_READS = ReadShares(1.0, 0.0)
"""The direct path: storage, prefill node."""

DECODE_READS = ReadShares(0.0, 1.0)
"""The relay path: storage, decode node, prefill node."""


class Assignment(NamedTuple):
    """A request with both its engines. `number` grows by 1 with each assignment made, so that a
    report can tell which of them it has seen (`GroupReport.seen`)."""

    number: int
    request: Request
    prefill: str
    decode: str
    read: ReadShares


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that the scheduler has given up. `reason`: `engine_lost`, `queue_timeout`, or
    `no_engine_fits`: those that could hold it are gone."""

    request: Request
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Loss:
    """What the loss of engines meant.

    `withdrawn`: assignments that their surviving engine should forget; each request of them is
    also in `requeued` (it stands in the queue again) or in `failed`.
    """

    requeued: tuple[Request, ...] = ()
    failed: tuple[Failure, ...] = ()
    withdrawn: tuple[Assignment, ...] = ()
