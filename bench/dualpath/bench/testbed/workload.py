"""What is loaded: sessions of turns, each turn a prefix of block hashes that is stored already.

Owns the generation of agent sessions to the paper's table, the reduction of a trace to loads, and
the scaling of both. Pure and deterministic in its seed: every policy replays the same plan.

Scaling. Contexts keep their lengths in tokens; what shrinks is the KV of a token: a block has a
fixed number of bytes, and as many tokens as make the mean load of the plan about
`load_bytes_mean` big. Loads are taken from all sessions in turn until the budget is planned.
"""

from __future__ import annotations

import enum
import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from dualpath.bench.testbed.trace_formats import TraceRequest
from dualpath.transfer.errors import InvalidRequest

HASH_BYTES = 32
LOAD_BLOCKS_MAX = 4096


class Context(enum.Enum):
    """A row of the paper's table of agent trajectories."""

    K32 = "32k"
    K48 = "48k"
    K64 = "64k"


@dataclass(frozen=True, slots=True)
class Trajectories:
    """A row of the paper's table, in tokens (turns: count). Values are means over trajectories."""

    length_max: int
    turns: float
    append: float
    generate: float
    total: float
    context_mean: float


PAPER_TABLE = {
    Context.K32: Trajectories(32 << 10, 60, 608, 148, 28_639, 17_183),
    Context.K48: Trajectories(48 << 10, 106, 474, 172, 42_607, 25_120),
    Context.K64: Trajectories(64 << 10, 157, 429, 176, 55_958, 32_721),
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a trajectory. `context` tokens are there before it, from earlier turns."""

    context: int
    append: int
    generate: int


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """Load the blocks `hashes`, a whole prefix from the first block on."""

    session: int
    turn: int
    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """The plan of one policy's run. `sessions[s]` are its loads, to be run one after another.

    `chains` are the distinct longest prefixes that have to be stored; together they contain every
    planned block. `block_tokens` says how many real tokens a block stands for.
    """

    source: str
    block_tokens: int
    block_bytes: int
    sessions: tuple[tuple[PlannedLoad, ...], ...]
    chains: tuple[tuple[bytes, ...], ...]

    @property
    def loads(self) -> int:
        """How many loads are planned."""
        return sum(len(session) for session in self.sessions)

    @property
    def load_bytes(self) -> int:
        """Bytes that all loads together bring."""
        return self.block_bytes * sum(
            len(load.hashes) for session in self.sessions for load in session
        )

    def limited(self, budget_bytes: int) -> Workload:
        """The same sessions, cut after about `budget_bytes`: their first turns, in turn."""
        kept: list[list[PlannedLoad]] = [[] for _ in self.sessions]
        left = budget_bytes
        for turn in range(max((len(session) for session in self.sessions), default=0)):
            for session, loads in zip(kept, self.sessions, strict=True):
                if left > 0 and turn < len(loads):
                    session.append(loads[turn])
                    left -= len(loads[turn].hashes) * self.block_bytes
        return replace(self, sessions=tuple(tuple(loads) for loads in kept if loads))

    @property
    def load_blocks_max(self) -> int:
        """Blocks of the largest load."""
        return max((len(load.hashes) for session in self.sessions for load in session), default=0)

    @property
    def stored_blocks(self) -> int:
        """Distinct blocks that are stored first."""
        return len({each for chain in self.chains for each in chain})


def trajectory(row: Trajectories, rng: random.Random) -> list[Turn]:
    """One agent's turns, so that many of them have the means of `row`.

    The table's means hold together only if trajectories differ: turns x (append + generate) is far
    above total. Long trajectories are those of small turns. So a trajectory's mean turn size is
    lognormal, with the spread that gives the table's mean number of turns, its total is uniform up
    to the cut at `length_max`, and the mean context fixes the size of the first prompt.
    """
    first_mean = 2 * row.context_mean - row.total
    grown_mean = row.total - first_mean
    size_mean = row.append + row.generate
    # For a lognormal, E[x] * E[1/x] = exp(sigma^2), and turns = grown / size.
    sigma = math.sqrt(math.log(size_mean * row.turns / grown_mean))
    size = rng.lognormvariate(math.log(size_mean) - sigma * sigma / 2, sigma)
    total = rng.uniform(2 * row.total - row.length_max, row.length_max)
    first = first_mean * total / row.total
    turns = max(1, round((total - first) / size))
    weights = [0.25 + rng.expovariate(1 / 0.75) for _ in range(turns)]
    unit = (total - first) / sum(weights)
    share = row.append / size_mean
    context, result = round(first), []
    for weight in weights:
        append = max(1, round(unit * weight * share))
        generate = max(1, round(unit * weight * (1 - share)))
        result.append(Turn(context, append, generate))
        context += append + generate
    return result


def _grow(chain: list[bytes], blocks: int) -> None:
    """Lengthen a session's chain of block hashes; the content of a block is named by its hash."""
    while len(chain) < blocks:
        chain.append(hashlib.sha256(chain[-1]).digest())


def generated(
    context: Context,
    *,
    sessions: int,
    block_bytes: int,
    load_bytes_mean: int,
    budget_bytes: int,
    seed: int,
) -> Workload:
    """Sessions to the statistics of a row of the paper's table, each entered at a random turn."""
    row = PAPER_TABLE[context]
    rng = random.Random(seed)
    block_tokens = max(1, round(row.context_mean * block_bytes / load_bytes_mean))
    chains: list[list[bytes]] = []
    upcoming: list[Iterator[Turn]] = []
    for session in range(sessions):
        turns = trajectory(row, rng)
        chains.append([hashlib.sha256(f"dualpath-demo/{seed}/{session}".encode()).digest()])
        # A budget covers a few turns of a session: entered anywhere, they have the row's mean.
        upcoming.append(islice(cycle(turns), rng.randrange(len(turns)), None))

    planned: list[list[PlannedLoad]] = [[] for _ in range(sessions)]
    left = budget_bytes
    for session in cycle(range(sessions)):
        if left <= 0:
            break
        blocks = min(LOAD_BLOCKS_MAX, max(1, next(upcoming[session]).context // block_tokens))
        _grow(chains[session], blocks)
        hashes = tuple(chains[session][:blocks])
        planned[session].append(PlannedLoad(session, len(planned[session]), hashes))
        left -= blocks * block_bytes
    return Workload(
        source=f"generated to the paper's {context.value} row",
        block_tokens=block_tokens,
        block_bytes=block_bytes,
        sessions=tuple(tuple(loads) for loads in planned if loads),
        chains=_chains(planned),
    )


def _chains(planned: Iterable[Sequence[PlannedLoad]]) -> tuple[tuple[bytes, ...], ...]:
    """The longest prefixes: those that are no prefix of another planned load."""
    by_length = sorted((load.hashes for loads in planned for load in loads), key=len, reverse=True)
    covered: set[bytes] = set()
    chains = []
    for hashes in by_length:
        # A chain hash names its whole prefix, so the last hash alone tells whether it is covered.
        if hashes[-1] not in covered:
            chains.append(hashes)
            covered.update(hashes)
    return tuple(chains)


@dataclass(frozen=True, slots=True)
class _Hit:
    session: str
    hashes: tuple[bytes, ...]


def _group_hashes(request: TraceRequest, group: int) -> tuple[bytes, ...]:
    """Chain hashes of blocks of `group` trace blocks; an incomplete group at the end is left."""
    parent = hashlib.sha256(request.scope.encode()).digest()
    hashes = []
    ids = request.block_ids
    for start in range(0, len(ids) - group + 1, group):
        words = b"".join(each.to_bytes(8, "little") for each in ids[start : start + group])
        parent = hashlib.sha256(parent + words).digest()
        hashes.append(parent)
    return tuple(hashes)


def _hits(requests: Iterable[TraceRequest], group: int) -> Iterator[_Hit]:
    """What each request finds stored by the requests before it."""
    stored: set[bytes] = set()
    for request in requests:
        hashes = _group_hashes(request, group)[:LOAD_BLOCKS_MAX]
        hit = 0
        while hit < len(hashes) and hashes[hit] in stored:
            hit += 1
        stored.update(hashes)
        if hit:
            yield _Hit(request.session, hashes[:hit])


def prefix_hits(requests: Iterable[TraceRequest]) -> Iterator[tuple[TraceRequest, int]]:
    """Each request with the blocks of it, in the trace's own size, that those before it stored."""
    stored: set[int] = set()
    for request in requests:
        # By Python's hash of the prefix, which is faster than a digest.
        prefix, hit, running = hash(request.scope), 0, True
        for each in request.block_ids:
            prefix = hash((prefix, each))
            running = running and prefix in stored
            hit += running
            stored.add(prefix)
        yield request, hit


def _first_sessions(requests: Iterable[TraceRequest], sessions: int) -> Iterator[TraceRequest]:
    """Requests of the first `sessions` scopes; a trace with one scope for all is taken whole."""
    scopes: set[str] = set()
    for request in requests:
        scopes.add(request.scope)
        if len(scopes) > sessions:
            return
        yield request


REQUESTS_MAX = 20_000
"""Most requests of a trace that are looked at."""


def _queues(hits: Iterable[_Hit], sessions: int, *, shared: bool) -> list[list[tuple[bytes, ...]]]:
    """Loads by session. A trace that names no sessions (`shared`) is dealt out in turn."""
    queues: dict[str, list[tuple[bytes, ...]]] = {}
    for index, hit in enumerate(hits):
        session = str(index % sessions) if shared else hit.session
        queues.setdefault(session, []).append(hit.hashes)
    return list(islice(queues.values(), sessions))


def from_trace(
    name: str,
    requests: Iterable[TraceRequest],
    *,
    sessions: int,
    block_bytes: int,
    load_bytes_mean: int,
    budget_bytes: int,
    seed: int,
) -> Workload:
    """Reduce a trace to loads of what each request would find stored, in the trace's order.

    Raises InvalidRequest if no request of the chosen sessions finds anything.
    """
    chosen = list(islice(_first_sessions(requests, sessions), REQUESTS_MAX))
    found = [hit for _, hit in prefix_hits(chosen) if hit]
    if not found:
        raise InvalidRequest(
            f"{name}: none of the {len(chosen)} requests read repeats a full block of an earlier "
            "one, so there is nothing to load; take more --sessions or another trace"
        )
    mean_blocks = sum(found) / len(found)
    group = max(1, round(mean_blocks * block_bytes / load_bytes_mean))
    queues = _queues(_hits(chosen, group), sessions, shared=not chosen[0].scope)
    if not queues:
        raise InvalidRequest(f"{name}: every repeated prefix is shorter than {group} blocks")
    rng = random.Random(seed)
    starts = [rng.randrange(len(queue)) for queue in queues]
    planned: list[list[PlannedLoad]] = [[] for _ in queues]
    left = budget_bytes
    for session in cycle(range(len(queues))):
        if left <= 0:
            break
        # Entered anywhere, for the mean context; replayed from its start where it ends.
        turn = len(planned[session])
        hashes = queues[session][(starts[session] + turn) % len(queues[session])]
        planned[session].append(PlannedLoad(session, turn, hashes))
        left -= len(hashes) * block_bytes
    return Workload(
        source=name,
        block_tokens=group * chosen[0].block_tokens,
        block_bytes=block_bytes,
        sessions=tuple(tuple(loads) for loads in planned if loads),
        chains=_chains(planned),
    )
