"""The scheduler's messages and values: every limit is checked on the way in."""

from __future__ import annotations

from collections.abc import Iterable

from dualpath.proto.v1 import scheduler_pb2
from dualpath.scheduler.assignment import Assignment
from dualpath.scheduler.engine_spec import EngineSpec, NodeSpec, Role
from dualpath.scheduler.group_report import EngineReport, GroupReport, NodeReport
from dualpath.scheduler.leader import LeaderMessage
from dualpath.scheduler.outbox import Ended, Event, Requeued, Withdrawn
from dualpath.scheduler.request import Request
from dualpath.transfer.errors import InvalidRequest

BATCH_MAX = 1024
REASON_CHARS_MAX = 512
"""Most events in one answer, and most of what one says: so it is below the limit on messages with
the longest names that are taken."""
_ROLES = {
    scheduler_pb2.ENGINE_ROLE_PREFILL: Role.PREFILL,
    scheduler_pb2.ENGINE_ROLE_DECODE: Role.DECODE,
}


def leader_message(
    message: scheduler_pb2.LeadRequest, group: str, role: Role | None
) -> LeaderMessage:
    """`group` and `role` are those of the stream's first message, for the later ones. Raises
    InvalidRequest."""
    name = message.group or group
    if message.role:
        role = _ROLES.get(message.role)
    if message.engine and role is None:
        raise InvalidRequest(f"role of group '{name}' is {message.role}; give PREFILL or DECODE")
    engines = tuple(
        EngineSpec(one.name, role, name, one.node, one.hbm_tokens)
        for one in message.engine
        if role is not None
    )
    nodes = tuple(
        NodeSpec(
            one.name,
            one.read_tokens_per_s or 1.0,
            one.staging_tokens,
            one.compute_tokens_per_s,
        )
        for one in message.node
    )
    report = None
    if message.HasField("report"):
        report = _report(message.report, name)
    return LeaderMessage(
        group=name,
        engines=engines,
        nodes=nodes,
        leaving=tuple(message.leaving),
        lost=tuple(message.lost),
        prefilled=tuple(message.prefilled),
        finished=tuple(message.finished),
        report=report,
    )


def role_of(message: scheduler_pb2.LeadRequest) -> Role | None:
    """Of a stream's first message."""
    return _ROLES.get(message.role)


def request_of(message: scheduler_pb2.NewRequest) -> Request:
    """Raises InvalidRequest."""
    return Request(
        message.id,
        message.tokens,
        message.hit_tokens,
        message.new_output_bound,
        message.session,
    )


def lead_response(events: Iterable[Event]) -> scheduler_pb2.LeadResponse:
    """What a leader is told; of each request the last word counts."""
    told: dict[str, Event] = {}
    for event in events:
        if isinstance(event, Assignment):
            told.pop(event.request.id, None)
            told[event.request.id] = event
        elif isinstance(event, Withdrawn):
            told.pop(event.request, None)
            told[event.request] = event
    response = scheduler_pb2.LeadResponse()
    for name, event in told.items():
        if isinstance(event, Assignment):
            response.assignment.append(assignment_message(event))
        else:
            response.withdrawn.append(name)
    return response


def enqueue_responses(events: Iterable[Event]) -> Iterable[scheduler_pb2.EnqueueResponse]:
    """What a front end is told, in order: a message's assignments come before its requeued and
    those before its ends, so a word that would come too early begins another message."""
    response, stage = scheduler_pb2.EnqueueResponse(), 0
    for event in events:
        rank = 0 if isinstance(event, Assignment) else 1 if isinstance(event, Requeued) else 2
        if rank < stage:
            yield response
            response = scheduler_pb2.EnqueueResponse()
        stage = rank
        if isinstance(event, Assignment):
            response.assignment.append(assignment_message(event))
        elif isinstance(event, Requeued):
            response.requeued.append(event.request)
        elif isinstance(event, Ended):
            response.end.append(
                scheduler_pb2.RequestEnd(
                    id=event.request,
                    reason=event.reason,
                    message=event.message[:REASON_CHARS_MAX],
                    retry_after_s=event.retry_after_s,
                )
            )
    yield response


def assignment_message(assignment: Assignment) -> scheduler_pb2.Assignment:
    """The protocol's form of an assignment."""
    return scheduler_pb2.Assignment(
        number=assignment.number,
        request=assignment.request.id,
        prefill=assignment.prefill,
        decode=assignment.decode,
        prefill_reads=assignment.read.prefill,
        tokens=assignment.request.tokens,
        hit_tokens=assignment.request.hit_tokens,
    )


def _report(message: scheduler_pb2.LoadReport, group: str) -> GroupReport:
    if not message.number:
        raise InvalidRequest(
            f"a report of group '{group}' has no number; count them from 1 in each stream"
        )
    return GroupReport(
        group,
        tuple(
            EngineReport(one.engine, one.requests, one.tokens, one.reserved_tokens)
            for one in message.engine
        ),
        tuple(NodeReport(one.node, one.read_queue_tokens) for one in message.node),
        number=message.number,
        seen=message.seen,
    )
