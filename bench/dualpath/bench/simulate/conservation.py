"""Laws that every run must keep, checked at its end; those of single moments are checked where they
happen: `VirtualClock` (no time travel), `FlowNetwork` (no link over capacity at any change of
rates), `DecodeEngine` (memory), `TurnRecords` (the order of a turn's times).
"""

from __future__ import annotations

import math

from dualpath.bench.simulate.cluster import Cluster
from dualpath.bench.simulate.flow_network import FlowNetwork
from dualpath.bench.simulate.turn_records import TurnRecords

ROUNDING = 1e-6


class LawBroken(AssertionError):
    """The simulator has made a mistake; its figures are worth nothing."""


def check_conservation(
    *,
    cluster: Cluster,
    network: FlowNetwork,
    records: TurnRecords,
    turns: int,
    hit_bytes: float,
    stored_bytes: float,
    end_s: float,
) -> None:
    """`turns` planned; `hit_bytes` to be read and `stored_bytes` to be written in all. Raises
    LawBroken that names the law."""
    _equal("turns done, of those planned", len(records), turns)
    _equal("bytes that arrived, of those sent", network.bytes_ended, network.bytes_started)
    read = sum(node.snic_in.carried for node in cluster.nodes())
    _equal("bytes read from storage, of bytes of hits", read, hit_bytes)
    by_side = sum(
        float(records.column(name).sum()) for name in ("bytes_by_prefill", "bytes_by_decode")
    )
    _equal("bytes that turns had read, of bytes of hits", by_side, hit_bytes)
    written = sum(node.snic_out.carried for node in cluster.nodes())
    _equal("bytes written to storage, of full new blocks", written, stored_bytes)
    for link in cluster.links():
        if link.carried > link.capacity * end_s * (1 + ROUNDING):
            raise LawBroken(f"{link} carried {link.carried:g} bytes in {end_s:g} s")
        if link.routes:
            raise LawBroken(f"{link} is in use after the end")
    for node in cluster.nodes():
        meter = node.meter
        most = max(meter.windows, default=0.0)
        if most > node.snic_in.capacity * meter.window_s * (1 + ROUNDING):
            raise LawBroken(f"{node.name} read {most:g} bytes in a window of {meter.window_s:g} s")
        _equal(f"bytes in windows of {node.name}", sum(meter.windows), node.snic_in.carried)
    for budget in (node.staging for node in cluster.nodes()):
        if budget.waiting or budget.peak > budget.capacity * (1 + ROUNDING):
            raise LawBroken(f"{budget.name}: peak {budget.peak:g}, {budget.waiting} wait")
        if budget.taken > 1.0:
            raise LawBroken(f"{budget.name}: {budget.taken:g} bytes were never given back")


def _equal(what: str, found: float, expected: float) -> None:
    if not math.isclose(found, expected, rel_tol=ROUNDING, abs_tol=1.0):
        raise LawBroken(f"{what}: {found!r} of {expected!r}")
