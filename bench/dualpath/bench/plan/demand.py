"""What a workload asks of a cluster, as means a turn: bytes, FLOPs, engine seconds.

Means over all turns of all trajectories, so that a rate of turns times a mean is a load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualpath.bench.agents.trajectory import Trajectory
from dualpath.bench.models.roofline import Roofline
from dualpath.transfer.errors import InvalidRequest

QUOTA_S = 0.3
"""Attention time of one forward batch (arXiv 2602.21548): what shares a batch's overhead."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Means a turn. `held_tokens` stand in a decode engine's memory while it decodes."""

    trajectories: int
    turns: int
    cached_tokens: float
    new_tokens: float
    generated_tokens: float
    held_tokens: float
    load_bytes: float
    written_bytes: float
    pflop: float
    prefill_engine_s: float
    engine_gpus: int

    @property
    def hit_share(self) -> float:
        """Of the prompts' tokens, those that are loaded."""
        return self.cached_tokens / (self.cached_tokens + self.new_tokens)

    @property
    def turns_per_agent(self) -> float:
        """Mean of the trajectories."""
        return self.turns / self.trajectories


def demand_of(trajectories: Sequence[Trajectory], model: Roofline) -> Demand:
    """Over every turn. Only whole blocks are stored: a hit is rounded down to them, and the rest of
    it computed. Raises InvalidRequest for a workload of empty prompts."""
    geometry = model.geometry
    block = geometry.block_tokens
    turns = cached_sum = new_sum = generated = 0
    held = flops = linear_s = attention_s = 0.0
    for trajectory in trajectories:
        for prompt in trajectory.prompts():
            cached = prompt.context // block * block
            new = prompt.tokens - cached
            turns += 1
            cached_sum += cached
            new_sum += new
            generated += prompt.generate
            held += prompt.tokens + prompt.generate / 2
            flops += geometry.prompt_flops(cached, new)
            attention_s += model.attention_s(((cached, new),))
            linear_s += model.linear_s(new)
    if not turns or not cached_sum + new_sum:
        raise InvalidRequest("the workload has no prompts: nothing would be asked of the cluster")
    batches = attention_s / QUOTA_S
    return Demand(
        trajectories=len(trajectories),
        turns=turns,
        cached_tokens=cached_sum / turns,
        new_tokens=new_sum / turns,
        generated_tokens=generated / turns,
        held_tokens=held / turns,
        load_bytes=cached_sum / turns * geometry.kv_bytes_per_token,
        written_bytes=(new_sum + generated) / turns * geometry.kv_bytes_per_token,
        pflop=flops / turns / 1e15,
        prefill_engine_s=(attention_s + linear_s + batches * model.overhead_s) / turns,
        engine_gpus=geometry.gpus_per_engine,
    )
