"""`get_into` of blocks that lie on the SSD: all bytes right, a wrong one ends the prefix, nothing
stays held."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.io_mode import IoMode
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.ring_device import RINGS_MAX
from dualpath.kvstore.store_api import MissReason, SealStatus, Tier
from dualpath.transfer.errors import InvalidRequest, Overloaded

Content = Callable[[bytes, int], bytes]
CONFIG = StoreConfig(
    disk_bytes=64 << 20,
    dram_bytes=8 << 20,
    segment_bytes=16 << 20,
    read_buffers_bytes=4 << 20,
    promote=False,
)
LAYOUTS = {
    "many-small": KVLayout(4, 16, 1 << 12, "bfloat16"),
    "short-last-chunk": KVLayout(3, 16, 100_000, "bfloat16"),
    "several-chunks": KVLayout(4, 16, 1 << 18, "bfloat16"),
}


class Cold:
    """A store that was opened again after blocks were put: none of them is in DRAM."""

    def __init__(
        self, place: Path, layout: KVLayout, content: Content, config: StoreConfig
    ) -> None:
        space = Namespace("cold", layout)
        self.nbytes = layout.block_bytes
        self.hashes = chain_hashes(range(16 * (12 << 20) // max(self.nbytes, 1 << 16)), 16)
        self.data = [content(h, self.nbytes) for h in self.hashes]
        self._place = place
        with BlockStore.open(place, config) as store:
            sealed = store.put(
                store.open_namespace(space), self.hashes, parents_of(self.hashes), self.data
            )
            assert set(sealed) == {SealStatus.SEALED}
        self._config, self._space = config, space

    def open(self) -> tuple[BlockStore, bytes]:
        store = BlockStore.open(self._place, self._config)
        return store, store.open_namespace(self._space)

    def flip(self, block: int, inside: int) -> None:
        """A bit of a block, on the medium."""
        for path in sorted((self._place / "segments").iterdir()):
            at = path.read_bytes().find(self.data[block])
            if at >= 0:
                with path.open("r+b") as file:
                    file.seek(at + inside)
                    file.write(bytes([self.data[block][inside] ^ 0x40]))
                return
        raise AssertionError(f"block {block} is in no segment")


def nothing_held(store: BlockStore) -> bool:
    state = store._state
    stats = store.stats()
    return not (
        stats.leases
        or stats.mapped_leases
        or state.dram.buffers.used_bytes
        or state.table.pins.any()
    )


@pytest.mark.parametrize("io", [IoMode.AUTO.value, IoMode.PSYNC.value])
@pytest.mark.parametrize("promote", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_comes_whatever_the_buffers_and_wherever_it_goes(
    tmp_path: Path, content: Content, name: str, promote: bool, io: str
) -> None:
    cold = Cold(tmp_path, LAYOUTS[name], content, replace(CONFIG, promote=promote, io=io))
    store, space = cold.open()
    with store:
        count = len(cold.hashes)
        at = np.random.default_rng(5).permutation(count).astype(np.int64) * (cold.nbytes + 1)
        for places in (None, at):
            target = bytearray(count * (cold.nbytes + 1))
            read = store.get_into(space, cold.hashes, target, at=places)
            assert (read.blocks, read.miss) == (count, MissReason.NONE)
            starts = places if places is not None else np.arange(count) * cold.nbytes
            for start, block in zip(starts.tolist(), cold.data, strict=True):
                assert target[start : start + cold.nbytes] == block
            assert nothing_held(store)
        assert store.stats().read_bytes[Tier.SSD] > 0


@pytest.mark.parametrize("buffers", [4 << 20, 32 << 20])
@pytest.mark.parametrize("wrong", [(0,), (8, 11), (1, 3, 9)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_byte_that_is_wrong_on_the_medium_ends_the_prefix_before_its_block(
    tmp_path: Path, content: Content, name: str, wrong: tuple[int, ...], buffers: int
) -> None:
    config = replace(CONFIG, read_buffers_bytes=buffers)
    cold = Cold(tmp_path, LAYOUTS[name], content, config)
    for twelfth in wrong:
        cold.flip(len(cold.hashes) * twelfth // 12, cold.nbytes - 1)
    bad = len(cold.hashes) * wrong[0] // 12
    store, space = cold.open()
    with store:
        target = bytearray(len(cold.hashes) * cold.nbytes)
        read = store.get_into(space, cold.hashes, target)
        assert (read.blocks, read.miss) == (bad, MissReason.CORRUPT)
        assert target[: bad * cold.nbytes] == b"".join(cold.data[:bad])
        assert nothing_held(store)
        again = store.get_into(space, cold.hashes, target)
        assert again.blocks == bad


def test_many_readers_at_once_share_rings_and_buffers(tmp_path: Path, content: Content) -> None:
    config = replace(CONFIG, read_buffers_bytes=16 << 20, read_buffer_wait_s=30.0)
    cold = Cold(tmp_path, LAYOUTS["several-chunks"], content, config)
    store, space = cold.open()
    expected = b"".join(cold.data)

    def read(_: int) -> bool:
        target = bytearray(len(expected))
        return store.get_into(space, cold.hashes, target).blocks == len(cold.hashes) and (
            target == expected
        )

    with store, ThreadPoolExecutor(2 * RINGS_MAX) as threads:
        assert all(threads.map(read, range(3 * RINGS_MAX)))
        assert nothing_held(store)


def test_who_is_not_patient_is_told_at_once_that_there_is_no_buffer(
    tmp_path: Path, content: Content
) -> None:
    config = replace(CONFIG, read_buffer_wait_s=1e6)
    cold = Cold(tmp_path, LAYOUTS["several-chunks"], content, config)
    store, space = cold.open()
    with store:
        hit = store.lookup(space, cold.hashes, owner="o", lease_s=60)
        blocks = np.repeat(np.arange(hit.blocks), 4)
        chunks = np.tile(np.arange(4), hit.blocks)
        with store.fetch_batch(hit.lease_id, blocks, chunks) as batch:
            assert len(batch) < len(blocks)
            with pytest.raises(Overloaded, match="no read buffer"):
                store.fetch_batch(hit.lease_id, blocks, chunks, patient=False)
        store.release(hit.lease_id, owner="o")
        assert nothing_held(store)


def test_a_target_that_is_too_small_leaves_nothing_held(tmp_path: Path, content: Content) -> None:
    cold = Cold(tmp_path, LAYOUTS["several-chunks"], content, CONFIG)
    store, space = cold.open()
    with store:
        with pytest.raises(InvalidRequest, match="leave"):
            store.get_into(space, cold.hashes, bytearray(len(cold.hashes) * cold.nbytes - 1))
        assert nothing_held(store)
        target = bytearray(len(cold.hashes) * cold.nbytes)
        assert store.get_into(space, cold.hashes, target).blocks == len(cold.hashes)
        assert target == b"".join(cold.data)
