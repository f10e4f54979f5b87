"""The calls of operators: invalidate, drain. They need the right `admin`.

Owns no state: blocks are the store's, the drain is `Drain`'s. What may take long runs in the
executor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from functools import partial

from dualpath.kvstore.service.access import Access
from dualpath.kvstore.service.auth import Caller
from dualpath.kvstore.service.drain import Drain, DrainReport
from dualpath.kvstore.service.messages import checked_hashes, checked_namespace_id
from dualpath.kvstore.service.principal import Rights, checked_principal
from dualpath.kvstore.store_api import InvalidationScope, Store
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import InvalidRequest

DRAIN_S_MAX = 3600.0


class OperatorCalls:
    """Handlers without gRPC: a request and its caller in, a response out, errors raised. `on_stop`
    is called when a drain is to end the process."""

    def __init__(
        self,
        store: Store,
        access: Access,
        drain: Drain,
        executor: Executor,
        on_stop: Callable[[], None],
    ) -> None:
        self._store = store
        self._access = access
        self._drain = drain
        self._executor = executor
        self._on_stop = on_stop

    async def invalidate(
        self, request: store_pb2.InvalidateRequest, caller: Caller
    ) -> store_pb2.InvalidateResponse:
        """See store.proto."""
        scope = scope_of(request)
        if scope.namespace_id:
            self._access.require(caller.principal, scope.namespace_id, Rights.ADMIN)
        else:
            self._access.require_everywhere(caller.principal, Rights.ADMIN)
        invalidate = partial(self._store.invalidate, scope, dry_run=request.dry_run)
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._executor, invalidate)
        return store_pb2.InvalidateResponse(
            blocks=found.blocks, bytes=found.nbytes, leased_blocks=found.leased_blocks
        )

    async def drain(
        self,
        request: store_pb2.DrainRequest,
        caller: Caller,
        send: Callable[[store_pb2.DrainProgress], Awaitable[None]],
    ) -> None:
        """See store.proto."""
        self._access.require_everywhere(caller.principal, Rights.ADMIN)
        if request.resume:
            if request.stop:
                raise InvalidRequest("resume and stop exclude each other")
            await send(_progress(self._drain.resume()))
            return
        if not 1 <= request.deadline_ms <= DRAIN_S_MAX * 1000:
            raise InvalidRequest(
                f"deadline_ms: {request.deadline_ms}; 1..{DRAIN_S_MAX * 1000:.0f} are valid"
            )
        async for report in self._drain.run(request.deadline_ms / 1000):
            await send(_progress(report))
        if request.stop:
            self._on_stop()


def scope_of(request: store_pb2.InvalidateRequest) -> InvalidationScope:
    """What is to be invalidated. Raises InvalidRequest."""
    if request.namespace_id:
        checked_namespace_id(request.namespace_id)
    if request.hash:
        checked_hashes("hash", [request.hash])
    if request.writer:
        checked_principal(request.writer)
    return InvalidationScope(request.namespace_id, request.hash, request.writer)


def _progress(report: DrainReport) -> store_pb2.DrainProgress:
    return store_pb2.DrainProgress(
        state=report.phase.value,
        queue_bytes=report.left.queue_bytes,
        leases=report.left.leases,
        reservations=report.left.reservations,
        streams=report.left.streams,
        flushed=report.flushed,
        done=report.done,
        detail=report.detail,
    )
