"""DualPath itself: embedded, over the local socket, over TCP, and from SSD.

settings: mode ("embedded", "local", "tcp", "disk"), folder, capacity_bytes. Each mode verifies
every chunk's checksum in its get, and every mode's blocks go to SSD as well: a put in DRAM returns
when the blocks can be read, the rest is written before the gets begin. A get ends with the bytes
in the caller's memory.
"""

from __future__ import annotations

import contextlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from dualpath.agent.config import AgentConfig
from dualpath.agent.outcome import SaveResult
from dualpath.agent.places import Places
from dualpath.bench import serving
from dualpath.client.blocking import BlockingKVClient
from dualpath.client.local_store import LocalStore
from dualpath.kvstore.block_copy import copy_blocks_hashed
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.local_protocol import SUFFIX
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import InvalidationScope, SealStatus
from dualpath.proto.v1 import store_pb2, store_pb2_grpc
from dualpath.transfer.region import Region
from harness import PIECE_BYTES, serve

SPARE_BYTES = 512 << 20
READ_BUFFERS_BYTES = 128 << 20
LEASE_S = 60.0
DEADLINE_S = 60.0
_OWNER = "bench"


class Keys:
    """Names of a piece's blocks: a chain of its own, hashes of 32 bytes."""

    def __init__(self, keys: list[str]) -> None:
        self.hashes = [key.encode()[:32] for key in keys]
        self.parents = [b"", *self.hashes[:-1]]


class Stored:
    """What all modes share: namespaces, a new one for each size and each filling."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.version = "DualPath " + version("dualpath")
        self.server_pids: list[int] = []
        self.source: Any = None
        self.target: Any = None
        self._folder = Path(settings["folder"])
        self._capacity_bytes = settings["capacity_bytes"]
        self._filling = 0
        self._namespace_id = b""
        self._chains: dict[str, Keys] = {}

    def open(self, block_bytes: int, pieces: int, piece_blocks: int) -> None:
        self._block_bytes = block_bytes
        self._layout = KVLayout(8, 16, block_bytes // 8, "bfloat16")
        self._at = np.arange(piece_blocks, dtype=np.int64) * block_bytes
        self._chains.clear()
        self._open_namespace()

    def _open_namespace(self) -> None:
        if self._namespace_id:
            # As the others' blocks are removed: what is of no use any more keeps no memory.
            self._invalidate(self._namespace_id)
        self._filling += 1
        self._namespace_id = self._opened(
            Namespace("bench", self._layout, salt=f"filling {self._filling}")
        )

    def _opened(self, namespace: Namespace) -> bytes:
        raise NotImplementedError

    def _invalidate(self, namespace_id: bytes) -> None:
        raise NotImplementedError

    def forget(self, keys: list[str]) -> None:
        if self._chains.pop(keys[0], None) is not None and not self._chains:
            self._open_namespace()

    def _chain(self, keys: list[str]) -> Keys:
        if keys[0] not in self._chains:
            self._chains[keys[0]] = Keys(keys)
        return self._chains[keys[0]]


class Embedded(Stored):
    """A `BlockStore` in this process, its blocks in DRAM."""

    def start(self) -> None:
        self._store = BlockStore.open(self._folder / "data", self._config())

    def _config(self) -> StoreConfig:
        return StoreConfig(
            disk_bytes=3 * self._capacity_bytes + SPARE_BYTES,
            dram_bytes=self._capacity_bytes + SPARE_BYTES,
            write_back_bytes_max=self._capacity_bytes + SPARE_BYTES,
        )

    def _opened(self, namespace: Namespace) -> bytes:
        return self._store.open_namespace(namespace)

    def _invalidate(self, namespace_id: bytes) -> None:
        self._store.invalidate(InvalidationScope(namespace_id))

    def put(self, keys: list[str], blocks: list[memoryview]) -> None:
        self._put(keys, blocks, durable=False)

    def _put(self, keys: list[str], blocks: list[memoryview], *, durable: bool) -> None:
        chain = self._chain(keys)
        statuses = self._store.put(
            self._namespace_id, chain.hashes, chain.parents, blocks, durable=durable
        )
        if any(status is not SealStatus.SEALED for status in statuses):
            raise RuntimeError(f"put answered {set(statuses)}")

    def get(self, keys: list[str], places: list[memoryview]) -> None:
        mapped = self._store.map(
            self._namespace_id, self._chain(keys).hashes, owner=_OWNER, lease_s=LEASE_S
        )
        try:
            if mapped.hit.blocks != len(keys) or mapped.offsets.min() < 0:
                raise RuntimeError(f"{mapped.hit.blocks} of {len(keys)} blocks are in DRAM")
            arrived = copy_blocks_hashed(
                memoryview(self.target),
                self._at[: len(keys)],
                self._store.arena.view,
                mapped.offsets,
                self._block_bytes,
                self._layout.chunk_bytes,
            )
            if not np.array_equal(arrived, mapped.hit.checksums):
                raise RuntimeError("a checksum is wrong")
        finally:
            self._store.release(mapped.hit.lease_id, owner=_OWNER)

    def settle(self) -> None:
        """See the module docstring: `chill` waits for the SSD."""

    def chill(self) -> None:
        self._store.seal([], owner=_OWNER, durable=True)

    def close(self) -> None:
        self._store.close()


class Disk(Embedded):
    """A `BlockStore` whose gets come from SSD; puts are durable."""

    def _config(self) -> StoreConfig:
        return StoreConfig(
            disk_bytes=3 * self._capacity_bytes + SPARE_BYTES,
            dram_bytes=2 * PIECE_BYTES,
            read_buffers_bytes=READ_BUFFERS_BYTES,
            promote=False,
        )

    def put(self, keys: list[str], blocks: list[memoryview]) -> None:
        self._put(keys, blocks, durable=True)

    def chill(self) -> None:
        # What was just written is still in DRAM; what is opened again is not.
        self._store.close()
        self._store = BlockStore.open(self._folder / "data", self._config())

    def get(self, keys: list[str], places: list[memoryview]) -> None:
        read = self._store.get_into(self._namespace_id, self._chain(keys).hashes, self.target.data)
        if (read.blocks, read.fetched) != (len(keys), len(keys)):
            raise RuntimeError(f"{read.blocks} of {len(keys)} blocks came, {read.fetched} from SSD")


class Remote(Stored):
    """A daemon, and an agent in this process that saves and loads over TCP."""

    address = "listen"

    def start(self) -> None:
        self._stack = contextlib.ExitStack()
        self._daemon = self._stack.enter_context(
            serving.daemon(
                self._folder,
                dram_bytes=self._capacity_bytes + SPARE_BYTES,
                disk_bytes=3 * self._capacity_bytes + SPARE_BYTES,
            )
        )
        self.server_pids = [self._daemon.pid]
        self._client = self._stack.enter_context(
            BlockingKVClient.embedded(AgentConfig(name="bench", daemons=(self._address(),)))
        )
        self._memories = [self._client.allocate(PIECE_BYTES) for _ in range(2)]
        self.source, self.target = (
            np.frombuffer(memory.view, dtype=np.uint8) for memory in self._memories
        )

    def _address(self) -> str:
        return self._daemon.address("listen")

    def _opened(self, namespace: Namespace) -> bytes:
        return self._client.open_namespace(namespace)

    def _invalidate(self, namespace_id: bytes) -> None:
        request = store_pb2.InvalidateRequest(namespace_id=namespace_id)
        with grpc.insecure_channel(self._daemon.address("listen")) as channel:
            store_pb2_grpc.StoreStub(channel).Invalidate(request, timeout=DEADLINE_S)

    def put(self, keys: list[str], blocks: list[memoryview]) -> None:
        saved = self._save(self._chain(keys), durable=False)
        if saved.sealed_blocks != len(keys):
            raise RuntimeError(f"{saved.sealed_blocks} of {len(keys)} sealed: {saved.detail}")

    def _save(self, chain: Keys, *, durable: bool) -> SaveResult:
        return self._client.save(
            self._namespace_id,
            chain.hashes,
            chain.parents,
            self._memories[0],
            Places.contiguous(self._layout, len(chain.hashes)),
            durable=durable,
            deadline_s=DEADLINE_S,
        )

    def get(self, keys: list[str], places: list[memoryview]) -> None:
        load = self._client.load(
            self._namespace_id,
            self._chain(keys).hashes,
            self._memories[1],
            Places.contiguous(self._layout, len(keys)),
            deadline_s=DEADLINE_S,
        )
        result = load.result()
        if result.blocks != len(keys):
            raise RuntimeError(f"{result.blocks} of {len(keys)} blocks came: {result.miss}")

    def settle(self) -> None:
        """See the module docstring: `chill` waits for the SSD."""

    def chill(self) -> None:
        # Blocks that exist are not written again, only waited for.
        for chain in self._chains.values():
            saved = self._save(chain, durable=True)
            if saved.reason:
                raise RuntimeError(f"the blocks are not durable: {saved.reason} {saved.detail}")

    def close(self) -> None:
        self._stack.close()


class Local(Remote):
    """The same daemon through its local socket: gets read its arena, puts go by shared memory."""

    def start(self) -> None:
        super().start()
        path = self._daemon.address("unix") + SUFFIX
        self._local = self._stack.enter_context(LocalStore.connect(path))
        self._shared = Region.memfd("bench", PIECE_BYTES)
        self._shared.prefault()
        self.source = np.frombuffer(self._shared.view, dtype=np.uint8)

    def _address(self) -> str:
        return "unix:" + self._daemon.address("unix")

    def put(self, keys: list[str], blocks: list[memoryview]) -> None:
        chain = self._chain(keys)
        statuses = self._local.put(
            self._namespace_id,
            chain.hashes,
            chain.parents,
            self._shared,
            self._block_bytes,
            durable=False,
        )
        if any(status is not SealStatus.SEALED for status in statuses):
            raise RuntimeError(f"put answered {set(statuses)}")

    def get(self, keys: list[str], places: list[memoryview]) -> None:
        read = self._local.read_into(
            self._namespace_id, self._chain(keys).hashes, memoryview(self.target)
        )
        if read.blocks != len(keys):
            raise RuntimeError(f"{read.blocks} of {len(keys)} blocks came: {read}")


MODES = {"embedded": Embedded, "disk": Disk, "tcp": Remote, "local": Local}


if __name__ == "__main__":
    serve(lambda settings: MODES[settings["mode"]](settings))
