"""What is done to a cluster in one round, and what it is asked for meanwhile: functions of a seed.

Pure. A round has a few faults that may overlap, each of them undone before its end, and endless
loads for each worker of each prefill engine: of several lengths and deadlines, some too short, some
given up on the way, about half of them handed off.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from dualpath.bench.cluster.fault import Fault, FaultAction, node_links
from dualpath.bench.testbed.topology import Node, NodeKind, Topology

FAULT_COUNTS = (1, 1, 2, 2, 3, 4)
LASTS_S_MIN = 0.1
LASTS_S_MAX = 1.2
FACTORS = (0.05, 0.1, 0.25, 0.5)
SHORT_SHARE = 0.2
SHORT_S = (0.03, 0.4)
LONG_S = (0.8, 2.5)
ABORTED_SHARE = 0.15
ABORT_S = (0.01, 0.4)
HANDED_SHARE = 0.5
POLICIES = ("split", "split", "split", "direct", "round-robin", "shorter-queue")

_KINDS: tuple[tuple[NodeKind, FaultAction, int], ...] = (
    (NodeKind.DECODE, FaultAction.KILL, 3),
    (NodeKind.DECODE, FaultAction.STOP, 3),
    (NodeKind.DECODE, FaultAction.CUT, 3),
    (NodeKind.DECODE, FaultAction.SLOW, 3),
    (NodeKind.PREFILL, FaultAction.KILL, 1),
    (NodeKind.PREFILL, FaultAction.STOP, 1),
    (NodeKind.PREFILL, FaultAction.CUT, 2),
    (NodeKind.PREFILL, FaultAction.SLOW, 2),
    (NodeKind.STORAGE, FaultAction.KILL, 1),
    (NodeKind.STORAGE, FaultAction.STOP, 1),
    (NodeKind.STORAGE, FaultAction.CUT, 1),
)
"""What is done where, and how often beside the others."""


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """One load: the first `blocks` of chain number `chain`, by a policy, with the relay number
    `decode` as decode peer. `abort_s` is inf if it is not given up."""

    chain: int
    blocks: int
    policy: str
    decode: int
    hand_off: bool
    deadline_s: float
    abort_s: float


def random_faults(seed: int, number: int, topology: Topology, seconds: float) -> tuple[Fault, ...]:
    """The faults of round `number`, in the order of their times; all is restored at `seconds`."""
    rng = random.Random(f"faults {seed} {number}")
    faults: list[Fault] = []
    touched: set[tuple[str, str]] = set()
    kinds = [kind for kind in _KINDS if any(kind[0] is node.kind for node in topology.nodes)]
    for _ in range(rng.choice(FAULT_COUNTS)):
        kind, action, _weight = rng.choices(kinds, [weight for *_, weight in kinds])[0]
        node = rng.choice([each for each in topology.nodes if each.kind is kind])
        link = _link(rng, node, action, topology)
        begins = rng.uniform(0.0, max(0.0, seconds - LASTS_S_MAX))
        lasts = rng.uniform(LASTS_S_MIN, min(LASTS_S_MAX, seconds))
        factor = rng.choice(FACTORS) if action is FaultAction.SLOW else 1.0
        if (node.name, link) in touched:
            continue
        touched.add((node.name, link))
        faults.append(Fault(action, node.name, link, _time(begins), factor))
        restored = _time(min(seconds, begins + lasts))
        faults.append(Fault(FaultAction.RESTORE, node.name, link, restored))
    return tuple(sorted(faults, key=lambda fault: fault.at_s))


def _link(rng: random.Random, node: Node, action: FaultAction, topology: Topology) -> str:
    """ "" for the processes of the node."""
    if action in (FaultAction.KILL, FaultAction.STOP):
        return ""
    return rng.choice(node_links(node, topology))


def _time(seconds: float) -> float:
    """So that a fault is written as it is."""
    return round(seconds, 2)


def load_orders(
    seed: int, number: int, worker: str, *, chains: int, blocks_max: int, decodes: int
) -> Iterator[LoadOrder]:
    """What a worker of an engine asks for in round `number`, one after another, without end."""
    rng = random.Random(f"loads {seed} {number} {worker}")
    while True:
        short = rng.random() < SHORT_SHARE
        aborted = rng.random() < ABORTED_SHARE
        yield LoadOrder(
            chain=rng.randrange(chains),
            blocks=rng.randint(1, blocks_max),
            policy=rng.choice(POLICIES),
            decode=rng.randrange(decodes) if decodes else 0,
            hand_off=bool(decodes) and rng.random() < HANDED_SHARE,
            deadline_s=rng.uniform(*(SHORT_S if short else LONG_S)),
            abort_s=rng.uniform(*ABORT_S) if aborted else math.inf,
        )
