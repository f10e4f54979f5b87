"""Random histories of the store against a model, with its books checked after every step."""

from __future__ import annotations

import hashlib
import random
import tempfile
from pathlib import Path

import numpy as np
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.block_table import GONE, NO_ROW, RowState
from dualpath.kvstore.device import MemoryDevice
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import (
    MissReason,
    NewBlock,
    ReserveStatus,
    SealRequest,
    SealStatus,
    Tier,
)
from dualpath.transfer.errors import LeaseExpired
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

NAMESPACES = [
    Namespace(model="m", layout=KVLayout(layers=2, block_tokens=1, layer_bytes=150_000, dtype="x")),
    Namespace(model="m", layout=KVLayout(layers=1, block_tokens=1, layer_bytes=5_000, dtype="x")),
]
CONFIG = StoreConfig(
    disk_bytes=3 << 20,
    dram_bytes=2 << 20,
    segment_bytes=1 << 20,
    read_buffers_bytes=1 << 20,
    reserve_wait_s=0.05,
)
OWNERS = st.sampled_from(["a", "b"])
PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple)
PICKS = st.integers(0, 1 << 32)
"""Of what is there: drawn alike whatever that is, as the committer's pace may change it."""
SPACES = st.integers(0, len(NAMESPACES) - 1)


def key_of(path: tuple[int, ...]) -> bytes:
    return hashlib.sha256(bytes(path)).digest()


def chain_of(path: tuple[int, ...]) -> list[bytes]:
    return [key_of(path[: i + 1]) for i in range(len(path))]


def bytes_of(space: int, block_hash: bytes) -> bytes:
    seed = hashlib.sha256(bytes([space]) + block_hash).digest()
    return random.Random(seed).randbytes(NAMESPACES[space].layout.block_bytes)


class StoreMachine(RuleBasedStateMachine):
    """Model: `sealed` is what was ever sealed; `held` reservations; `leases` with their chain."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.folder = tempfile.TemporaryDirectory()
        self.device = MemoryDevice()
        self.store = self.open()
        self.sealed: set[tuple[int, bytes]] = set()
        self.held: dict[int, tuple[int, bytes, str, float, int]] = {}
        self.leases: dict[int, tuple[int, list[bytes], str, float]] = {}

    def open(self) -> BlockStore:
        store = BlockStore.open(
            Path(self.folder.name), CONFIG, device=self.device, clock=lambda: self.now
        )
        for namespace in NAMESPACES:
            store.open_namespace(namespace)
        return store

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def present(self) -> set[tuple[int, bytes]]:
        table, catalog = self.store._state.table, self.store._state.catalog
        spaces = [namespace.id for namespace in NAMESPACES]
        found = set()
        for row in np.flatnonzero(table.state == RowState.PRESENT).tolist():
            entry, block_hash = catalog.entry_of(row), table.hash_of(row)
            assert catalog.row_of(entry, block_hash) == row
            found.add((spaces.index(entry.id), block_hash))
        assert len(table.index) == len(found)
        return found

    @initialize(path=PATHS)
    def start_with_a_chain(self, path: tuple[int, ...]) -> None:
        self.put(0, path, "a", True)

    @rule(space=SPACES, path=PATHS, owner=OWNERS, durable=st.booleans())
    def put(self, space: int, path: tuple[int, ...], owner: str, durable: bool) -> None:
        """Reserve a chain; fill and seal at once what was granted."""
        before = set(self.held)
        self.reserve(space, path, owner)
        new = [i for i in self.held if i not in before]
        for reservation_id in new:
            self.fill(reservation_id)
        statuses = self.store.seal([SealRequest(i) for i in new], owner=owner, durable=durable)
        for reservation_id, status in zip(new, statuses, strict=True):
            _, block_hash, _, _, _ = self.held[reservation_id]
            if status is SealStatus.SEALED:
                self.sealed.add((space, block_hash))
                del self.held[reservation_id]
            else:
                assert status is SealStatus.EXPIRED

    @rule(space=SPACES, path=PATHS, owner=OWNERS)
    def reserve(self, space: int, path: tuple[int, ...], owner: str) -> None:
        hashes = chain_of(path)
        parents = [b"", *hashes[:-1]]
        blocks = [NewBlock(h, p) for h, p in zip(hashes, parents, strict=True)]
        outcome = self.store.reserve(NAMESPACES[space].id, blocks, owner=owner, ttl_s=30)
        open_before = True
        for block, result in zip(blocks, outcome, strict=True):
            if result.status is ReserveStatus.RESERVED:
                assert open_before, "a block below a refused parent was reserved"
                assert result.extent is not None
                assert result.extent.nbytes == NAMESPACES[space].layout.block_bytes
                self.held[result.reservation_id] = (
                    space,
                    block.hash,
                    owner,
                    self.now + 30,
                    result.extent.start,
                )
            elif result.status is ReserveStatus.EXISTS:
                assert (space, block.hash) in self.sealed
            elif result.status in (ReserveStatus.NO_PARENT, ReserveStatus.FULL):
                open_before = False

    def fill(self, reservation_id: int) -> None:
        space, block_hash, _, _, start = self.held[reservation_id]
        data = bytes_of(space, block_hash)
        self.store.arena.view[start : start + len(data)] = data

    @rule(pick=PICKS, durable=st.booleans(), lie=st.booleans())
    def seal_one(self, pick: int, durable: bool, lie: bool) -> None:
        if not self.held:
            return
        reservation_id = sorted(self.held)[pick % len(self.held)]
        space, block_hash, owner, expires, _ = self.held[reservation_id]
        if expires > self.now:
            self.fill(reservation_id)
        chunks = NAMESPACES[space].layout.chunk_count
        request = SealRequest(reservation_id, (1,) * chunks if lie else ())
        (status,) = self.store.seal([request], owner=owner, durable=durable)
        if expires <= self.now:
            assert status is SealStatus.EXPIRED
        if status is SealStatus.SEALED:
            assert not lie
            self.sealed.add((space, block_hash))
        if status is not SealStatus.EXPIRED or expires <= self.now:
            del self.held[reservation_id]

    @rule(pick=PICKS)
    def abandon(self, pick: int) -> None:
        if not self.held:
            return
        reservation_id = sorted(self.held)[pick % len(self.held)]
        owner = self.held.pop(reservation_id)[2]
        self.store.abandon([reservation_id], owner=owner)

    @rule(space=SPACES, path=PATHS, owner=OWNERS, lease=st.booleans())
    def lookup(self, space: int, path: tuple[int, ...], owner: str, lease: bool) -> None:
        hashes = chain_of(path)
        hit = self.store.lookup(
            NAMESPACES[space].id, hashes, owner=owner, lease_s=20 if lease else 0
        )
        assert {(space, h) for h in hashes[: hit.blocks]} <= self.sealed
        assert (hit.miss is MissReason.NONE) == (hit.blocks == len(hashes))
        assert hit.miss is not MissReason.CORRUPT
        if self.store.stats().evicted_blocks[Tier.SSD] == 0 and self.never_reopened_full():
            expected = 0
            while expected < len(hashes) and (space, hashes[expected]) in self.sealed:
                expected += 1
            assert hit.blocks == expected
        if hit.lease_id:
            self.leases[hit.lease_id] = (space, hashes[: hit.blocks], owner, self.now + 20)

    def never_reopened_full(self) -> bool:
        return self.present() >= self.sealed

    @rule(pick=PICKS)
    def read(self, pick: int) -> None:
        if not self.leases:
            return
        lease_id = sorted(self.leases)[pick % len(self.leases)]
        space, hashes, _, expires = self.leases[lease_id]
        block = pick % len(hashes)
        layout = NAMESPACES[space].layout
        chunk = pick % layout.chunk_count
        try:
            with self.store.fetch(lease_id, block, chunk) as fetched:
                found = bytes(fetched.region.view[fetched.slices.start : fetched.slices.end])
        except LeaseExpired:
            assert expires <= self.now
            del self.leases[lease_id]
            return
        assert expires > self.now
        offset, nbytes = layout.chunk_extent(chunk)
        assert found == bytes_of(space, hashes[block])[offset : offset + nbytes]
        assert self.store.report_corrupt(lease_id, block, chunk) is False

    @rule(pick=PICKS, renew=st.booleans())
    def renew_or_release(self, pick: int, renew: bool) -> None:
        if not self.leases:
            return
        lease_id = sorted(self.leases)[pick % len(self.leases)]
        space, hashes, owner, expires = self.leases[lease_id]
        if not renew:
            self.store.release(lease_id, owner=owner)
            del self.leases[lease_id]
        elif expires > self.now:
            self.store.renew(lease_id, owner=owner, lease_s=40)
            self.leases[lease_id] = (space, hashes, owner, self.now + 40)

    @rule(seconds=st.sampled_from([1.0, 15.0, 31.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds

    @rule(owner=OWNERS)
    def forget(self, owner: str) -> None:
        self.store.forget_owner(owner)
        self.held = {i: held for i, held in self.held.items() if held[2] != owner}
        self.leases = {i: lease for i, lease in self.leases.items() if lease[2] != owner}

    @rule()
    def reopen(self) -> None:
        before = self.present()
        self.store.close()
        self.store = self.open()
        assert self.present() == before
        self.held.clear()
        self.leases.clear()

    @invariant()
    def leased_blocks_are_present(self) -> None:
        present = self.present()
        for space, hashes, _, expires in self.leases.values():
            if expires > self.now:
                assert {(space, h) for h in hashes} <= present

    @invariant()
    def the_books_balance(self) -> None:
        state = self.store._state
        with state.lock:
            table = state.table
            live = np.flatnonzero(table.state != RowState.FREE)
            sizes = table.slot_bytes
            on_ssd = live[table.segment[live] >= 0]
            in_dram = live[table.dram[live] >= 0]
            assert state.ssd.used_bytes == sizes[on_ssd].sum()
            assert state.dram.slots.used_bytes == sizes[in_dram].sum()
            assert state.residency.dirty_bytes == sizes[live[table.dirty[live]]].sum()
            assert state.dram.buffers.used_bytes == 0
            places = list(zip(table.segment[on_ssd], table.slot[on_ssd], strict=True))
            assert len(set(places)) == len(places)
            present = live[table.state[live] == RowState.PRESENT]
            assert state.catalog.blocks == len(present)
            parents = table.parent[present]
            assert (parents != GONE).all()
            parents = parents[parents != NO_ROW]
            assert (table.state[parents] == RowState.PRESENT).all()
            leases = sum(len(lease.rows) for lease in state.leases._leases.values())
            assert table.leases[live].sum() == leases
            assert len(live) <= len(present) + len(state.reservations) + len(state.expired) + len(
                live[(table.leases[live] > 0) | (table.pins[live] > 0)]
            ) + int((table.state[live] == RowState.PENDING).sum())


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
