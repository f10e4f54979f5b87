"""A front end of the scheduler: submits requests, and hears which engines they get.

Owns the stream, and the requests that are not over: after a break they are sent again, and after a
restart of the scheduler those that had no engines. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from itertools import islice

from dualpath.client.scheduler_messages import assignment_of, request_message
from dualpath.client.scheduler_stream import SchedulerStream
from dualpath.proto.tls import NO_TLS, Tls
from dualpath.proto.v1 import scheduler_pb2
from dualpath.scheduler.assignment import Assignment
from dualpath.scheduler.request import Request
from dualpath.transfer.errors import (
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)

READY_S_MAX = 10.0
BATCH_MAX = 1024
"""Requests in one message."""


class Submission:
    """One request on its way. `assignment`: its engines, None while it has none; another one
    replaces it when an engine is lost."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.assignment: Assignment | None = None
        self._over = False
        self._failure: DualPathError | None = None
        self._changed = asyncio.Event()

    @property
    def over(self) -> bool:
        """Whether nothing more will be heard of it."""
        return self._over

    async def assigned(self, after: int = 0) -> Assignment:
        """Wait for an assignment with a number above `after`. Raises why none comes:
        InvalidRequest, Overloaded (with the time to wait), DeadlineExceeded (`queue_timeout`),
        Unavailable."""
        while self.assignment is None or self.assignment.number <= after:
            self._raise()
            await self._next()
        return self.assignment

    async def ended(self) -> None:
        """Wait until its engines have finished it. Raises as `assigned`; after a restart of the
        scheduler Unavailable (`restarted`): its engines go on, and nobody will tell here."""
        while not self._over:
            await self._next()
        if self._failure is not None:
            raise self._failure

    def _raise(self) -> None:
        if self._over:
            raise self._failure or Unavailable(
                f"request '{self.request.id}' is over", reason="finished"
            )

    async def _next(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _tell(self, assignment: Assignment | None) -> None:
        self.assignment = assignment
        self._changed.set()

    def _end(self, failure: DualPathError | None) -> None:
        self._over, self._failure = True, failure
        self._changed.set()


class FrontEnd:
    """See the module docstring. An async context manager that closes it."""

    def __init__(self, scheduler: str, *, token: str = "", tls: Tls = NO_TLS) -> None:
        self._open: dict[str, Submission] = {}
        self._new: list[Request] = []
        self._failure: DualPathError | None = None
        self._stream: SchedulerStream[scheduler_pb2.EnqueueRequest, scheduler_pb2.EnqueueResponse]
        self._stream = SchedulerStream(
            scheduler, "Enqueue", self._greet, self._hear, self._refused, token=token, tls=tls
        )

    async def __aenter__(self) -> FrontEnd:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def ready(self, deadline_s: float = READY_S_MAX) -> None:
        """Wait until the scheduler answers. Raises Unavailable, or why it refuses."""
        await self._stream.ready(deadline_s)

    def submit(self, request: Request) -> Submission:
        """Ask for engines; those of one step of the loop go in one message. While the scheduler is
        away it waits here. Raises InvalidRequest if one of that name is open, or why the scheduler
        refuses this front end."""
        if self._failure is not None:
            raise self._failure
        if request.id in self._open:
            raise InvalidRequest(f"request '{request.id}' is submitted already; name another")
        submission = self._open[request.id] = Submission(request)
        if self._stream.up:
            if not self._new:
                asyncio.get_running_loop().call_soon(self._flush)
            self._new.append(request)
        return submission

    def cancel(self, submission: Submission) -> None:
        """It is wanted no more; `ended` tells when the scheduler has heard of it."""
        if not submission.over:
            self._flush()
            self._stream.say(scheduler_pb2.EnqueueRequest(cancel=[submission.request.id]))

    async def close(self) -> None:
        """End the stream: requests without engines are forgotten, the others go on. Idempotent."""
        await self._stream.close()
        self._refused(Unavailable("the front end was closed", reason="closed"))

    def _flush(self) -> None:
        new, self._new = self._new, []
        for message in _messages(new):
            self._stream.say(message)

    def _greet(self, known: bool) -> list[scheduler_pb2.EnqueueRequest]:
        self._new.clear()
        for submission in list(self._open.values()):
            if submission.assignment is not None and not known:
                text = "the scheduler was restarted; the request goes on at its engines"
                self._end(submission.request.id, Unavailable(text, reason="restarted"))
        return _messages([one.request for one in self._open.values()])

    def _hear(self, message: scheduler_pb2.EnqueueResponse) -> None:
        for one in message.assignment:
            submission = self._open.get(one.request)
            if submission is not None:
                submission._tell(assignment_of(one))
        for name in message.requeued:
            submission = self._open.get(name)
            if submission is not None:
                submission._tell(None)
        for end in message.end:
            self._end(end.id, _failure_of(end))

    def _end(self, request: str, failure: DualPathError | None) -> None:
        submission = self._open.pop(request, None)
        if submission is not None:
            submission._end(failure)

    def _refused(self, error: DualPathError) -> None:
        self._failure = error
        for name in list(self._open):
            self._end(name, error)


def _messages(requests: list[Request]) -> list[scheduler_pb2.EnqueueRequest]:
    left, messages = iter(requests), []
    while batch := [request_message(one) for one in islice(left, BATCH_MAX)]:
        messages.append(scheduler_pb2.EnqueueRequest(request=batch))
    return messages


def _failure_of(end: scheduler_pb2.RequestEnd) -> DualPathError | None:
    """What an end means; None: the request was done."""
    text = f"request '{end.id}': {end.message or end.reason}"
    if not end.reason:
        return None
    if end.reason == "overloaded":
        return Overloaded(text, retry_after_s=end.retry_after_s)
    if end.reason == "invalid":
        return InvalidRequest(text)
    if end.reason == "queue_timeout":
        return DeadlineExceeded(text, reason=end.reason)
    return Unavailable(text, reason=end.reason)
