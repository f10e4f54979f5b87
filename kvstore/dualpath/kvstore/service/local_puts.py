"""Blocks that one client of the local socket stores out of memory that it shares with the daemon.

Owns the mappings of that memory. A memfd is taken only if its owner can never shrink it and it
does not live in the kernel's pool of huge pages, which may run dry: so no access to it can fault.
The client may change its bytes at any time. They are copied into the arena and hashed in one pass:
what a block is stored with is what it is. One thread at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import threading

import numpy as np
from dualpath.kvstore import embedded
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.local_protocol import Body, MalformedMessage, Parts
from dualpath.kvstore.local_put import (
    PUT_BYTES_MAX,
    SHARED_BYTES_MAX,
    SHARED_MAX,
    PutRequest,
    number_of,
    number_parts,
    statuses_parts,
)
from dualpath.kvstore.service.gate import Gate
from dualpath.kvstore.store_api import SealStatus, Store
from dualpath.transfer.errors import InvalidRequest, Overloaded
from dualpath.transfer.memfd_channel import close_fds
from dualpath.transfer.region import Region

PUTS_MAX = 8
"""Most puts of all connections that copy at once."""
TURN_S_MAX = 5.0
"""Longest wait for a turn."""


class LocalPuts:
    """See the module docstring. `fds` are descriptors that came with the last message; `turns` are
    those of all connections."""

    def __init__(
        self,
        store: Store,
        gate: Gate,
        *,
        principal: str,
        owner: str,
        fds: list[int],
        turns: threading.Semaphore,
    ) -> None:
        self._store = store
        self._gate = gate
        self._principal = principal
        self._owner = owner
        self._fds = fds
        self._turns = turns
        self._numbers = itertools.count(1)
        self._shared: dict[int, Region] = {}
        self._announced = 0

    @property
    def awaits_memory(self) -> bool:
        """Whether the next message must be MEMORY."""
        return self._announced > 0

    def close(self) -> None:
        """Unmap everything."""
        for number in list(self._shared):
            self._drop(number)

    def share(self, body: Body) -> Parts:
        """SHARE: a memory of so many bytes is about to come."""
        nbytes = number_of(body)
        if nbytes <= 0:
            raise InvalidRequest("a memory to share has at least one byte")
        if len(self._shared) >= SHARED_MAX:
            raise Overloaded(
                f"this connection shares {SHARED_MAX} memories: unshare one", retry_after_s=0.1
            )
        total = nbytes + sum(region.nbytes for region in self._shared.values())
        if total > SHARED_BYTES_MAX:
            raise Overloaded(
                f"this connection would share {total} bytes; {SHARED_BYTES_MAX} at most: unshare "
                "some",
                retry_after_s=0.1,
            )
        self._announced = nbytes
        return []

    def memory(self, body: Body) -> Parts:
        """MEMORY: here it is. Answers its number."""
        nbytes, self._announced = self._announced, 0
        fds = [self._fds.pop() for _ in range(len(self._fds))]
        if not nbytes or len(fds) != 1 or len(body):
            close_fds(fds)
            raise MalformedMessage(f"{len(fds)} descriptors came for a memory of {nbytes} bytes")
        region = _mapped(fds[0], nbytes)
        number = next(self._numbers)
        self._shared[number] = region
        return number_parts(number)

    def unshare(self, body: Body) -> Parts:
        """UNSHARE. Of a number that is unknown: nothing."""
        self._drop(number_of(body))
        return []

    def put(self, body: Body) -> Parts:
        """PUT: store blocks, parents first; see `embedded.put`."""
        request = PutRequest.of(body)
        region = self._shared.get(request.memory)
        if region is None:
            raise InvalidRequest(f"memory {request.memory} is not shared: share it first")
        layout = self._store.layout(request.namespace_id)
        _check_places(request, region, layout)
        if not self._turns.acquire(timeout=TURN_S_MAX):
            raise Overloaded(f"{PUTS_MAX} puts are under way", retry_after_s=0.1)
        try:
            return statuses_parts(self._stored(request, region, layout))
        finally:
            self._turns.release()

    def _stored(
        self, request: PutRequest, region: Region, layout: KVLayout
    ) -> tuple[embedded.PutStatus, ...]:
        views = [region.view[at : at + layout.block_bytes] for at in request.offsets.tolist()]
        count = min(len(views), embedded.part_blocks(layout))
        try:
            with self._gate.reserving(
                self._principal, request.namespace_id, layout.slot_bytes, count
            ) as room:
                statuses = embedded.put(
                    self._store,
                    request.namespace_id,
                    request.hash_list,
                    request.parent_list,
                    views,
                    durable=request.durable,
                    owner=self._owner,
                    writer=self._principal,
                    reserved_max=room,
                )
        finally:
            for view in views:
                view.release()
        self._gate.quotas.sealed(self._principal, statuses.count(SealStatus.SEALED))
        return statuses

    def _drop(self, number: int) -> None:
        region = self._shared.pop(number, None)
        if region is not None:
            with contextlib.suppress(BufferError):
                region.close()


def _mapped(fd: int, nbytes: int) -> Region:
    """Map a memfd for reading; takes ownership of it. Raises InvalidRequest."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    try:
        # What is no memfd has no seals and is refused below, whatever its file system says.
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        pooled = os.fstatvfs(fd).f_bsize > page_bytes
    except OSError as error:
        os.close(fd)
        raise InvalidRequest(f"shared memory must be a memfd: {error.strerror}") from error
    if pooled:
        os.close(fd)
        raise InvalidRequest(
            "shared memory must not be of the kernel's pool of huge pages: make the memfd without "
            "MFD_HUGETLB"
        )
    return Region.received(fd, nbytes, writable=False)


def _check_places(request: PutRequest, region: Region, layout: KVLayout) -> None:
    """Raises InvalidRequest."""
    nbytes, offsets = layout.block_bytes, request.offsets
    if request.block_bytes != nbytes:
        raise InvalidRequest(
            f"blocks of {request.block_bytes} bytes were sent, this layout has {nbytes}"
        )
    if len(offsets) * nbytes > PUT_BYTES_MAX:
        raise InvalidRequest(
            f"{len(offsets)} blocks of {nbytes} bytes in one put; {PUT_BYTES_MAX} bytes at most"
        )
    low, high = int(np.min(offsets)), int(np.max(offsets))
    if low < 0 or high > region.nbytes - nbytes:
        raise InvalidRequest(
            f"blocks of {nbytes} bytes at {low}..{high} leave the shared memory of "
            f"{region.nbytes} bytes"
        )
