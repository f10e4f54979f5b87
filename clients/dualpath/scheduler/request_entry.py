"""One request on its way through the scheduler."""

from __future__ import annotations

from dualpath.scheduler.assignment import Assignment
from dualpath.scheduler.request import Request

NOBODY = -1
"""The index of no engine and of no group."""


class RequestEntry:
    """Where a request stands. `number`: its place in the order of arrival, kept when it is queued
    again. `told`: its assignment, once both engines are known. `gone`: it has left the scheduler;
    queues pass over it."""

    __slots__ = (
        "arrived_s",
        "attempts",
        "decode",
        "decode_staging",
        "gone",
        "group",
        "number",
        "prefill",
        "prefill_staging",
        "prefilled",
        "request",
        "told",
    )

    def __init__(self, request: Request, number: int, arrived_s: float) -> None:
        self.request = request
        self.number = number
        self.arrived_s = arrived_s
        self.prefill = NOBODY
        self.decode = NOBODY
        self.group = NOBODY
        self.attempts = 0
        self.prefill_staging = 0
        self.decode_staging = 0
        self.prefilled = False
        self.gone = False
        self.told: Assignment | None = None
