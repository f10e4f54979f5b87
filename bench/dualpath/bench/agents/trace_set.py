"""Agents out of a recorded trace: each conversation becomes a trajectory.

What a request finds stored is the leading full blocks that it shares with the request before it in
its conversation; for the first one, with any request before it. Answers count as stored only where
a later prompt repeats them as blocks, so hits are never overstated. A trace without conversations
(`hash_ids`) becomes one-turn agents that arrive when their request did.

A trace with gaps is refused, naming the place: request numbers that are missing, times that go
back, an empty prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dualpath.bench.agents.trajectory import AgentArrival, Trajectory, Turn
from dualpath.bench.testbed.trace_formats import TraceRequest, read_trace
from dualpath.bench.testbed.workload import prefix_hits
from dualpath.transfer.errors import InvalidRequest

REQUESTS_MAX = 1 << 20


@dataclass(slots=True)
class _Conversation:
    """As far as it was read."""

    session: str
    start_s: float
    first_context: int
    turns: list[Turn] = field(default_factory=list)
    last: TraceRequest | None = None


def trace_set(path: str) -> tuple[AgentArrival, ...]:
    """The agents of a file, in order of their first request; `at_s` counts from the start of the
    session or of the trace. Raises InvalidRequest: unreadable, another format, gaps."""
    try:
        return agents_of(read_trace(path))
    except InvalidRequest as error:
        text = str(error)
        raise InvalidRequest(
            text if text.startswith(path) else f"{path}: {text}", reason="trace"
        ) from error


def agents_of(requests: Iterable[TraceRequest]) -> tuple[AgentArrival, ...]:
    """As `trace_set`, of requests that are read already."""
    chosen: list[TraceRequest] = []
    for request in requests:
        if len(chosen) == REQUESTS_MAX:
            raise InvalidRequest(
                f"more than {REQUESTS_MAX} requests; cut the trace", reason="trace"
            )
        if not request.input_tokens:
            raise InvalidRequest(
                f"session {request.session}: a request at {request.start_s} s with no prompt: a "
                "gap; remove it, or record the trace again",
                reason="trace",
            )
        chosen.append(request)
    if not chosen:
        raise InvalidRequest("the trace has no requests", reason="trace")
    return _conversations(chosen) if chosen[0].number else _lone(chosen)


def _lone(requests: list[TraceRequest]) -> tuple[AgentArrival, ...]:
    found: list[AgentArrival] = []
    for request, hit in prefix_hits(requests):
        if found and request.start_s < found[-1].at_s:
            raise InvalidRequest(
                f"{request.session} comes at {request.start_s} s, after one at {found[-1].at_s} s; "
                "sort the trace by time",
                reason="trace",
            )
        context = hit * request.block_tokens
        turn = Turn(request.input_tokens - context, request.output_tokens)
        found.append(AgentArrival(request.start_s, Trajectory((turn,), context)))
    return tuple(found)


def _conversations(requests: list[TraceRequest]) -> tuple[AgentArrival, ...]:
    open_now: dict[str, _Conversation] = {}
    found: list[_Conversation] = []
    scopes: dict[str, list[_Conversation]] = {}
    for request in requests:
        conversation = open_now.get(request.session)
        # A number that starts again is another conversation at the same depth of sub-agents.
        if conversation is None or request.number == 1:
            before = scopes.setdefault(request.scope, [])
            shared = max((_shared(request, each.last) for each in before), default=0)
            if request.number != 1:
                raise InvalidRequest(_gap(request, 0), reason="trace")
            conversation = _Conversation(request.session, request.start_s, shared)
            before.append(conversation)
            found.append(conversation)
            open_now[request.session] = conversation
        _take(conversation, request)
    return tuple(
        AgentArrival(each.start_s, Trajectory(tuple(each.turns), each.first_context))
        for each in found
    )


def _take(conversation: _Conversation, request: TraceRequest) -> None:
    last = conversation.last
    if last is None:
        kept = conversation.first_context
    else:
        if request.number != last.number + 1:
            raise InvalidRequest(_gap(request, last.number), reason="trace")
        if request.start_s < last.start_s:
            raise InvalidRequest(
                f"session {request.session}: request {request.number} comes at {request.start_s} s,"
                f" before the one it follows ({last.start_s} s); sort the trace by time",
                reason="trace",
            )
        kept = _shared(request, last)
    think_s = request.think_s if last is not None else 0.0
    turn = Turn(request.input_tokens - kept, request.output_tokens, kept, think_s)
    conversation.turns.append(turn)
    conversation.last = request


def _gap(request: TraceRequest, last: int) -> str:
    return (
        f"session {request.session}: request {request.number} follows request {last}: a gap, whose "
        "prompts are not known; leave the session out, or record the trace again"
    )


def _shared(request: TraceRequest, other: TraceRequest | None) -> int:
    """Tokens of the leading blocks that two requests have in common."""
    if other is None:
        return 0
    ours, theirs = request.block_ids, other.block_ids
    low, high = 0, min(len(ours), len(theirs))
    while low < high:
        middle = (low + high + 1) // 2
        if ours[low:middle] == theirs[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low * request.block_tokens
