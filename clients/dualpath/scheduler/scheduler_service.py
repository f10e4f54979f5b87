"""The scheduler's gRPC calls: streams <-> the hub, nothing else.

Each call reads in a task of its own and answers from its outbox; whichever ends first ends the
call. Errors become statuses in `dualpath.proto.status`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from dualpath.kvstore.service.auth import principal_of_call
from dualpath.proto.first_message import first_message
from dualpath.proto.v1 import scheduler_pb2, scheduler_pb2_grpc
from dualpath.scheduler.hub import Hub
from dualpath.scheduler.messages import (
    BATCH_MAX,
    enqueue_responses,
    lead_response,
    leader_message,
    request_of,
    role_of,
)
from dualpath.scheduler.outbox import Ended, Event, Outbox
from dualpath.scheduler.run_name import RUN_KEY, new_run
from dualpath.transfer.errors import InvalidRequest


class SchedulerService(scheduler_pb2_grpc.SchedulerServicer):
    """See the module docstring. `clock`: seconds, never falling."""

    def __init__(self, hub: Hub, clock: Callable[[], float]) -> None:
        self._hub = hub
        self._clock = clock
        self._greeting = ((RUN_KEY, new_run()),)

    async def Lead(
        self, request_iterator: AsyncIterator[scheduler_pb2.LeadRequest], context: Any
    ) -> AsyncIterator[scheduler_pb2.LeadResponse]:
        """Serve the leader of a group."""
        await context.send_initial_metadata(self._greeting)
        first = await first_message(request_iterator)
        if first is None:
            raise InvalidRequest("a leader begins with its group and its engines")
        hub, group, role = self._hub, first.group, role_of(first)
        message = leader_message(first, group, role)
        leader = hub.lead(message, principal_of_call(), self._clock())

        async def read() -> None:
            async for request in request_iterator:
                hub.hear(leader, leader_message(request, group, role), self._clock())

        try:
            async for events in _batches(leader.outbox, read()):
                yield lead_response(events)
        finally:
            hub.left(leader, self._clock())

    async def Enqueue(
        self, request_iterator: AsyncIterator[scheduler_pb2.EnqueueRequest], context: Any
    ) -> AsyncIterator[scheduler_pb2.EnqueueResponse]:
        """Serve a front end."""
        await context.send_initial_metadata(self._greeting)
        hub = self._hub
        front_end = hub.join(principal_of_call())

        async def read() -> None:
            async for message in request_iterator:
                for one in message.request:
                    try:
                        request = request_of(one)
                    except InvalidRequest as error:
                        front_end.outbox.put(Ended(one.id, "invalid", str(error)))
                    else:
                        hub.submit(front_end, request, self._clock())
                for name in message.cancel:
                    hub.cancel(front_end, name)

        try:
            async for events in _batches(front_end.outbox, read()):
                for response in enqueue_responses(events):
                    yield response
        finally:
            hub.parted(front_end)


async def _batches(outbox: Outbox, reading: Any) -> AsyncIterator[list[Event]]:
    """What an outbox gives until it is closed or `reading` has ended. Raises what ended either."""
    reader = asyncio.ensure_future(reading)
    reader.add_done_callback(lambda _: outbox.close())
    try:
        while events := await outbox.take():
            for start in range(0, len(events), BATCH_MAX):
                yield events[start : start + BATCH_MAX]
        if reader.done():
            reader.result()
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
