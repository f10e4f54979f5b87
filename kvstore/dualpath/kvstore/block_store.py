"""`BlockStore`: the embedded store, a thin composition that implements `store_api.Store`.

Opens and closes everything in order and passes calls on: lookup to `BlockReader`, chunks to
`ChunkFetcher`, writing to `BlockWriter`. Owns the data directory's lock, the arena and the
committer's thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from dualpath.kvstore import embedded
from dualpath.kvstore.background_scrub import start_scrub
from dualpath.kvstore.block_events import BlockEvents
from dualpath.kvstore.block_locator import BlockLocator
from dualpath.kvstore.block_mapper import BlockMapper, check_mapped_lease_s
from dualpath.kvstore.block_reader import BlockReader
from dualpath.kvstore.block_writer import OnExpired
from dualpath.kvstore.checksum import Buffer
from dualpath.kvstore.chunk_batch import ChunkBatch
from dualpath.kvstore.chunk_check import ChunkCheck
from dualpath.kvstore.chunk_fetcher import ChunkFetcher
from dualpath.kvstore.clean_close import leave_snapshot
from dualpath.kvstore.data_directory import DataDirectory
from dualpath.kvstore.device import Device
from dualpath.kvstore.fetched_chunk import ArenaChunk
from dualpath.kvstore.invalidator import Invalidator
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.lease_shares import ShareRule
from dualpath.kvstore.mapped_read import ReadBlocks
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.read_ahead import start_read_ahead
from dualpath.kvstore.scrubber import Scrubber
from dualpath.kvstore.store_api import (
    BlockPlaces,
    Invalidation,
    InvalidationScope,
    MappedPrefix,
    NewBlock,
    PrefixHit,
    Reservation,
    ScrubStep,
    SealRequest,
    SealStatus,
    StoreStats,
    Tier,
)
from dualpath.kvstore.store_config import StoreConfig
from dualpath.kvstore.store_health import StoreHealth
from dualpath.kvstore.store_opening import StoreParts, open_parts
from dualpath.transfer.region import Region
from numpy.typing import ArrayLike, NDArray

__all__ = ["BlockStore", "StoreConfig"]

_log = logging.getLogger(__name__)


class BlockStore:
    """See `Store` for the contract of each method. Use `open`; also a context manager."""

    def __init__(self, parts: StoreParts) -> None:
        self._directory, self._index, self._state = parts.directory, parts.index, parts.state
        state = self._state
        self._reader = BlockReader(state)
        self._mapper = BlockMapper(state)
        self._locator = BlockLocator(state)
        self._check = ChunkCheck(state)
        self._fetcher = ChunkFetcher(state, self._check)
        self._ahead = start_read_ahead(state, self._fetcher)
        self._writer, self._committer = parts.writer, parts.committer
        self._invalidator = Invalidator(
            state, self._writer, self._committer, self._index, parts.cuts
        )
        self._closing = threading.Lock()
        self._scrubber = Scrubber(state)
        self._scrubbing = threading.Lock()
        self._scrub = start_scrub(state, self._scrubber, self.scrub_step, parts.directory.path)
        self._own_device = parts.own_device
        self.recovered = parts.recovered
        """What opening found."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: StoreConfig | None = None,
        *,
        device: Device | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> BlockStore:
        """Open or create the store in a directory.

        `device` and `clock` (seconds) replace the SSD and the time in tests. Raises Unavailable
        (locked by another process), InvalidRequest (a newer format, not a data directory),
        Corrupt (META is damaged), OSError (the file system refuses).
        """
        config = config or StoreConfig()
        directory = DataDirectory(path)
        try:
            return cls(open_parts(directory, config, device, clock))
        except BaseException:
            directory.close()
            raise

    def __repr__(self) -> str:
        state = self._state
        return f"<BlockStore {self._directory.path} {state.catalog.blocks} blocks {state.ssd!r}>"

    @property
    def arena(self) -> Region:
        """See Store."""
        return self._state.dram.region

    @property
    def store_id(self) -> str:
        """Random id of the data directory."""
        return self._directory.store_id

    def set_on_expired(self, on_expired: OnExpired | None) -> None:
        """Call this with the ids of reservations that have expired, before their extents are
        used again: whoever lets others write there fences them in it. Called on the committer's
        thread, without a lock; it should be quick and may block for a moment."""
        self._writer.on_expired = on_expired

    def share_leases(self, rule: ShareRule) -> None:
        """From now on no holder may lease more than its share."""
        self._state.share_leases(rule)

    def open_namespace(self, namespace: Namespace) -> bytes:
        """See Store."""
        with self._state.lock:
            self._state.check_open()
            return self._state.catalog.open(namespace).id

    def namespace(self, namespace_id: bytes) -> Namespace:
        """See Store."""
        return self._state.catalog.entry(namespace_id).namespace

    def layout(self, namespace_id: bytes) -> KVLayout:
        """See Store."""
        return self._state.catalog.entry(namespace_id).layout

    def lookup(
        self, namespace_id: bytes, hashes: Sequence[bytes], *, owner: str, lease_s: float
    ) -> PrefixHit:
        """See Store."""
        return self._reader.lookup(namespace_id, hashes, owner=owner, lease_s=lease_s)

    def lookup_packed(
        self, namespace_id: bytes, hashes: Buffer, hash_bytes: int, *, owner: str, lease_s: float
    ) -> PrefixHit:
        """See Store."""
        return self._reader.lookup_packed(
            namespace_id, hashes, hash_bytes, owner=owner, lease_s=lease_s
        )

    def map(
        self, namespace_id: bytes, hashes: Sequence[bytes], *, owner: str, lease_s: float
    ) -> MappedPrefix:
        """See Store."""
        check_mapped_lease_s(lease_s)
        hit = self._reader.lookup(namespace_id, hashes, owner=owner, lease_s=lease_s)
        return self._mapper.pin(namespace_id, hit, owner=owner)

    def map_packed(
        self, namespace_id: bytes, hashes: Buffer, hash_bytes: int, *, owner: str, lease_s: float
    ) -> MappedPrefix:
        """See Store."""
        check_mapped_lease_s(lease_s)
        hit = self._reader.lookup_packed(
            namespace_id, hashes, hash_bytes, owner=owner, lease_s=lease_s
        )
        return self._mapper.pin(namespace_id, hit, owner=owner)

    def renew(self, lease_id: int, *, owner: str, lease_s: float) -> None:
        """See Store."""
        self._reader.renew(lease_id, owner=owner, lease_s=lease_s)

    def release(self, lease_id: int, *, owner: str) -> None:
        """See Store."""
        self._reader.release(lease_id, owner=owner)

    def fetch(self, lease_id: int, block: int, chunk: int) -> ArenaChunk:
        """See Store."""
        return self._fetcher.fetch(lease_id, block, chunk)

    def fetch_batch(
        self,
        lease_id: int,
        blocks: ArrayLike,
        chunks: ArrayLike,
        *,
        verify: bool = False,
        wait: bool = True,
        patient: bool = True,
        paced: bool = False,
    ) -> ChunkBatch:
        """See Store."""
        return self._fetcher.fetch_batch(
            lease_id, blocks, chunks, verify=verify, wait=wait, patient=patient, paced=paced
        )

    def locate(self, lease_id: int, blocks: NDArray[np.int32]) -> BlockPlaces:
        """See Store."""
        return self._locator.locate(lease_id, blocks)

    def report_corrupt(self, lease_id: int, block: int, chunk: int) -> bool:
        """See Store."""
        return self._check.report_corrupt(lease_id, block, chunk)

    def reserve(
        self, namespace_id: bytes, blocks: Sequence[NewBlock], *, owner: str, ttl_s: float
    ) -> tuple[Reservation, ...]:
        """See Store."""
        return self._writer.reserve(namespace_id, blocks, owner=owner, ttl_s=ttl_s)

    def seal(
        self, requests: Sequence[SealRequest], *, owner: str, durable: bool, writer: str = ""
    ) -> tuple[SealStatus, ...]:
        """See Store."""
        return self._writer.seal(requests, owner=owner, durable=durable, writer=writer)

    def begin_seal(
        self,
        requests: Sequence[SealRequest],
        *,
        owner: str,
        durable: bool,
        writer: str = "",
        more: bool = False,
    ) -> Callable[[], tuple[SealStatus, ...]]:
        """See Store."""
        return self._writer.begin_seal(
            requests, owner=owner, durable=durable, writer=writer, more=more
        )

    def abandon(self, reservation_ids: Sequence[int], *, owner: str) -> None:
        """See Store."""
        self._writer.abandon(reservation_ids, owner=owner)

    def forget_owner(self, owner: str) -> None:
        """See Store."""
        self._writer.forget_owner(owner)

    @property
    def events(self) -> BlockEvents:
        """What became present and what left since the store was opened; bounded."""
        return self._state.events

    def retain(self, namespace_id: bytes, hashes: Sequence[bytes], *, retain_s: float) -> int:
        """See Store."""
        packed = PackedHashes.of(hashes)
        state = self._state
        with state.lock:
            state.check_open()
            entry = state.catalog.entry(namespace_id)
            rows = state.expiry.trim(entry, state.catalog.prefix(entry, packed))
            return state.retention.retain(entry, rows, retain_s)

    def invalidate(self, scope: InvalidationScope, *, dry_run: bool = False) -> Invalidation:
        """See Store."""
        return self._invalidator.run(scope, dry_run=dry_run)

    def put(
        self,
        namespace_id: bytes,
        hashes: Sequence[bytes],
        parents: Sequence[bytes],
        data: Sequence[Buffer],
        *,
        durable: bool = True,
    ) -> tuple[embedded.PutStatus, ...]:
        """Store whole blocks, parents first; see `embedded.put`."""
        return embedded.put(self, namespace_id, hashes, parents, data, durable=durable)

    def get(self, namespace_id: bytes, hashes: Sequence[bytes]) -> list[bytes]:
        """The longest prefix that is present, every byte verified; see `embedded.get`."""
        return embedded.get(self, namespace_id, hashes)

    def get_into(
        self,
        namespace_id: bytes,
        hashes: Sequence[bytes],
        target: memoryview | bytearray,
        *,
        at: NDArray[np.int64] | None = None,
        verify: bool = True,
    ) -> ReadBlocks:
        """`get` into memory of the caller's, at its speed; see `embedded.get_into`."""
        return embedded.get_into(self, namespace_id, hashes, target, at=at, verify=verify)

    def stats(self) -> StoreStats:
        """See Store."""
        self._fetcher.reap()
        state = self._state
        with state.lock:
            state.reap()
            counters = state.counters
            return StoreStats(
                blocks=state.catalog.blocks,
                namespaces=len(state.catalog),
                leases=len(state.leases),
                reservations=len(state.reservations),
                capacity_bytes={
                    Tier.DRAM: state.dram.slots.capacity_bytes,
                    Tier.SSD: state.ssd.capacity_bytes,
                },
                used_bytes={
                    Tier.DRAM: state.dram.slots.used_bytes,
                    Tier.SSD: state.ssd.used_bytes,
                },
                read_bytes=dict(counters.read_bytes),
                written_bytes=dict(counters.written_bytes),
                evicted_blocks=dict(state.residency.evicted),
                lookups=counters.lookups,
                hit_blocks=counters.hit_blocks,
                missed_blocks=counters.missed_blocks,
                misses=dict(counters.misses),
                corrupt_blocks=state.residency.corrupt_blocks,
                device=state.ssd.device.description,
                tier_hit_blocks=dict(counters.tier_hit_blocks),
                scrubbed_bytes=counters.scrubbed_bytes,
                scrubbed_blocks=counters.scrubbed_blocks,
                scrub_bad_blocks=counters.scrub_bad_blocks,
                scrub_passes=counters.scrub_passes,
                lost_write_backs=counters.lost_write_backs,
                arena=state.dram.memory.description,
                mapped_leases=len(state.mappings),
                mapped_bytes=state.mappings.nbytes,
            )

    def health(self) -> StoreHealth:
        """See Store."""
        with self._state.lock:
            return self._state.health.snapshot(self._state.clock())

    def scrub_step(self, nbytes: int) -> ScrubStep:
        """See Store."""
        with self._scrubbing:
            return self._scrubber.step(nbytes)

    def close(self) -> None:
        """See Store. Idempotent. Fetched chunks keep their memory, not their meaning."""
        with self._closing:
            with self._state.lock:
                if self._state.closed:
                    return
                self._state.closed = True
                self._state.room.notify_all()
            if self._scrub is not None:
                self._scrub.stop(self._state.config.commit_wait_s)
            if self._ahead is not None:
                self._ahead.stop(self._state.config.commit_wait_s)
            if self._committer.close(self._state.config.commit_wait_s):
                self._let_go()
                return
            # The thread still writes: everything is given back when it has ended.
            _log.error("the SSD tier did not finish in time; the store is closed once it has")
            late = threading.Thread(target=self._close_late, name="dualpath-close", daemon=True)
            late.start()

    def _close_late(self) -> None:
        if self._committer.close(threading.TIMEOUT_MAX):
            self._let_go()

    def _let_go(self) -> None:
        """The rest of `close`; nobody writes any more."""
        with self._scrubbing:
            crc = leave_snapshot(self._directory, self._state, self._index, self._committer)
            self._index.close()
            self._state.ssd.close()
            if self._own_device is not None:
                self._own_device.close()
        try:
            if self._committer.settled:  # else headers have something to say
                self._directory.mark_clean(crc)
        except OSError as error:
            _log.warning("the shutdown could not be marked clean: %s", error)
        self._directory.close()
        if not self._state.dram.close():
            _log.warning("views of the arena are still held; it is unmapped with the last one")

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *_exc: object) -> None:
        """Close."""
        self.close()
