"""Local DRAM hits, in the daemon's process and over its local socket: copied, and not copied.

A copy is compared with numpy copies of the very same blocks: from the same places of the arena, on
the same pages, to the same places of the same memory. Ours includes the look-up, the lease, the
mapping and, unless it says otherwise, the checksums of every chunk. What is not copied is mapped in
batches and let go of; its cost is one a block, not one a byte.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from dualpath.bench import serving
from dualpath.bench.rounds import Sample, Series, interleave
from dualpath.bench.stopwatch import Stopwatch
from dualpath.bench.store.keyed_blocks import KeyedBlocks
from dualpath.bench.store.pages import PageKind, kind_of, memory_of
from dualpath.bench.store.section import Figures, is_trial
from dualpath.client.local_store import LocalStore
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.mapped_read import ReadBlocks
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.store_api import MappedPrefix
from dualpath.transfer.errors import Corrupt
from numpy.typing import NDArray

BLOCK_BYTES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
SET_BYTES = 128 << 20
"""Of each size: several times the processor's caches."""
TRIAL_SET_BYTES = 8 << 20
ZERO_COPY_BLOCK_BYTES = 64 << 10
BATCH_BLOCKS = 1024
_BATCHES = 200
_PASSES = 4
"""Over the set in one sample, which else took no longer than the machine's own hiccups."""
_OWNER = "bench"
_LEASE_S = 60.0
_SPARE_BYTES = 64 << 20

Read = Callable[[memoryview, bool], ReadBlocks]


def measure_copy(scratch: Path, rounds: int, progress: Callable[[str], None]) -> Figures:
    """Figures of the section `dram_copy`."""
    set_bytes = TRIAL_SET_BYTES if is_trial(rounds) else SET_BYTES
    sets = [KeyedBlocks(size, max(2, set_bytes // size)) for size in BLOCK_BYTES]
    figures: Figures = {}
    ratios: list[float] = []
    total = sum(blocks.count * blocks.layout.slot_bytes for blocks in sets)
    config = _config(total)
    with contextlib.closing(memory_of(PageKind.TRANSPARENT_HUGE, set_bytes)) as memory:
        target = memoryview(memory)[:set_bytes]
        try:
            with BlockStore.open(scratch / "data", config) as store:
                for blocks in sets:
                    blocks.put(store)
                figures["embedded_pages"] = kind_of(store.arena.view).value
                for blocks in sets:
                    ratios.append(_copy_embedded(store, blocks, target, rounds, progress, figures))
            with _daemon(scratch, config) as client:
                assert client.arena is not None
                for blocks in sets:
                    ratios.append(
                        _copy_over_socket(client, blocks, target, rounds, progress, figures)
                    )
        finally:
            target.release()
    return {"ratio_to_memcpy": min(ratios), **figures}


def measure_zero_copy(scratch: Path, rounds: int, progress: Callable[[str], None]) -> Figures:
    """Figures of the section `dram_zero_copy`."""
    trial = is_trial(rounds)
    blocks = KeyedBlocks(ZERO_COPY_BLOCK_BYTES, BATCH_BLOCKS)
    config = _config(2 * blocks.total_bytes)
    packed = PackedHashes.of(blocks.hashes)
    batches = 10 if trial else _BATCHES
    with BlockStore.open(scratch / "data", config) as store:
        blocks.put(store)
        space = blocks.namespace.id
        with _mapped(store, space, packed) as mapped:
            _check(blocks, store.arena.view, mapped.offsets)
        embedded = interleave(
            {"embedded": partial(_map_embedded, store, space, packed, batches)}, rounds, progress
        )["embedded"]
    with _daemon(scratch, config) as client:
        client.read_into(space, packed, bytearray(blocks.total_bytes))  # into DRAM
        with client.map(space, packed) as held:
            _check(blocks, held.arena.view, held.offsets)
        series = interleave(
            {
                "socket": partial(_map_over_socket, client, space, packed, batches, views=False),
                "socket, views": partial(
                    _map_over_socket, client, space, packed, batches, views=True
                ),
            },
            rounds,
            progress,
        )
    rates = {
        "embedded_blocks_per_s": embedded.median("blocks_per_s"),
        "socket_blocks_per_s": series["socket"].median("blocks_per_s"),
        "socket_views_blocks_per_s": series["socket, views"].median("blocks_per_s"),
    }
    return {"blocks_per_s": min(rates.values()), "batch_blocks": BATCH_BLOCKS, **rates}


def _config(nbytes: int) -> StoreConfig:
    return StoreConfig(
        disk_bytes=2 * nbytes + 8 * _SPARE_BYTES,  # each size has segments of its own
        dram_bytes=nbytes + nbytes // 4 + _SPARE_BYTES,
        mapped_owner_bytes_max=nbytes + _SPARE_BYTES,
    )


@contextlib.contextmanager
def _daemon(scratch: Path, config: StoreConfig) -> Iterator[LocalStore]:
    """A daemon on the data that was put into the same folder, and a client of its local socket."""
    with (
        serving.daemon(
            scratch,
            disk_bytes=config.disk_bytes,
            dram_bytes=config.dram_bytes,
            mapped_client_bytes_max=config.mapped_owner_bytes_max,
        ) as daemon,
        LocalStore.connect(daemon.address("local")) as client,
    ):
        yield client


@dataclass(frozen=True, slots=True)
class _Copies:
    """How one size is copied: ours, and the limit's source and the places of blocks in it."""

    name: str
    blocks: KeyedBlocks
    target: memoryview
    read: Read
    arena: memoryview
    offsets: NDArray[np.int64]
    passes: int

    def ours(self, *, verify: bool) -> Sample:
        with Stopwatch() as watch:
            for _ in range(self.passes):
                read = self.read(self.target, verify)
        if read.blocks != self.blocks.count or read.fetched:
            raise Corrupt(f"{read} of {self.blocks.count} blocks in DRAM")
        return watch.sample(self.passes * self.blocks.total_bytes)

    def memcpy(self) -> Sample:
        source, nbytes = np.frombuffer(self.arena, np.uint8), self.blocks.block_bytes
        target = np.frombuffer(self.target, np.uint8)
        starts = self.offsets.tolist()
        with Stopwatch() as watch:
            for _ in range(self.passes):
                for index, start in enumerate(starts):
                    at = index * nbytes
                    np.copyto(target[at : at + nbytes], source[start : start + nbytes])
        return watch.sample(self.passes * self.blocks.total_bytes)

    def measure(self, rounds: int, progress: Callable[[str], None], figures: Figures) -> float:
        """Add the figures of this size; the verified copy's ratio to memcpy."""
        self.ours(verify=True)
        for index in range(self.blocks.count):
            self.blocks.check(index, self.target, index * self.blocks.block_bytes)
        series = interleave(
            {
                f"{self.name}, verified": partial(self.ours, verify=True),
                f"{self.name}, not verified": partial(self.ours, verify=False),
                f"{self.name}, memcpy": self.memcpy,
            },
            rounds,
            progress,
        )
        verified, plain, limit = series.values()
        figures[self.name.replace(" ", "_")] = _shown(verified, plain, limit)
        return verified.ratio_to(limit)


def _shown(verified: Series, plain: Series, limit: Series) -> Figures:
    return {
        "verified_gibs": verified.gibs,
        "unverified_gibs": plain.gibs,
        "memcpy_gibs": limit.gibs,
        "ratio_to_memcpy": verified.ratio_to(limit),
        "unverified_ratio_to_memcpy": plain.ratio_to(limit),
        "cpu_s_per_gib": verified.cpu_s_per_gib,
        "memcpy_cpu_s_per_gib": limit.cpu_s_per_gib,
        "spread": verified.spread,
    }


def _size(blocks: KeyedBlocks) -> str:
    kib = blocks.block_bytes >> 10
    return f"{kib >> 10}m" if kib >= 1024 else f"{kib}k"


def _copy_embedded(
    store: BlockStore,
    blocks: KeyedBlocks,
    target: memoryview,
    rounds: int,
    progress: Callable[[str], None],
    figures: Figures,
) -> float:
    space, packed = blocks.namespace.id, PackedHashes.of(blocks.hashes)

    def read(into: memoryview, verify: bool) -> ReadBlocks:
        return store.get_into(space, blocks.hashes, into, verify=verify)

    with _mapped(store, space, packed) as mapped:
        name = f"embedded {_size(blocks)}"
        passes = 1 if is_trial(rounds) else _PASSES
        copies = _Copies(name, blocks, target, read, store.arena.view, mapped.offsets, passes)
        return copies.measure(rounds, progress, figures)


def _copy_over_socket(
    client: LocalStore,
    blocks: KeyedBlocks,
    target: memoryview,
    rounds: int,
    progress: Callable[[str], None],
    figures: Figures,
) -> float:
    space, packed = blocks.namespace.id, PackedHashes.of(blocks.hashes)

    def read(into: memoryview, verify: bool) -> ReadBlocks:
        return client.read_into(space, packed, into, verify=verify)

    read(target, True)  # from the SSD into DRAM
    with client.map(space, packed, lease_s=_LEASE_S) as mapped:
        name = f"socket {_size(blocks)}"
        passes = 1 if is_trial(rounds) else _PASSES
        copies = _Copies(name, blocks, target, read, mapped.arena.view, mapped.offsets, passes)
        return copies.measure(rounds, progress, figures)


@contextlib.contextmanager
def _mapped(store: BlockStore, space: bytes, packed: PackedHashes) -> Iterator[MappedPrefix]:
    mapped = store.map_packed(space, packed.data, packed.hash_bytes, owner=_OWNER, lease_s=_LEASE_S)
    try:
        yield mapped
    finally:
        store.release(mapped.hit.lease_id, owner=_OWNER)


def _check(blocks: KeyedBlocks, arena: memoryview, offsets: NDArray[np.int64]) -> None:
    if len(offsets) != blocks.count or (offsets < 0).any():
        raise Corrupt("not every block lies in DRAM")
    for index, offset in enumerate(offsets.tolist()):
        blocks.check(index, arena, offset)


def _map_embedded(store: BlockStore, space: bytes, packed: PackedHashes, batches: int) -> Sample:
    found = 0
    with Stopwatch() as watch:
        for _ in range(batches):
            with _mapped(store, space, packed) as mapped:
                found += int(np.count_nonzero(mapped.offsets >= 0))
    return _blocks_sample(watch, found, batches)


def _map_over_socket(
    client: LocalStore, space: bytes, packed: PackedHashes, batches: int, *, views: bool
) -> Sample:
    found = 0
    with Stopwatch() as watch:
        for _ in range(batches):
            with client.map(space, packed, checksums=False) as mapped:
                found += int(np.count_nonzero(mapped.offsets >= 0))
                if views:
                    held = [mapped.view(index) for index in range(len(mapped))]
                    del held
                if not mapped.stable():
                    raise Corrupt("the lease ended while its blocks were used")
    return _blocks_sample(watch, found, batches)


def _blocks_sample(watch: Stopwatch, found: int, batches: int) -> Sample:
    if found != batches * BATCH_BLOCKS:
        raise Corrupt(f"{found} of {batches * BATCH_BLOCKS} blocks lay in DRAM")
    nbytes = found * ZERO_COPY_BLOCK_BYTES
    return watch.sample(nbytes, blocks_per_s=found / watch.seconds)
