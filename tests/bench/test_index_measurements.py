"""Look-ups and restarts are measured on an index that the store itself takes for its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from dualpath.bench.store import lookup, restart
from dualpath.bench.store.index_fixture import CHAIN_BLOCKS, make_index
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.packed_hashes import PackedHashes


def test_a_made_index_opens_and_every_block_is_intact(tmp_path: Path) -> None:
    fixture = make_index(tmp_path, 3 * CHAIN_BLOCKS)
    for from_snapshot in (False, True):
        with BlockStore.open(tmp_path, fixture.config) as store:
            assert store.recovered.from_snapshot is from_snapshot
            assert (store.recovered.blocks, store.recovered.dropped) == (3 * CHAIN_BLOCKS, 0)
            space = fixture.namespace.id
            for number in range(fixture.chains):
                hit = store.lookup_packed(space, fixture.chain(number), 32, owner="o", lease_s=0)
                assert hit.blocks == CHAIN_BLOCKS
            first = list(PackedHashes(fixture.chain(1), 32))[:3]
            assert store.get(space, first) == [bytes(fixture.namespace.layout.block_bytes)] * 3


def test_a_trial_tells_all_figures_of_a_look_up(tmp_path: Path) -> None:
    figures = lookup.measure(tmp_path, 1, lambda text: None)
    assert set(figures) >= {
        "in_process_keys_per_s",
        "grpc_added_ms",
        "socket_added_ms",
        "p99_over_p50",
    }


@pytest.mark.slow
def test_a_trial_tells_all_figures_of_a_restart(tmp_path: Path) -> None:
    figures = restart.measure(tmp_path, 1, lambda text: None)
    assert set(figures) >= {"clean_s", "crash_s", "memory_bytes_a_block"}
