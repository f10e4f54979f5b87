"""One replay: a trace, several capacities, each policy and the optimum at each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dualpath.bench.eviction.chains import Chains, chains_of, in_order
from dualpath.bench.eviction.optimum import Optimum, next_uses
from dualpath.bench.eviction.prefix_cache import Cache, PrefixCache, TierKind
from dualpath.bench.eviction.synthetic import synthetic_requests
from dualpath.bench.progress import Progress
from dualpath.bench.testbed.trace_formats import TraceRequest, read_trace
from dualpath.kvstore.eviction_choice import POLICIES, check_policy, new_policy
from dualpath.transfer.errors import InvalidRequest

OPTIMUM = "optimum"
CAPACITIES = (0.02, 0.05, 0.1, 0.2, 0.4)
CONCURRENCY = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionConfig:
    """What to replay. `trace` is a file, or "" for generated sessions; `capacities` are shares of
    the trace's distinct blocks, or counts of blocks where they exceed 1; `sessions` bounds how
    many are replayed (0: all)."""

    trace: str = ""
    policies: tuple[str, ...] = tuple(POLICIES)
    capacities: tuple[float, ...] = CAPACITIES
    tier: TierKind = TierKind.SSD
    concurrency: int = CONCURRENCY
    sessions: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.policies:
            check_policy(name)
        if not self.policies:
            raise InvalidRequest("policies: name at least one")
        if not self.capacities or not all(0 < each < 1 << 40 for each in self.capacities):
            raise InvalidRequest(
                f"capacities must be positive shares or counts, not {self.capacities}"
            )
        if not 1 <= self.concurrency <= 1 << 20:
            raise InvalidRequest(f"concurrency must lie in 1..{1 << 20}, not {self.concurrency}")
        if self.sessions < 0:
            raise InvalidRequest(f"sessions must not be negative, not {self.sessions}")


@dataclass(frozen=True, slots=True)
class HitRates:
    """Hits of one policy at one capacity."""

    policy: str
    hit_blocks: int
    asked_blocks: int
    hit_tokens: int
    asked_tokens: int

    @property
    def blocks(self) -> float:
        """Share of the blocks, and of their bytes, that were found."""
        return self.hit_blocks / self.asked_blocks if self.asked_blocks else 0.0

    @property
    def tokens(self) -> float:
        """Share of all input tokens, those that fill no block included."""
        return self.hit_tokens / self.asked_tokens if self.asked_tokens else 0.0


@dataclass(slots=True)
class EvictionReport:
    """`rates[blocks][policy]` for each capacity in blocks."""

    trace: str
    tier: TierKind
    requests: int
    asked_blocks: int
    distinct_blocks: int
    block_tokens: int
    concurrency: int
    seed: int
    rates: dict[int, dict[str, HitRates]] = field(default_factory=dict)

    def to_json(self) -> Mapping[str, object]:
        """For a file."""
        return {
            "trace": self.trace,
            "tier": self.tier.value,
            "requests": self.requests,
            "asked_blocks": self.asked_blocks,
            "distinct_blocks": self.distinct_blocks,
            "block_tokens": self.block_tokens,
            "concurrency": self.concurrency,
            "seed": self.seed,
            "bound": "optimum: MIN with bypass, exact for blocks of one size; no policy hits more",
            "capacities": [
                {
                    "blocks": blocks,
                    "share_of_distinct": blocks / self.distinct_blocks,
                    "block_hit_rate": {name: rate.blocks for name, rate in rates.items()},
                    "token_hit_rate": {name: rate.tokens for name, rate in rates.items()},
                    "of_optimum": {
                        name: rate.blocks / rates[OPTIMUM].blocks if rates[OPTIMUM].blocks else 1.0
                        for name, rate in rates.items()
                    },
                }
                for blocks, rates in self.rates.items()
            ],
        }


def replay(config: EvictionConfig, progress: Progress) -> EvictionReport:
    """Run it. Raises InvalidRequest (the trace)."""
    chains = _load(config, progress)
    report = EvictionReport(
        trace=Path(config.trace).name if config.trace else f"generated, seed {config.seed}",
        tier=config.tier,
        requests=len(chains.paths),
        asked_blocks=chains.blocks,
        distinct_blocks=chains.nodes,
        block_tokens=chains.block_tokens,
        concurrency=config.concurrency,
        seed=config.seed,
    )
    uses = next_uses(chains)
    for blocks in _capacities(config.capacities, chains.nodes):
        caches: dict[str, Cache] = {
            name: PrefixCache(new_policy(name), blocks, chains.parent, config.tier)
            for name in config.policies
        }
        caches[OPTIMUM] = Optimum(chains, uses, blocks)
        report.rates[blocks] = {
            name: _run(name, cache, chains, blocks, progress) for name, cache in caches.items()
        }
    return report


def _load(config: EvictionConfig, progress: Progress) -> Chains:
    progress.stage("reading the trace" if config.trace else "generating sessions")
    found: Sequence[TraceRequest] | None = None
    source = read_trace(config.trace) if config.trace else synthetic_requests(config.seed)
    found = in_order(
        source, concurrency=config.concurrency, sessions=config.sessions, seed=config.seed
    )
    for step in chains_of(found):
        if isinstance(step, Chains):
            progress.done(
                f"{len(found)} requests, {step.blocks} blocks, {step.nodes} of them distinct"
            )
            if not step.nodes:
                raise InvalidRequest("the trace has no full block")
            return step
        progress.move(step / len(found))
    raise AssertionError("chains_of ends with the chains")


def _capacities(wanted: Sequence[float], nodes: int) -> list[int]:
    counts = [round(each * nodes) if each <= 1 else round(each) for each in wanted]
    return sorted({max(1, count) for count in counts})


def _run(name: str, cache: Cache, chains: Chains, blocks: int, progress: Progress) -> HitRates:
    progress.stage(f"{name}, {blocks} blocks")
    hits = 0
    for number, path in enumerate(chains.paths):
        hits += cache.request(number, path)
        progress.move(number / len(chains.paths))
    rates = HitRates(
        policy=name,
        hit_blocks=hits,
        asked_blocks=chains.blocks,
        hit_tokens=hits * chains.block_tokens,
        asked_tokens=sum(chains.input_tokens),
    )
    progress.done(f"{100 * rates.blocks:.2f} % of the blocks")
    return rates
