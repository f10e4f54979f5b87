"""The calls that bring blocks in over the data plane: reserve, seal, abandon.

Owns no state: an attachment's `IncomingBlocks` does. All of it may block on the store, so it runs
in the executor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial

from dualpath.kvstore.service.attachments import Attachment, Attachments, check_alive
from dualpath.kvstore.service.auth import Caller
from dualpath.kvstore.service.gate import Gate
from dualpath.kvstore.service.incoming import ReservedBlock
from dualpath.kvstore.service.messages import (
    checked_batch,
    checked_namespace_id,
    checked_session,
    new_blocks_of,
    reserve_message,
    seal_statuses,
    ttl_s_of,
)
from dualpath.kvstore.service.principal import Rights
from dualpath.kvstore.store_api import NewBlock, ReserveStatus, SealStatus, Store
from dualpath.proto.v1 import store_pb2


class WriteCalls:
    """Handlers without gRPC: a request and its caller in, a response out, errors raised."""

    def __init__(
        self,
        attachments: Attachments,
        store: Store,
        gate: Gate,
        executor: Executor,
        clock: Callable[[], float],
    ) -> None:
        self._attachments = attachments
        self._store = store
        self._gate = gate
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
        slot_bytes = self._store.layout(namespace_id).slot_bytes
        with self._gate.reserving(caller.principal, namespace_id, slot_bytes, len(blocks)) as room:
            reserve = partial(
                _reserve, attachment, namespace_id, blocks, room, ttl_s, self._clock()
            )
            reserved = await asyncio.get_running_loop().run_in_executor(self._executor, reserve)
        check_alive(attachment)
        return reserve_message(reserved, attachment.incoming.window)

    async def seal(self, request: store_pb2.SealRequest, caller: Caller) -> store_pb2.SealResponse:
        """See store.proto."""
        if request.reservation_id or not request.durable:
            checked_batch("reservation_id", len(request.reservation_id))
        attachment = self._attachments.of_session(checked_session(request.session), caller)
        for namespace_id in attachment.incoming.namespaces(request.reservation_id):
            # It may have lost the right since it reserved.
            self._gate.access.require(caller.principal, namespace_id, Rights.WRITE)
        seal = partial(
            attachment.incoming.seal,
            list(request.reservation_id),
            list(request.checksum),
            durable=request.durable,
        )
        statuses = await asyncio.get_running_loop().run_in_executor(self._executor, seal)
        self._gate.quotas.sealed(caller.principal, statuses.count(SealStatus.SEALED))
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


def _reserve(
    attachment: Attachment,
    namespace_id: bytes,
    blocks: Sequence[NewBlock],
    room: int,
    ttl_s: float,
    now: float,
) -> list[ReservedBlock]:
    """Reserve `room` blocks at most. What is there already needs none; once the room is taken, the
    rest is FULL."""
    answers: list[ReservedBlock] = []
    while len(answers) < len(blocks) and room > 0:
        part = blocks[len(answers) : len(answers) + room]
        reserved = attachment.incoming.reserve(namespace_id, part, ttl_s=ttl_s, now=now)
        room -= sum(block.status is ReserveStatus.RESERVED for block in reserved)
        answers += reserved
    return answers + [ReservedBlock(ReserveStatus.FULL)] * (len(blocks) - len(answers))
