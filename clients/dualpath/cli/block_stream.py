"""Moving a run of blocks between a byte stream and the store, a bounded batch at a time.

Owns the engine memory of a batch. Only the last block of a stream may be short; it is filled with
zeros. Blocks that the store holds already are read back and compared, since a name's blocks never
change: other bytes under the same name are an error, never silently kept.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from dualpath.agent.outcome import LoadResult, MissReason, SaveResult
from dualpath.agent.places import Places
from dualpath.cli.block_identity import BlockIdentity
from dualpath.cli.connection import ClientConfig
from dualpath.client.kv_client import KVClient
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.store_api import BATCH_BLOCKS_MAX, ReserveStatus
from dualpath.transfer.errors import DualPathError, Unavailable

_REFUSED: Mapping[ReserveStatus, str] = {
    ReserveStatus.PENDING: "another session is writing it now: try again soon",
    ReserveStatus.NO_PARENT: "the block before it has left or is being written by another "
    "session: try again",
    ReserveStatus.FULL: "the store is full, and nothing else in it may make way now",
    ReserveStatus.QUOTA: "its tenant is at its quota, and none of its blocks may make way now: "
    "raise its disk_bytes in `tenants` of the table [serve]",
}
"""What to do about a block that was not reserved."""

FillBlocks = Callable[[memoryview], int]
"""Fill the buffer from the stream; return the bytes written, fewer only at the end."""


@dataclass(frozen=True, slots=True)
class SavedBlocks:
    """How many blocks the name has now, and how many of them this call stored."""

    blocks: int
    new_blocks: int


class BlockStream:
    """Blocks [0, n) of one identity, through one client session."""

    def __init__(self, client: KVClient, config: ClientConfig, identity: BlockIdentity) -> None:
        self._client = client
        self._config = config
        self._identity = identity
        self._block_bytes = identity.layout.block_bytes
        self._namespace_id = b""

    async def open(self) -> bytes:
        """Make the namespace known; return its id. First of all calls."""
        self._namespace_id = await self._client.open_namespace(self._identity.namespace)
        return self._namespace_id

    async def lookup(self, blocks: int) -> tuple[int, MissReason, str, list[str]]:
        """(blocks stored, why not more, detail, the tier of each) of the first `blocks`.

        To an engine a daemon that is away is a miss; to a person it is Unavailable.
        """
        hit = await self._client.lookup(self._namespace_id, self._identity.hashes(blocks))
        if not hit.blocks and hit.miss is MissReason.UNAVAILABLE:
            raise Unavailable(f"{hit.detail}; is `dualpath serve` running there?")
        return hit.blocks, hit.miss, hit.detail, [tier.value for tier in hit.tiers]

    async def save(self, blocks: int, fill: FillBlocks, *, durable: bool) -> SavedBlocks:
        """Store `blocks` blocks out of the stream. Raises DualPathError with the store's reason
        if not all of them are stored, reason `exists` if they are there with other bytes."""
        hashes = self._identity.hashes(blocks)
        parents = [b"", *hashes[:-1]]
        new = 0
        async with self._memory(blocks) as memory:
            for first, count in self._batches(blocks):
                part = slice(first, first + count)
                wanted = memory.view[: count * self._block_bytes]
                filled = fill(wanted)
                wanted[filled:] = bytes(len(wanted) - filled)
                saved = await self._client.save(
                    self._namespace_id,
                    hashes[part],
                    parents[part],
                    memory,
                    Places.contiguous(self._identity.layout, count),
                    durable=durable,
                    deadline_s=self._config.deadline_s,
                )
                if saved.present_blocks < count:
                    raise _incomplete(saved, first, blocks)
                new += saved.sealed_blocks
                if saved.sealed_blocks < count:
                    await self._compare(hashes[part], wanted)
        return SavedBlocks(blocks, new)

    async def load(self, blocks: int) -> AsyncIterator[tuple[memoryview, LoadResult]]:
        """Yield the bytes of the first `blocks` blocks, verified, a batch at a time; each view is
        good until the next one is asked for. Raises DualPathError, reason of the miss, if one is
        not there any more."""
        hashes = self._identity.hashes(blocks)
        async with self._memory(blocks) as memory:
            for first, count in self._batches(blocks):
                result = await self._load_into(memory, hashes[first : first + count])
                with memory.view[: count * self._block_bytes] as view:
                    yield view, result

    async def _compare(self, hashes: list[bytes], wanted: memoryview) -> None:
        async with self._memory(len(hashes)) as memory:
            await self._load_into(memory, hashes)
            with memory.view[: len(wanted)] as stored:
                if stored != wanted:
                    raise DualPathError(
                        "other bytes are stored under this name, and blocks never change: use "
                        "another --key, other --tokens or another --salt",
                        reason="exists",
                    )

    async def _load_into(self, memory: EngineMemory, hashes: list[bytes]) -> LoadResult:
        load = await self._client.load(
            self._namespace_id,
            hashes,
            memory,
            Places.contiguous(self._identity.layout, len(hashes)),
            deadline_s=self._config.deadline_s,
        )
        result = await load.result()
        if result.blocks < len(hashes):
            raise DualPathError(
                f"{result.blocks} of {len(hashes)} blocks could be loaded: "
                f"{result.miss.value}: {result.detail}",
                reason=result.miss.value,
            )
        return result

    @asynccontextmanager
    async def _memory(self, blocks: int) -> AsyncIterator[EngineMemory]:
        memory = await self._client.allocate(min(blocks, self._batch_blocks) * self._block_bytes)
        try:
            yield memory
        finally:
            await memory.aclose()

    @property
    def _batch_blocks(self) -> int:
        if self._config.agent:
            # It may have several daemons, and finds a chain by its first block.
            return BATCH_BLOCKS_MAX
        return min(max(self._config.batch_bytes // self._block_bytes, 1), BATCH_BLOCKS_MAX)

    def _batches(self, blocks: int) -> Iterator[tuple[int, int]]:
        step = self._batch_blocks
        for first in range(0, blocks, step):
            yield first, min(step, blocks - first)


def _incomplete(saved: SaveResult, first: int, blocks: int) -> DualPathError:
    """Why the save of the blocks from `first` on ended before the last one."""
    stored = first + saved.present_blocks
    status = saved.reserved[saved.present_blocks]
    if status is None or status not in _REFUSED:
        reason, detail = saved.reason or None, saved.detail
    else:
        reason, detail = status.value, f"block {stored}: {_REFUSED[status]}"
    return DualPathError(f"stored {stored} of {blocks} blocks: {detail}", reason=reason)
