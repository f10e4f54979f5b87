"""The engine of a prefill node: it runs loads into paged memory and checks what arrived.

Owns the loads, the verification of every byte of every loaded block against the keyed content, away
from the event loop, and the hand-off of a prompt to its decode engine: the loaded blocks and a few
new ones, as if their tokens had been computed.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from dualpath.agent.hand_off_spec import HandOffResult
from dualpath.agent.places import Places
from dualpath.bench.testbed.decode_engine import DecodeEngine, Received
from dualpath.bench.testbed.page_pool import (
    PagedMemory,
    PagePool,
    connect_paged,
    result_or_abort,
)
from dualpath.bench.testbed.workload import PlannedLoad
from dualpath.client.kv_client import KVClient
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import DualPathError

CORRUPT_DETAILS_MAX = 16
NEW_BLOCKS = 1
"""Of each prompt that is handed off: computed, not loaded. An append has fewer tokens than a block
of these workloads."""
_requests = itertools.count(1)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """What one load came to, as the engine itself saw it.

    `failure` is "" when every requested block arrived, else the reason. `nbytes` counts blocks
    that were verified right; `shares` are the agent's bytes by path. `ended_s` (monotonic) is when
    the load ended, before it was verified; `deadline_s` is the time that it was given. `handed_off`
    is what its decode engine received, None if nothing was handed off.
    """

    session: int
    turn: int
    requested_blocks: int
    verified_blocks: int
    corrupt_blocks: int
    nbytes: int
    ended_s: float
    elapsed_s: float
    failure: str
    detail: str
    shares: Mapping[str, int]
    events: Mapping[str, int]
    deadline_s: float = 0.0
    handed_off: Received | None = None
    raised: bool = False
    """The load ended with an error, not with a shorter prefix."""
    engine: int = -1
    """Which engine a scheduler gave it to; -1: sessions are dealt to engines in turn."""
    queued_s: float = 0.0
    """From its submission to a scheduler to its assignment."""


@dataclass(slots=True)
class _Arrival:
    """What a load brought, while it is not verified; `new` are blocks that follow it in the prompt.
    `places` are of all of them."""

    places: Places
    new: tuple[bytes, ...]
    deadline_s: float
    abort_s: float = math.inf
    request: str = ""
    direct_share: float | None = None
    blocks: int = 0
    ended_s: float = 0.0
    elapsed_s: float = 0.0
    failure: str = ""
    detail: str = ""
    raised: bool = False
    shares: Mapping[str, int] = field(default_factory=dict)
    events: Mapping[str, int] = field(default_factory=dict)


def _new_blocks(planned: PlannedLoad) -> tuple[bytes, ...]:
    """Names of the blocks that follow a load in its prompt."""
    last = planned.hashes[-1]
    return tuple(
        hashlib.blake2b(last, digest_size=len(last), person=b"new %d" % number).digest()
        for number in range(NEW_BLOCKS)
    )


class PrefillEngine:
    """Replays loads into a paged pool `[layers, pages, layer_bytes]` and checks what came."""

    def __init__(
        self,
        client: KVClient,
        namespace: Namespace,
        memory: PagedMemory,
        *,
        seed: int,
        verifier: ThreadPoolExecutor,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._memory = memory
        self._pool = PagePool(memory.pages, random.Random(seed))
        self._verifier = verifier

    @classmethod
    async def open(
        cls,
        agent: str,
        namespace: Namespace,
        *,
        token: str,
        pages: int,
        behind_compute_link: bool,
        seed: int,
        verifier: ThreadPoolExecutor,
    ) -> PrefillEngine:
        """Connect to the node's agent and register a pool of `pages` blocks.

        `verifier` must have a single thread: the content of an engine has one scratch block.
        """
        client, memory = await connect_paged(
            agent,
            namespace,
            token=token,
            pages=pages,
            behind_compute_link=behind_compute_link,
            seed=seed,
        )
        return cls(client, namespace, memory, seed=seed, verifier=verifier)

    @property
    def client(self) -> KVClient:
        """For the agent's statistics."""
        return self._client

    async def disturbed_pages(self) -> tuple[int, ...]:
        """Pages that were written to since they were given back. Only while nothing is loaded."""
        return await self._run(self._memory.disturbed, range(self._memory.pages))

    async def load(
        self,
        planned: PlannedLoad,
        *,
        policy: str,
        decode_peer: str,
        deadline_s: float,
        decode: DecodeEngine | None = None,
        abort_s: float = math.inf,
        direct_share: float | None = None,
    ) -> asyncio.Task[LoadOutcome]:
        """Run one load; return when it has ended, with the verification under way, and with
        `decode`, the engine at `decode_peer`, the hand-off as well. The load is given up after
        `abort_s`; if it has ended by then, the hand-off is, so long after its beginning. With a
        `direct_share`, as a scheduler assigns it, `policy` is empty.

        Failures are outcomes; only programming errors raise. The pages are taken until all of that
        has ended, so that it never piles up beyond the pool.
        """
        new = () if decode is None else _new_blocks(planned)
        pages = await self._pool.take(len(planned.hashes) + len(new))
        arrival = _Arrival(self._memory.places(pages), new, deadline_s, abort_s)
        arrival.direct_share = direct_share
        if decode is not None:
            arrival.request = f"request-{next(_requests)}"
        try:
            await self._arrive(planned, arrival, policy, decode_peer)
        except BaseException:
            await self._pool.give(pages)
            raise
        return asyncio.create_task(self._end(planned, pages, arrival, decode_peer, decode))

    async def _arrive(
        self, planned: PlannedLoad, arrival: _Arrival, policy: str, decode_peer: str
    ) -> None:
        started_s = time.monotonic()
        count = len(planned.hashes)
        try:
            load = await self._client.load(
                self._namespace.id,
                planned.hashes,
                self._memory.memory,
                replace(arrival.places, base_bytes=arrival.places.base_bytes[:count]),
                deadline_s=arrival.deadline_s,
                policy=policy,
                decode_peer=decode_peer,
                request=arrival.request,
                direct_share=arrival.direct_share,
            )
            result = await result_or_abort(load, arrival.abort_s)
            arrival.blocks = result.blocks
            arrival.shares, arrival.events = result.shares, result.events
            if result.blocks < count:
                arrival.failure, arrival.detail = result.miss.value, result.detail
        except DualPathError as error:
            arrival.failure, arrival.detail, arrival.raised = error.reason, str(error), True
        arrival.ended_s = time.monotonic()
        arrival.elapsed_s = arrival.ended_s - started_s

    async def _end(
        self,
        planned: PlannedLoad,
        pages: tuple[int, ...],
        arrival: _Arrival,
        decode_peer: str,
        decode: DecodeEngine | None,
    ) -> LoadOutcome:
        handed_off: Received | None = None
        try:
            wrong = await self._run(
                self._memory.wrong, planned.hashes[: arrival.blocks], arrival.places
            )
            if decode is not None and arrival.blocks == len(planned.hashes):
                handed_off = await self._hand_off(planned, arrival, decode_peer, decode)
        finally:
            await self._run(self._memory.poison, arrival.places)
            await self._pool.give(pages)
        verified = arrival.blocks - len(wrong)
        return LoadOutcome(
            session=planned.session,
            turn=planned.turn,
            requested_blocks=len(planned.hashes),
            verified_blocks=verified,
            corrupt_blocks=len(wrong),
            nbytes=verified * self._namespace.layout.block_bytes,
            ended_s=arrival.ended_s,
            elapsed_s=arrival.elapsed_s,
            failure="corrupt" if wrong else arrival.failure,
            detail="; ".join(wrong[:CORRUPT_DETAILS_MAX]) if wrong else arrival.detail,
            shares=arrival.shares,
            events=arrival.events,
            deadline_s=arrival.deadline_s,
            handed_off=handed_off,
            raised=arrival.raised,
        )

    async def _hand_off(
        self, planned: PlannedLoad, arrival: _Arrival, decode_peer: str, decode: DecodeEngine
    ) -> Received:
        """Give the loaded blocks and the new ones to the decode engine, all layers at once."""
        first = len(planned.hashes)
        await self._run(self._memory.fill, arrival.new, arrival.places, first)
        hashes = (*planned.hashes, *arrival.new)
        left_s = arrival.deadline_s
        hand_off = await self._client.hand_off(
            arrival.request,
            decode_peer,
            self._namespace.id,
            hashes,
            self._memory.memory,
            arrival.places,
            deadline_s=left_s,
        )
        hand_off.layer_done(self._namespace.layout.layers - 1)
        started_s = time.monotonic()

        async def give() -> tuple[HandOffResult, float]:
            ending = asyncio.ensure_future(hand_off.result())
            if arrival.abort_s < math.inf:
                await asyncio.wait((ending,), timeout=arrival.abort_s)
                await hand_off.abort()
            return await ending, time.monotonic() - started_s

        received, (result, given_s) = await asyncio.gather(
            decode.receive(arrival.request, hashes, left_s), give()
        )
        slower = (given_s, started_s)
        slower = max(slower, (received.elapsed_s, received.started_s))
        return replace(
            received,
            failure=received.failure or result.reason,
            detail="; ".join(filter(None, (received.detail, result.detail))),
            elapsed_s=slower[0],
            started_s=slower[1],
        )

    async def _run(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._verifier, work, *args)

    async def close(self) -> None:
        """Give the memory back and end the session."""
        await self._memory.memory.aclose()
        await self._client.close()
