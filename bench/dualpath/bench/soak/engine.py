"""Engines of two tenants that use a daemon, run in a child beside it.

Each tenant has a client with an agent of its own and threads that save (durable and not), load and
look up. Every loaded byte is compared with what its key says; one wrong byte ends the process with
WRONG_BLOCK. Losing the daemon is part of the game: they go on when it is back. Keys that were
acknowledged as durable, and the times that calls took, go to a file as they come.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from dualpath.agent.config import AgentConfig
from dualpath.agent.places import Places
from dualpath.bench.soak import world
from dualpath.bench.soak.children import Tell
from dualpath.bench.soak.workload import WRONG_BLOCK
from dualpath.client.blocking import BlockingKVClient
from dualpath.kvstore.chain import parents_of
from dualpath.kvstore.store_api import ReserveStatus, SealStatus
from dualpath.transfer.errors import DualPathError

THREADS = 2
"""Of each tenant."""
_DEADLINE_S = 10.0
_AWAY_S = 0.02
"""Pause after a call that found no daemon."""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """`diary`: a file of JSON lines; `pace_s`: pause after each call."""

    daemon: str
    diary: Path
    seed: int
    pace_s: float = 0.0


def run_engines(tell: Tell, plan: EnginePlan) -> None:
    """Go on until killed. Tells once, when all clients are there."""
    fd = os.open(plan.diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    threads = []
    for tenant, namespace in enumerate(world.TENANTS):
        client = BlockingKVClient.embedded(
            AgentConfig(
                name=f"soak-{namespace.tenant}", daemons=(plan.daemon,), reconnect_s_max=0.05
            )
        )
        for number in range(THREADS):
            engine = _Engine(client, tenant, number, fd, plan)
            threads.append(threading.Thread(target=engine.run, daemon=True))
    for thread in threads:
        thread.start()
    tell(None)
    for thread in threads:
        thread.join()


class _Engine:
    """One thread of a tenant, with memory for one chain."""

    def __init__(
        self, client: BlockingKVClient, tenant: int, number: int, diary: int, plan: EnginePlan
    ) -> None:
        self._client = client
        self._tenant = tenant
        self._layout = world.TENANTS[tenant].layout
        self._memory = client.allocate(self._layout.block_bytes * world.CHAIN_BLOCKS)
        self._diary = diary
        self._pace_s = plan.pace_s
        self._dice = random.Random(f"{plan.seed}/{tenant}/{number}")
        self._mine = [n for n in range(world.CHAINS) if n // 2 % THREADS == number]

    def run(self) -> None:
        """Call after call."""
        while True:
            chosen = self._dice.random()
            started = time.monotonic()
            try:
                if chosen < 0.25:
                    kind, fine = "save_durable", self._save(durable=True)
                elif chosen < 0.4:
                    kind, fine = "save", self._save(durable=False)
                elif chosen < 0.9:
                    kind, fine = "load", self._load()
                else:
                    kind, fine = "lookup", self._lookup()
            except DualPathError:
                fine = False
            if fine:
                self._say({"call": kind, "ms": round(1000 * (time.monotonic() - started), 3)})
            time.sleep(self._pace_s if fine else _AWAY_S)

    def _save(self, *, durable: bool) -> bool:
        space = self._client.open_namespace(world.TENANTS[self._tenant])
        hashes = list(world.chain(self._tenant, self._dice.choice(self._mine)))
        hashes = hashes[: self._dice.randint(1, len(hashes))]
        step = self._layout.block_bytes
        for index, block_hash in enumerate(hashes):
            self._memory.view[index * step : (index + 1) * step] = self._content(block_hash)
        result = self._client.save(
            space,
            hashes,
            parents_of(hashes),
            self._memory,
            Places.contiguous(self._layout, len(hashes)),
            durable=durable,
            deadline_s=_DEADLINE_S,
        )
        if durable:
            # What existed is durable only if the call says so as a whole.
            good = [
                sealed is SealStatus.SEALED
                or (reserved is ReserveStatus.EXISTS and not result.reason)
                for reserved, sealed in zip(result.reserved, result.sealed, strict=True)
            ]
            kept = [(space + h).hex() for h, fine in zip(hashes, good, strict=True) if fine]
            self._say({"durable": kept})
        return not result.reason

    def _load(self) -> bool:
        space = self._client.open_namespace(world.TENANTS[self._tenant])
        hashes = world.chain(self._tenant, self._dice.randrange(world.CHAINS))
        step = self._layout.block_bytes
        result = self._client.load(
            space,
            hashes,
            self._memory,
            Places.contiguous(self._layout, len(hashes)),
            deadline_s=_DEADLINE_S,
        ).result()
        for index in range(result.blocks):
            found = self._memory.view[index * step : (index + 1) * step]
            if found != self._content(hashes[index]):
                print(f"wrong block {hashes[index].hex()} was loaded", file=sys.stderr, flush=True)
                os._exit(WRONG_BLOCK)
        return result.miss.value not in ("unavailable", "deadline")

    def _lookup(self) -> bool:
        space = self._client.open_namespace(world.TENANTS[self._tenant])
        hashes = world.chain(self._tenant, self._dice.randrange(world.CHAINS))
        return self._client.lookup(space, hashes).miss.value != "unavailable"

    def _content(self, block_hash: bytes) -> bytes:
        with _generating:
            return world.content(self._tenant, block_hash)

    def _say(self, entry: dict[str, object]) -> None:
        os.write(self._diary, json.dumps(entry).encode() + b"\n")


_generating = threading.Lock()
