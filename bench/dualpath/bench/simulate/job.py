"""One turn on its way through the cluster, and the times that it leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dualpath.bench.simulate.decode_engine import DecodeEngine
    from dualpath.bench.simulate.prefill_group import PrefillEngine


class Job:
    """Of the prompt's `tokens`, `hit` are stored and `new` computed. Bytes are those of their KV.
    Times are seconds of the virtual clock, -1 before they come."""

    __slots__ = (
        "agent",
        "arrive_s",
        "assigned_s",
        "bytes_by_decode",
        "bytes_by_prefill",
        "computed",
        "decode",
        "decode_s",
        "done_s",
        "first_token_s",
        "generate",
        "hit",
        "id",
        "new",
        "prefill",
        "prefill_s",
        "read_begin_s",
        "read_end_s",
        "sides_left",
        "tokens",
        "tokens_by_prefill",
    )
    prefill: PrefillEngine
    decode: DecodeEngine

    def __init__(
        self, agent: int, number: int, hit: int, new: int, generate: int, arrive_s: float
    ) -> None:
        self.agent = agent
        self.id = f"{agent}/{number}"
        self.hit = hit
        self.new = new
        self.tokens = hit + new
        self.generate = generate
        self.arrive_s = arrive_s
        self.assigned_s = self.read_begin_s = self.read_end_s = -1.0
        self.prefill_s = self.first_token_s = self.decode_s = self.done_s = -1.0
        self.bytes_by_prefill = self.bytes_by_decode = 0.0
        self.computed = 0
        self.tokens_by_prefill = 0
        self.sides_left = 0
