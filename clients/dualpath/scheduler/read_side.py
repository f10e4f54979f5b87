"""Which side's storage links read a request's hits: the prefill node's, or the decode node's.

Owns the port and the policies: direct only, by turns, the paper's shorter queue, and shares of
both sides by their queues and rates.
"""

from __future__ import annotations

from typing import Protocol

from dualpath.scheduler.assignment import DECODE_READS, PREFILL_READS, ReadShares
from dualpath.scheduler.checks import check_positive
from dualpath.scheduler.engine_table import EngineTable
from dualpath.scheduler.request import Request


class ReadChoice(Protocol):
    """Pure. Asked once a request, when both its engines are known."""

    def share(self, table: EngineTable, request: Request, prefill: int, decode: int) -> ReadShares:
        """The parts that the nodes of index `prefill` and `decode` read."""
        ...


class DirectRead:
    """Everything by the prefill node: the direct path only."""

    def share(self, table: EngineTable, request: Request, prefill: int, decode: int) -> ReadShares:
        """See ReadChoice."""
        return PREFILL_READS


class RoundRobinRead:
    """By turns, whatever the queues: dual path without a scheduler."""

    def __init__(self) -> None:
        self._decode_next = False

    def share(self, table: EngineTable, request: Request, prefill: int, decode: int) -> ReadShares:
        """See ReadChoice."""
        self._decode_next = not self._decode_next
        return PREFILL_READS if self._decode_next else DECODE_READS


class ShorterQueueRead:
    """The paper's rule: the side with the shorter read queue, the prefill node's if equal."""

    def share(self, table: EngineTable, request: Request, prefill: int, decode: int) -> ReadShares:
        """See ReadChoice."""
        queue = table.read_queue
        return PREFILL_READS if queue[prefill] <= queue[decode] else DECODE_READS


class SplitRead:
    """Both sides, so that they are done at the same time, by queues q and rates r of their nodes:

        (q_p + x) / r_p = (q_d + h - x) / r_d    ->    x = ((q_d + h) r_p - q_p r_d) / (r_p + r_d)

    where h hits are read, x of them by the prefill node. Where a side would read fewer than
    `tokens_min`, the side that alone would be done sooner reads all: one has less to go wrong.
    """

    def __init__(self, *, tokens_min: int = 1024) -> None:
        check_positive("tokens_min", tokens_min)
        self._tokens_min = tokens_min

    def share(self, table: EngineTable, request: Request, prefill: int, decode: int) -> ReadShares:
        """See ReadChoice."""
        hits = request.hit_tokens
        queue, rate = table.read_queue, table.read_rate
        prefill_rate, decode_rate = rate[prefill], rate[decode]
        total = prefill_rate + decode_rate
        part = ((queue[decode] + hits) * prefill_rate - queue[prefill] * decode_rate) / total
        if self._tokens_min <= part <= hits - self._tokens_min:
            share = part / hits
            return ReadShares(share, 1.0 - share)
        alone_prefill = (queue[prefill] + hits) * decode_rate
        return (
            PREFILL_READS
            if alone_prefill <= (queue[decode] + hits) * prefill_rate
            else DECODE_READS
        )
