"""Loads from the request to the result.

Owns the checks of a request, the lookup with its lease, the choice of the daemon, and the renewal
of leases. Guarantees that a load which was accepted always ends with a result, at its deadline at
the latest, and never in an exception but for InvalidRequest.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence

import numpy as np
from dualpath.agent.active_load import ActiveLoad, check_found
from dualpath.agent.config import AgentConfig
from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.daemon_loads import DaemonLoads
from dualpath.agent.load_spec import LoadSpec, LoadUpdate, check_hashes
from dualpath.agent.outcome import LoadResult, LoadStarted, Lookup, MissReason, tiers_of
from dualpath.agent.regions import Regions
from dualpath.agent.self_relay import SelfRelay
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.service.histogram import Histogram
from dualpath.kvstore.store_api import TIERS, Tier
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import (
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)

log = logging.getLogger(__name__)


def daemon_for(namespace_id: bytes, first_hash: bytes, daemons: Sequence[str]) -> str:
    """Rendezvous hashing: the daemon that holds chains which begin with `first_hash`."""
    if not daemons:
        raise InvalidRequest("no daemon is configured: give the agent at least one")

    def weight(address: str) -> bytes:
        return hashlib.sha256(namespace_id + first_hash + address.encode()).digest()

    return max(daemons, key=weight)


class Loader:
    """See the module docstring. Belongs to the loop."""

    def __init__(
        self,
        config: AgentConfig,
        daemons: Mapping[str, DaemonLink],
        loads: Mapping[str, DaemonLoads],
        regions: Regions,
        namespaces: Mapping[bytes, Namespace],
        self_relay: SelfRelay,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._config = config
        self._daemons = daemons
        self._loads = loads
        self._regions = regions
        self._namespaces = namespaces
        self._self_relay = self_relay
        self._loop = loop
        self._starting: dict[str, ActiveLoad] = {}
        self._renewer = asyncio.create_task(self._renew(), name="renew leases")
        self.events: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.done = 0
        self.requested_blocks = 0
        self.loaded_blocks = 0
        self.tier_blocks = dict.fromkeys((tier.value for tier in Tier), 0)
        self.load_s = Histogram()

    @property
    def active(self) -> int:
        """Loads under way."""
        return len(self._starting) + sum(len(loads.loads) for loads in self._loads.values())

    async def lookup(self, namespace_id: bytes, hashes: Sequence[bytes]) -> Lookup:
        """Longest stored prefix, without a lease; what fails is a miss with its reason."""
        check_hashes(tuple(hashes))
        self.layout(namespace_id)
        try:
            daemon = await self._daemon(namespace_id, hashes[0], self._config.lookup_timeout_s)
            answer = await daemon.lookup(
                namespace_id, hashes, lease_s=0, timeout_s=self._config.lookup_timeout_s
            )
        except DualPathError as error:
            miss = _miss_of(error)
            self.misses[miss.value] += 1
            return Lookup(0, (), miss, str(error))
        miss = MissReason.of_proto(answer.miss)
        if miss is not MissReason.NONE:
            self.misses[miss.value] += 1
        tiers = tiers_of(answer)
        return Lookup(answer.blocks, tiers, miss, answer.detail)

    def layout(self, namespace_id: bytes) -> KVLayout:
        """Layout of an opened namespace. Raises InvalidRequest."""
        namespace = self._namespaces.get(namespace_id)
        if namespace is None:
            raise InvalidRequest(
                f"unknown namespace {namespace_id.hex()}: open it first", reason="namespace"
            )
        return namespace.layout

    async def load(
        self, spec: LoadSpec, had: Collection[tuple[int, int]] = ()
    ) -> AsyncGenerator[LoadUpdate, None]:
        """Run a load. Raises InvalidRequest before the first update, nothing later. `had`, as
        (block, chunk of the block), is in place and verified already.

        Closing the iterator early aborts the load.
        """
        load = self._accept(spec)
        load.had = had
        loads: DaemonLoads | None = None
        try:
            try:
                load, loads = await self._start(load)
            finally:
                self._starting.pop(spec.load_id, None)
            yield LoadUpdate(started=load.hit)
            while load.result is None:
                yield await load.next_change()
            if load.last_told is not load.result:
                yield LoadUpdate(load.layers_ready, load.result.blocks, result=load.result)
        finally:
            if loads is not None and load.result is None:
                loads.end(load, MissReason.UNAVAILABLE, "nobody waits for it", "aborted")
            if load.result is not None:
                self._count(load, load.result)

    def abort(self, load_ids: Sequence[str]) -> int:
        """End loads; their writes are fenced when this returns. Says how many there were."""
        aborted = 0
        for load_id in load_ids:
            starting = self._starting.get(load_id)
            if starting is not None:
                starting.aborted = True
                limit = starting.look_limit
                if limit is not None and not limit.expired():
                    limit.reschedule(self._loop.time())
                aborted += 1
            for loads in self._loads.values():
                load = loads.loads.get(load_id)
                if load is not None:
                    loads.end(load, MissReason.UNAVAILABLE, "aborted", "aborted")
                    aborted += 1
        return aborted

    async def close(self) -> None:
        """End all loads."""
        self._renewer.cancel()
        for loads in self._loads.values():
            loads.close()

    def _accept(self, spec: LoadSpec) -> ActiveLoad:
        layout = self.layout(spec.namespace_id)
        entry = self._regions.get(spec.region)
        spec.places.check(layout, len(spec.hashes), entry.region.nbytes)
        spec.placement(self._config.policy)
        if spec.deadline_s > self._config.deadline_s_max:
            raise InvalidRequest(
                f"deadline_s {spec.deadline_s} is over {self._config.deadline_s_max}; ask for less"
            )
        known = next(iter(self._loads.values())).routes.names if self._loads else ()
        for path in spec.paths:
            if path not in known:
                raise InvalidRequest(
                    f"unknown path {path!r}; this agent knows {', '.join(known) or 'none'}"
                )
        if spec.load_id in self._starting or any(
            spec.load_id in loads.loads for loads in self._loads.values()
        ):
            raise InvalidRequest(
                f"load {spec.load_id!r} is running already; choose another load_id",
                reason="duplicate_load",
            )
        load = ActiveLoad(spec, layout, entry, self._loop.time())
        self._starting[spec.load_id] = load
        return load

    async def _start(self, load: ActiveLoad) -> tuple[ActiveLoad, DaemonLoads | None]:
        """Look up and hand the load over, or one in its place; no loads if it is over already."""
        try:
            if self.active > self._config.loads_max:
                raise Overloaded(f"{self.active - 1} loads are running", retry_after_s=0.1)
            # Calls have deadlines of their own, but those of a dying channel may come late.
            async with asyncio.timeout_at(load.deadline_at) as limit:
                load.look_limit = limit
                try:
                    loads, load = await self._looked_first(load)
                    if loads is not None:
                        return load, loads
                    daemon, answer = await self._looked_up(load)
                except Unavailable:
                    # The session may have ended on the way; with a new one the prefix is not lost.
                    daemon, answer = await self._looked_up(load)
        except TimeoutError:
            if load.aborted:
                load.events["aborted"] += 1
                self._miss(load, MissReason.UNAVAILABLE, "aborted before it began")
            else:
                load.events["deadline"] += 1
                self._miss(load, MissReason.DEADLINE, "the look-up had no answer by the deadline")
            return load, None
        except DualPathError as error:
            load.events[_event_of(error)] += 1
            self._miss(load, _miss_of(error), str(error))
            return load, None
        finally:
            load.look_limit = None
        load.lookup_s = self._loop.time() - load.started_at
        if answer.blocks == 0:
            self._miss(load, MissReason.of_proto(answer.miss), answer.detail)
            return load, None
        return load, await self._begin(load, daemon, answer)

    async def _looked_first(self, load: ActiveLoad) -> tuple[DaemonLoads | None, ActiveLoad]:
        """Let the look-up go with the first grant, if that may be; None if it did not, and a load
        that has not begun."""
        spec = load.spec
        address = daemon_for(spec.namespace_id, spec.hashes[0], tuple(self._daemons))
        loads = self._loads[address]
        if load.had or not loads.first_looks.may_begin(load):
            return None, load
        answered = loads.first_looks.begin(load, spec.placement(self._config.policy))
        if answered is None:
            return None, self._afresh(load)
        self._starting.pop(spec.load_id, None)
        try:
            async with asyncio.timeout(self._lookup_left_s(load)):
                begun = await answered
        except TimeoutError:
            raise DeadlineExceeded(f"look-up at daemon {address}: no answer in time") from None
        finally:
            if load.looking is not None and load.result is None:
                loads.first_looks.withdraw(load)
        if begun:
            return loads, load
        return None, self._afresh(load)

    def _afresh(self, load: ActiveLoad) -> ActiveLoad:
        """In place of a load that was taken back: one that has not begun, as old as it."""
        fresh = ActiveLoad(load.spec, load.layout, load.entry, load.started_at)
        fresh.look_limit = load.look_limit
        self._starting[load.spec.load_id] = fresh
        return fresh

    async def _looked_up(self, load: ActiveLoad) -> tuple[DaemonLink, store_pb2.LookupResponse]:
        """The daemon of a load, and what it holds of the prefix; within the time for that."""
        spec = load.spec
        left_s = self._lookup_left_s(load)
        daemon = await self._daemon(spec.namespace_id, spec.hashes[0], left_s)
        answer = await daemon.lookup(
            spec.namespace_id,
            spec.hashes,
            lease_s=self._config.lease_s,
            timeout_s=self._lookup_left_s(load),
        )
        return daemon, answer

    def _lookup_left_s(self, load: ActiveLoad) -> float:
        """Time that is left to look up."""
        until = load.started_at + min(self._config.lookup_timeout_s, load.spec.deadline_s)
        return max(0.001, until - self._loop.time())

    async def _begin(
        self, load: ActiveLoad, daemon: DaemonLink, answer: store_pb2.LookupResponse
    ) -> DaemonLoads | None:
        hit = LoadStarted(answer.blocks, MissReason.of_proto(answer.miss), answer.detail)
        try:
            check_found(answer, load.spec, load.layout)
            if load.entry.behind_compute_link:
                await self._self_relay.ensure()
            if load.entry.gone or load.aborted:
                raise DualPathError("aborted before it began", reason="aborted")
            if self._loop.time() >= load.deadline_at:
                raise DeadlineExceeded("the lookup took all the time that the load had")
            load.begin(hit, answer.lease_id, np.frombuffer(answer.checksums, "<u8"))
            load.tiers = answer.tiers
            loads = self._loads[daemon.address]
            loads.add(load, load.spec.placement(self._config.policy))
        except DualPathError as error:
            load.events[_event_of(error)] += 1
            load.hit = hit
            await daemon.release((answer.lease_id,))
            self._miss(load, _miss_of(error), str(error))
            return None
        return loads

    def _miss(self, load: ActiveLoad, miss: MissReason, detail: str) -> None:
        """The load ends without having begun."""
        if not load.hit.hit_blocks:
            load.hit = LoadStarted(0, miss, detail)
        load.miss, load.detail = miss, detail
        load.lookup_s = load.lookup_s or self._loop.time() - load.started_at
        load.progress.cut(0)
        load.finish(self._loop.time(), {})

    async def _daemon(self, namespace_id: bytes, first_hash: bytes, timeout_s: float) -> DaemonLink:
        daemon = self._daemons[daemon_for(namespace_id, first_hash, tuple(self._daemons))]
        await daemon.link.settled(timeout_s)
        return daemon

    def _count(self, load: ActiveLoad, result: LoadResult) -> None:
        self.done += 1
        self.requested_blocks += result.requested_blocks
        self.loaded_blocks += result.blocks
        self.events.update(result.events)
        for code, tier in enumerate(TIERS):
            self.tier_blocks[tier.value] += load.tiers.count(code, 0, result.blocks)
        if result.miss is not MissReason.NONE:
            self.misses[result.miss.value] += 1
        self.load_s.observe(result.elapsed_s)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._config.lease_s / 3)
            await asyncio.gather(
                *(loads.renew_leases(self._config.lease_s) for loads in self._loads.values())
            )


def _miss_of(error: DualPathError) -> MissReason:
    if isinstance(error, Overloaded):
        return MissReason.OVERLOADED
    if isinstance(error, DeadlineExceeded):
        return MissReason.DEADLINE
    if isinstance(error, InvalidRequest) and error.reason == "namespace":
        return MissReason.NAMESPACE
    return MissReason.UNAVAILABLE


def _event_of(error: DualPathError) -> str:
    if isinstance(error, Overloaded | DeadlineExceeded):
        return error.reason
    return "aborted" if error.reason == "aborted" else "daemon_unavailable"
