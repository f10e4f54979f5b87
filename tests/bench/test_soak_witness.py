"""What the soak's witness notes, and what follows from that for a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
from dualpath.bench.soak import world
from dualpath.bench.soak.witness import Claims, Witness
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.chain import parents_of
from dualpath.kvstore.store_api import InvalidationScope


@pytest.mark.parametrize("durable", [True, False])
def test_what_was_invalidated_may_be_back_once_it_is_being_stored_again(
    tmp_path: Path, durable: bool
) -> None:
    notes: list[bytes] = []
    space, hashes = world.TENANTS[0].id, world.chain(0, 0)
    data = [world.content(0, block_hash) for block_hash in hashes]
    keys = [space + block_hash for block_hash in hashes]
    with BlockStore.open(tmp_path / "data", world.STORE) as store:
        witness = Witness(store, notes.append)
        store.open_namespace(world.TENANTS[0])
        store.put(space, hashes, parents_of(hashes), data)
        with witness.invalidating(keys):
            store.invalidate(InvalidationScope(space))
        claims = Claims()
        claims.follow(notes)
        assert claims.invalidated == set(keys)
        notes.clear()
        store.put(space, hashes, parents_of(hashes), data, durable=durable)
    # A kill may come after any note, when the medium has what the committer was given.
    handed = notes.index(b"~" + keys[-1])
    if durable:
        assert handed < notes.index(b"+" + keys[0]), "it is seen only when it is durable"
    claims.follow(notes[: handed + 1])
    assert not claims.invalidated
    claims.follow(notes[handed + 1 :])
    assert claims.durable == set(keys)
