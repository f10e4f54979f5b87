"""What leaders and front ends say to the scheduler, and what it tells them: values <-> messages."""

from __future__ import annotations

from collections.abc import Iterable

from dualpath.proto.v1 import scheduler_pb2
from dualpath.scheduler.assignment import Assignment, ReadShares
from dualpath.scheduler.engine_spec import EngineSpec, NodeSpec, Role
from dualpath.scheduler.group_report import GroupReport
from dualpath.scheduler.request import Request

_ROLES = {
    Role.PREFILL: scheduler_pb2.ENGINE_ROLE_PREFILL,
    Role.DECODE: scheduler_pb2.ENGINE_ROLE_DECODE,
}


def first_message(
    group: str, role: Role, engines: Iterable[EngineSpec], nodes: Iterable[NodeSpec]
) -> scheduler_pb2.LeadRequest:
    """With which a leader's stream begins."""
    return scheduler_pb2.LeadRequest(
        group=group,
        role=_ROLES[role],
        engine=[
            scheduler_pb2.EngineInfo(name=one.name, node=one.node, hbm_tokens=one.hbm_tokens)
            for one in engines
        ],
        node=[
            scheduler_pb2.NodeInfo(
                name=one.name,
                read_tokens_per_s=one.read_tokens_per_s,
                staging_tokens=one.staging_tokens,
                compute_tokens_per_s=one.compute_tokens_per_s,
            )
            for one in nodes
        ],
    )


def report_message(report: GroupReport, number: int) -> scheduler_pb2.LoadReport:
    """The `number`-th of its stream."""
    return scheduler_pb2.LoadReport(
        number=number,
        seen=report.seen or 0,
        engine=[
            scheduler_pb2.EngineLoad(
                engine=one.engine,
                requests=one.requests,
                tokens=one.tokens,
                reserved_tokens=one.reserved_tokens,
            )
            for one in report.engines
        ],
        node=[
            scheduler_pb2.NodeLoad(node=one.node, read_queue_tokens=one.read_queue_tokens)
            for one in report.nodes
        ],
    )


def request_message(request: Request) -> scheduler_pb2.NewRequest:
    """A request as a front end sends it."""
    return scheduler_pb2.NewRequest(
        id=request.id,
        tokens=request.tokens,
        hit_tokens=request.hit_tokens,
        new_output_bound=request.new_output_bound,
        session=request.session,
    )


def assignment_of(message: scheduler_pb2.Assignment) -> Assignment:
    """What was assigned; of its request what the scheduler says of it. Raises InvalidRequest for
    counts that are none."""
    request = Request(message.request, message.tokens, message.hit_tokens)
    shares = ReadShares(message.prefill_reads, 1.0 - message.prefill_reads)
    return Assignment(message.number, request, message.prefill, message.decode, shares)
