"""Leaders and front ends: who speaks to the scheduler, and what they say."""

from __future__ import annotations

from dataclasses import dataclass, field

from dualpath.scheduler.engine_spec import EngineSpec, NodeSpec
from dualpath.scheduler.group_report import GroupReport
from dualpath.scheduler.outbox import Outbox


@dataclass(frozen=True, slots=True)
class LeaderMessage:
    """One message of a group's leader, checked. See `LeadRequest` of the protocol."""

    group: str
    engines: tuple[EngineSpec, ...] = ()
    nodes: tuple[NodeSpec, ...] = ()
    leaving: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    prefilled: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()
    report: GroupReport | None = None


@dataclass(eq=False, slots=True)
class Leader:
    """One stream of a leader. `gone_at`: when it ended, None while it is there."""

    group: str
    principal: str
    outbox: Outbox
    heard_at: float
    engines: set[str] = field(default_factory=set)
    gone_at: float | None = None


@dataclass(eq=False, slots=True)
class FrontEnd:
    """One stream of a front end, and the requests that it is told about."""

    principal: str
    outbox: Outbox
    requests: set[str] = field(default_factory=set)
