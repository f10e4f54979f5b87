"""What a group's leader reports with each fetch: the load of its engines and nodes."""

from __future__ import annotations

from dataclasses import dataclass

from dualpath.scheduler.checks import check_count


@dataclass(frozen=True, slots=True)
class EngineReport:
    """`requests`: its unfinished requests (seq_e); `tokens`: their tokens (tok_e);
    `reserved_tokens`: tokens of KV promised to them, output to come included (0: not told)."""

    engine: str
    requests: int
    tokens: int
    reserved_tokens: int = 0

    def __post_init__(self) -> None:
        if self.requests < 0 or self.tokens < 0 or self.reserved_tokens < 0:
            check_count(f"requests of engine '{self.engine}'", self.requests)
            check_count(f"tokens of engine '{self.engine}'", self.tokens)
            check_count(f"reserved_tokens of engine '{self.engine}'", self.reserved_tokens)


@dataclass(frozen=True, slots=True)
class NodeReport:
    """`read_queue_tokens`: tokens that wait to be read by its storage links (read_q)."""

    node: str
    read_queue_tokens: int

    def __post_init__(self) -> None:
        check_count(f"read_queue_tokens of node '{self.node}'", self.read_queue_tokens)


@dataclass(frozen=True, slots=True)
class GroupReport:
    """The load of a group's engines and nodes, those that it names.

    - `number` grows with each report of a group: one that is not newer than the last is passed
      over. 0: not numbered, always taken.
    - `seen`: the highest `Assignment.number` that the group knew when it looked. The work of later
      ones is added to what it says. None: all that were returned.
    """

    group: str
    engines: tuple[EngineReport, ...] = ()
    nodes: tuple[NodeReport, ...] = ()
    number: int = 0
    seen: int | None = None

    def __post_init__(self) -> None:
        check_count(f"number of a report of group '{self.group}'", self.number)
