"""Look-ups of 1,000 keys among a million blocks: in process, over gRPC, over the local socket.

Each look-up takes a lease, as a reader's does; ending it is not timed. Over a wire it is compared
with an empty call on the same connection, one after the other, so that both see the same machine.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
from dualpath.bench import serving
from dualpath.bench.serving import Serving
from dualpath.bench.store.index_fixture import CHAIN_BLOCKS, DRAM_BYTES, IndexFixture, make_index
from dualpath.bench.store.section import Figures, is_trial
from dualpath.client.local_store import LocalStore
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.proto.channel import client_options
from dualpath.proto.v1 import store_pb2, store_pb2_grpc
from dualpath.transfer.errors import Corrupt
from grpc_health.v1 import health_pb2, health_pb2_grpc

BLOCKS = 1_000_000
TRIAL_BLOCKS = 20_000
_OWNER = "bench"
_LEASE_S = 60.0
_CALLS = 300
_HASH_BYTES = 32


class Timings:
    """Seconds of one kind of call, round by round."""

    def __init__(self) -> None:
        self.rounds: list[list[float]] = []

    def add(self, seconds: list[float]) -> None:
        """One round."""
        self.rounds.append(seconds)

    @property
    def p50_s(self) -> float:
        """Median over the rounds of their medians."""
        return statistics.median(statistics.median(times) for times in self.rounds)

    @property
    def p99_s(self) -> float:
        """Median over the rounds of their 99th percentiles."""
        return statistics.median(float(np.percentile(times, 99)) for times in self.rounds)

    def added_to(self, other: Timings) -> float:
        """Median over the rounds of how much more the median takes than the other's."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(
            statistics.median(mine) - statistics.median(theirs) for mine, theirs in pairs
        )


def measure(scratch: Path, rounds: int, progress: Callable[[str], None]) -> Figures:
    """Figures of the section `lookup`."""
    blocks, calls = (TRIAL_BLOCKS, 20) if is_trial(rounds) else (BLOCKS, _CALLS)
    fixture = make_index(scratch / "data", blocks)
    progress(f"{blocks} blocks in {fixture.chains} chains")
    in_process = _in_process(fixture, rounds, calls)
    progress(f"in process: {in_process.p50_s * 1e6:.0f} us")
    with serving.daemon(scratch, disk_bytes=fixture.disk_bytes, dram_bytes=DRAM_BYTES) as daemon:
        empty_call, call = asyncio.run(_over_grpc(daemon, fixture, rounds, calls))
        progress(f"gRPC: {call.p50_s * 1e3:.2f} ms, empty {empty_call.p50_s * 1e3:.2f} ms")
        empty_trip, trip = _over_socket(daemon, fixture, rounds, calls)
        progress(f"socket: {trip.p50_s * 1e3:.2f} ms, empty {empty_trip.p50_s * 1e3:.2f} ms")
    return {
        "blocks": blocks,
        "keys": CHAIN_BLOCKS,
        "in_process_keys_per_s": CHAIN_BLOCKS / in_process.p50_s,
        "in_process_p99_over_p50": in_process.p99_s / in_process.p50_s,
        "grpc_added_ms": 1e3 * call.added_to(empty_call),
        "grpc_ms": 1e3 * call.p50_s,
        "grpc_p99_ms": 1e3 * call.p99_s,
        "grpc_empty_ms": 1e3 * empty_call.p50_s,
        "socket_added_ms": 1e3 * trip.added_to(empty_trip),
        "socket_ms": 1e3 * trip.p50_s,
        "socket_p99_ms": 1e3 * trip.p99_s,
        "socket_empty_ms": 1e3 * empty_trip.p50_s,
        "p99_over_p50": max(call.p99_s / call.p50_s, trip.p99_s / trip.p50_s),
    }


def _chains(fixture: IndexFixture, count: int, seed: int) -> list[bytes]:
    numbers = np.random.default_rng(seed).integers(0, fixture.chains, count)
    return [fixture.chain(int(number)) for number in numbers]


def _check(blocks: int) -> None:
    if blocks != CHAIN_BLOCKS:
        raise Corrupt(f"a look-up found {blocks} of {CHAIN_BLOCKS} blocks")


def _in_process(fixture: IndexFixture, rounds: int, calls: int) -> Timings:
    timings, space = Timings(), fixture.namespace.id
    with BlockStore.open(fixture.path, fixture.config) as store:
        for number in range(rounds):
            times: list[float] = []
            for chain in _chains(fixture, calls, number):
                hashes = list(PackedHashes(chain, _HASH_BYTES))
                start = time.perf_counter()
                hit = store.lookup(space, hashes, owner=_OWNER, lease_s=_LEASE_S)
                times.append(time.perf_counter() - start)
                _check(hit.blocks)
                store.release(hit.lease_id, owner=_OWNER)
            timings.add(times)
    return timings


async def _over_grpc(
    daemon: Serving, fixture: IndexFixture, rounds: int, calls: int
) -> tuple[Timings, Timings]:
    empty, full = Timings(), Timings()
    async with grpc.aio.insecure_channel(
        daemon.address("listen"), options=client_options()
    ) as channel:
        stub: Any = store_pb2_grpc.StoreStub(channel)
        health: Any = health_pb2_grpc.HealthStub(channel)
        nothing = health_pb2.HealthCheckRequest()
        gc.collect()
        gc.freeze()
        try:
            for number in range(rounds):
                empty_times: list[float] = []
                full_times: list[float] = []
                for chain in _chains(fixture, calls, number):
                    await _timed(partial(health.Check, nothing, timeout=10), empty_times)
                    request = store_pb2.LookupRequest(
                        namespace_id=fixture.namespace.id,
                        hashes=chain,
                        hash_bytes=_HASH_BYTES,
                        lease_ms=int(1000 * _LEASE_S),
                    )
                    hit = await _timed(partial(stub.Lookup, request, timeout=10), full_times)
                    _check(hit.blocks)
                    await stub.Release(store_pb2.ReleaseRequest(lease_id=[hit.lease_id]))
                empty.add(empty_times)
                full.add(full_times)
        finally:
            gc.unfreeze()
    return empty, full


async def _timed(call: Callable[[], Awaitable[Any]], times: list[float]) -> Any:
    start = time.perf_counter()
    answer = await call()
    times.append(time.perf_counter() - start)
    return answer


def _over_socket(
    daemon: Serving, fixture: IndexFixture, rounds: int, calls: int
) -> tuple[Timings, Timings]:
    empty, full, space = Timings(), Timings(), fixture.namespace.id
    with LocalStore.connect(f"{daemon.address('unix')}.local", prefault=False) as store:
        for number in range(rounds):
            empty_times: list[float] = []
            full_times: list[float] = []
            for chain in _chains(fixture, calls, number):
                start = time.perf_counter()
                store.ping()
                between = time.perf_counter()
                hashes = PackedHashes(chain, _HASH_BYTES)
                hit = store.lookup(space, hashes, lease_s=_LEASE_S)
                full_times.append(time.perf_counter() - between)
                empty_times.append(between - start)
                _check(hit.blocks)
                store.release((hit.lease_id,))
            empty.add(empty_times)
            full.add(full_times)
    return empty, full
