"""What may come of a load, a hand-off and a receive while faults happen: pure.

A load ends by its deadline: whole and verified, shorter with a reason that faults explain, or, if
its own agent died, with a named error. Nothing else is right. What its own agent, stopped where it
was, could not say in time is forgiven until it goes on, and so is the time that the machine itself
stood still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from dualpath.bench.cluster.fault import FaultAction
from dualpath.bench.cluster.fault_script import MadeFault
from dualpath.bench.faults.schedule import LoadOrder
from dualpath.bench.testbed.engine import LoadOutcome

ALLOWANCE_S = 0.5
"""After a deadline, for messages and busy processors."""
HEARD_S = 0.05
"""Within which a request reaches its agent."""
SHORTER = frozenset({"deadline", "unavailable", "peer_lost", "overloaded", "expired"})
"""Why a prefix may be shorter by faults: none of them takes stored blocks, or changes them."""
GIVEN_UP = frozenset({"aborted"})
NOT_HANDED = SHORTER | GIVEN_UP | frozenset({"no_room", "path_lost", "lease_expired"})


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """One load of a round. `started_s` is monotonic; `node` is its engine's, `decode` that of the
    engine it may have been handed off to."""

    node: str
    decode: str
    order: LoadOrder
    started_s: float
    outcome: LoadOutcome


@dataclass(frozen=True, slots=True)
class Outages:
    """When the processes of each node were stopped, or gone: monotonic (from, until)."""

    stopped: Mapping[str, tuple[tuple[float, float], ...]]
    gone: Mapping[str, tuple[tuple[float, float], ...]]

    @staticmethod
    def of(made: Iterable[MadeFault]) -> Outages:
        """Of the faults of a round, in the order in which they were made."""
        since: dict[str, tuple[FaultAction, float]] = {}
        spans: dict[FaultAction, dict[str, list[tuple[float, float]]]] = {
            FaultAction.STOP: {},
            FaultAction.KILL: {},
        }
        for each in made:
            fault = each.fault
            if fault.action in spans:
                since[fault.node] = (fault.action, each.made_s)
            elif fault.action is FaultAction.RESTORE and not fault.link and fault.node in since:
                action, start_s = since.pop(fault.node)
                spans[action].setdefault(fault.node, []).append((start_s, each.made_s))
        return Outages(
            *(
                {node: tuple(found) for node, found in spans[action].items()}
                for action in (FaultAction.STOP, FaultAction.KILL)
            )
        )

    def due_s(self, start_s: float, left_s: float, nodes: Iterable[str]) -> float:
        """When what was asked of these nodes at `start_s`, for so long, is to be answered: they
        count from when they hear of it, and answer when they go on."""
        spans = sorted(span for node in nodes for span in self.stopped.get(node, ()))
        heard_s = _after(start_s, spans)
        return _after(heard_s + left_s, spans)

    def touched(self, node: str, start_s: float, end_s: float) -> bool:
        """Whether the processes of a node were gone or stopped in that time."""
        spans = (*self.stopped.get(node, ()), *self.gone.get(node, ()))
        return any(start < end_s and start_s < end for start, end in spans)


def _after(at_s: float, spans: Iterable[tuple[float, float]]) -> float:
    """The first time from `at_s` on that is in none of the spans, which are in order."""
    for start_s, end_s in spans:
        if start_s - HEARD_S <= at_s < end_s:
            at_s = end_s
    return at_s


FrozenS = Callable[[float, float, Iterable[str]], float]
"""Seconds from, until, in which these nodes, or the engines, had to wait for a processor."""


def overrun_s(record: LoadRecord, outages: Outages, frozen_s: FrozenS) -> float:
    """By how much a load ended after its deadline, or after it was given up; negative: before."""
    order, start_s = record.order, record.started_s
    due_s = outages.due_s(start_s, min(order.deadline_s, order.abort_s), (record.node,))
    end_s = start_s + record.outcome.elapsed_s
    return end_s - due_s - frozen_s(start_s, end_s, (record.node,))


def wrong_with_load(record: LoadRecord, outages: Outages, frozen_s: FrozenS) -> Iterator[str]:
    """What is wrong with a load, and with what was handed off of it."""
    order, outcome = record.order, record.outcome
    who = f"load of {order.blocks} blocks at {record.node} ({order.policy})"
    if outcome.corrupt_blocks:
        yield f"{who}: {outcome.corrupt_blocks} blocks are wrong: {outcome.detail}"
    whole = outcome.verified_blocks == outcome.requested_blocks
    if whole != (not outcome.failure):
        yield f"{who}: {outcome.verified_blocks} blocks, reason {outcome.failure!r}"
    end_s = record.started_s + outcome.elapsed_s
    if outcome.raised and not outages.touched(record.node, record.started_s, end_s):
        yield f"{who}: an error without a fault at its agent: {outcome.failure} {outcome.detail}"
    allowed = SHORTER | (GIVEN_UP if order.abort_s < order.deadline_s else frozenset())
    if outcome.failure and outcome.failure not in allowed:
        yield f"{who}: ended with {outcome.failure!r}: {outcome.detail}"
    late_s = overrun_s(record, outages, frozen_s)
    if late_s > ALLOWANCE_S:
        yield f"{who}: ended {late_s:.2f} s late ({outcome.failure or 'whole'} {outcome.detail})"
    if outcome.handed_off is not None:
        yield from _wrong_with_hand_off(record, outages, frozen_s)


def _wrong_with_hand_off(record: LoadRecord, outages: Outages, frozen_s: FrozenS) -> Iterator[str]:
    outcome, order = record.outcome, record.order
    handed = outcome.handed_off
    assert handed is not None
    who = f"hand-off of {order.blocks} blocks from {record.node} to {record.decode}"
    if handed.corrupt_blocks or handed.failure == "corrupt":
        yield f"{who}: {handed.corrupt_blocks} blocks are wrong: {handed.detail}"
    elif handed.failure and handed.failure not in NOT_HANDED:
        yield f"{who}: ended with {handed.failure!r}: {handed.detail}"
    start_s, end_s = handed.started_s, handed.started_s + handed.elapsed_s
    due_s = outages.due_s(start_s, order.deadline_s, (record.node, record.decode))
    late_s = end_s - due_s - frozen_s(start_s, end_s, (record.node, record.decode))
    if late_s > ALLOWANCE_S:
        yield f"{who}: ended {late_s:.2f} s late ({handed.failure or 'whole'} {handed.detail})"
