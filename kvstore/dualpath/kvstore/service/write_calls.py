"""The calls that bring blocks in over the data plane: reserve, seal, abandon.

Owns no state: an attachment's `IncomingBlocks` does. All of it may block on the store, so it runs
in the executor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial

from dualpath.kvstore.service.attachments import Attachments, check_alive
from dualpath.kvstore.service.auth import Caller
from dualpath.kvstore.service.messages import (
    checked_batch,
    checked_namespace_id,
    checked_session,
    new_blocks_of,
    reserve_message,
    seal_statuses,
    ttl_s_of,
)
from dualpath.proto.v1 import store_pb2


class WriteCalls:
    """Handlers without gRPC: a request and its caller in, a response out, errors raised."""

    def __init__(
        self, attachments: Attachments, executor: Executor, clock: Callable[[], float]
    ) -> None:
        self._attachments = attachments
        self._executor = executor
        self._clock = clock

    async def reserve(
        self, request: store_pb2.ReserveRequest, caller: Caller
    ) -> store_pb2.ReserveResponse:
        """See store.proto."""
        namespace_id = checked_namespace_id(request.namespace_id)
        blocks = new_blocks_of(request)
        ttl_s = ttl_s_of(request.ttl_ms)
        attachment = self._attachments.of_session(checked_session(request.session), caller)
        reserve = partial(
            attachment.incoming.reserve, namespace_id, blocks, ttl_s=ttl_s, now=self._clock()
        )
        reserved = await asyncio.get_running_loop().run_in_executor(self._executor, reserve)
        check_alive(attachment)
        return reserve_message(reserved, attachment.incoming.window)

    async def seal(self, request: store_pb2.SealRequest, caller: Caller) -> store_pb2.SealResponse:
        """See store.proto."""
        if request.reservation_id or not request.durable:
            checked_batch("reservation_id", len(request.reservation_id))
        attachment = self._attachments.of_session(checked_session(request.session), caller)
        seal = partial(
            attachment.incoming.seal,
            list(request.reservation_id),
            list(request.checksum),
            durable=request.durable,
        )
        statuses = await asyncio.get_running_loop().run_in_executor(self._executor, seal)
        return store_pb2.SealResponse(status=seal_statuses(statuses))

    async def abandon(
        self, request: store_pb2.AbandonRequest, caller: Caller
    ) -> store_pb2.AbandonResponse:
        """See store.proto."""
        checked_batch("reservation_id", len(request.reservation_id))
        attachment = self._attachments.of_session(checked_session(request.session), caller)
        await asyncio.get_running_loop().run_in_executor(
            self._executor, attachment.incoming.abandon, list(request.reservation_id)
        )
        return store_pb2.AbandonResponse()
