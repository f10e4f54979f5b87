"""Mixed load on a store in this process, until somebody kills it: what the soak's children run.

Saves that are durable and ones that are not, loads, lookups under leases, reservations that are
given up, invalidations, and scrubbing, by several threads on the chains of two tenants, at
capacity. Each thread writes chains of its own and reads all. A wrong byte that is served ends the
process with WRONG_BLOCK. Nothing is waited for but the store.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dualpath.bench.soak import world
from dualpath.bench.soak.place import DeviceKind, open_store
from dualpath.bench.soak.recording import Faults, recording
from dualpath.bench.soak.witness import Note, Witness
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.chain import parents_of
from dualpath.kvstore.store_api import InvalidationScope, NewBlock, ReserveStatus, SealStatus
from dualpath.transfer.errors import DualPathError, Overloaded, Unavailable

WORKERS = 3
WRONG_BLOCK = 3
"""Exit status: a wrong block was served."""
CANNOT_OPEN = 4
OWNER = "soak"


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """`operations` of each worker, then the process ends by itself, unclean. With `faults` its
    device fails, where it is recorded."""

    root: Path
    seed: int
    device: DeviceKind
    operations: int
    faults: Faults | None = None


class Worker:
    """One thread's load."""

    def __init__(self, store: BlockStore, witness: Witness, number: int, dice: random.Random):
        self._store = store
        self._witness = witness
        self._number = number
        self._dice = dice
        self._spaces = [store.open_namespace(tenant) for tenant in world.TENANTS]
        self._mine = [n for n in range(world.CHAINS) if n // 2 % WORKERS == number]

    def step(self) -> None:
        """One operation."""
        actions: list[tuple[float, Callable[[], None]]] = [
            (0.35, lambda: self._save(durable=True)),
            (0.60, lambda: self._save(durable=False)),
            (0.83, self._load),
            (0.92, self._lookup),
            (0.95, self._give_up),
            (0.98, self._invalidate),
            (1.01, self._scrub),
        ]
        chosen = self._dice.random()
        next(action for bound, action in actions if chosen < bound)()

    def _save(self, *, durable: bool) -> None:
        tenant = self._tenant()
        hashes = list(world.chain(tenant, self._dice.choice(self._mine)))
        hashes = hashes[: self._dice.randint(1, len(hashes))]
        data = [_content(tenant, h) for h in hashes]
        space = self._spaces[tenant]
        with self._witness.storing([space + h for h in hashes]):
            statuses = self._store.put(space, hashes, parents_of(hashes), data, durable=durable)
        if durable:
            good = (SealStatus.SEALED, ReserveStatus.EXISTS)
            self._witness.durable(
                space + h for h, status in zip(hashes, statuses, strict=True) if status in good
            )

    def _load(self) -> None:
        tenant = self._tenant()
        hashes = world.chain(tenant, self._dice.randrange(world.CHAINS))
        found = self._store.get(self._spaces[tenant], hashes)
        for block_hash, block in zip(hashes, found, strict=False):
            if block != _content(tenant, block_hash):
                print(f"wrong block {block_hash.hex()} was served", file=sys.stderr, flush=True)
                os._exit(WRONG_BLOCK)

    def _lookup(self) -> None:
        tenant = self._tenant()
        hashes = world.chain(tenant, self._dice.randrange(world.CHAINS))
        hit = self._store.lookup(self._spaces[tenant], hashes, owner=OWNER, lease_s=0.05)
        if hit.lease_id and self._dice.random() < 0.5:
            self._store.release(hit.lease_id, owner=OWNER)

    def _give_up(self) -> None:
        tenant = self._tenant()
        hashes = world.chain(tenant, self._dice.choice(self._mine))
        self._store.reserve(
            self._spaces[tenant], [NewBlock(hashes[0], b"")], owner=OWNER, ttl_s=0.05
        )

    def _invalidate(self) -> None:
        """The end of a chain and all that shares it, or now and then all of a tenant."""
        tenant = self._tenant()
        space = self._spaces[tenant]
        scope, chains = InvalidationScope(space), range(world.CHAINS)
        first, below = 0, b""
        if self._dice.random() < 0.9:
            number = self._dice.choice(self._mine)
            first = self._dice.randrange(world.CHAIN_BLOCKS)
            below = world.chain(tenant, number)[first]
            scope = InvalidationScope(space, below)
            chains = range(number // 2 * 2, number // 2 * 2 + 2)
        hashes = {
            block_hash
            for each in chains
            for block_hash in world.chain(tenant, each)[first:]
            if below in (b"", world.chain(tenant, each)[first])
        }
        with self._witness.invalidating([space + h for h in hashes]):
            self._store.invalidate(scope)

    def _scrub(self) -> None:
        self._store.scrub_step(256 << 10)

    def _tenant(self) -> int:
        return int(self._dice.random() < 0.3)


_generating = threading.Lock()


def _content(tenant: int, block_hash: bytes) -> bytes:
    with _generating:
        return world.content(tenant, block_hash)


def run_load(plan: LoadPlan, note: Note, ready: Callable[[], None]) -> None:
    """Open the store, call `ready`, load it. Does not close: the process is to be killed."""
    if plan.faults is not None:
        recording().fail(plan.faults)
    try:
        store = open_store(plan.root, plan.device)
    except (DualPathError, OSError) as error:
        print(f"{plan.root} does not open: {error}", file=sys.stderr, flush=True)
        os._exit(CANNOT_OPEN)
    witness = Witness(store, note)
    ready()
    dice = random.Random(plan.seed)
    seeds = [dice.getrandbits(32) for _ in range(WORKERS)]

    def work(number: int) -> None:
        worker = Worker(store, witness, number, random.Random(seeds[number]))
        for _ in range(plan.operations):
            try:
                worker.step()
            except (Unavailable, Overloaded) as error:
                print(f"refused: {error}", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(0)
