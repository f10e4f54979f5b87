"""Whether a requester of a relay may have what the relay holds: its daemon is asked.

Owns what the daemons have said of tickets. A chunk that is held needs no storage read, at which the
daemon would look at the ticket and at the right of whoever had it issued. So it is asked once a
ticket, beside the chunks; what it said counts for a few seconds, and is asked again meanwhile while
the ticket is in use. A daemon that is too old to say so confirms nothing: then all is read there.
Belongs to the loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.relay_job import ReadRight, RelayGrant, Requester, Source
from dualpath.transfer.errors import DualPathError

TICKETS_MAX = 4096
"""Most tickets of which something is known."""
ASKING_MAX = 32
"""Most questions of one requester at once; what belongs to further tickets is read from storage."""
CONFIRMED_S = 4.0
"""How long a daemon's yes counts; after half of it, it is asked again."""
REFUSED_S = 1.0

_Key: TypeAlias = tuple[str, bytes]
"""Link to a daemon, and ticket: one is made out to each link."""
_NEVER = float("-inf")


@dataclass(slots=True, eq=False)
class _Ticket:
    """In which namespace it lets us read, b"" for none, and which grants wait to hear that."""

    namespace_id: bytes = b""
    answered_at: float = _NEVER
    asking: asyncio.Task[None] | None = None
    waiting: list[tuple[RelayGrant, bytes]] = field(default_factory=list)

    def right_in(self, namespace_id: bytes) -> ReadRight:
        """What the last answer means."""
        return ReadRight.CONFIRMED if self.namespace_id == namespace_id else ReadRight.REFUSED


class RelayRights:
    """See the module docstring. `on_answer(grants)` follows each answer, with the rights of those
    that waited for it set."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_answer: Callable[[list[RelayGrant]], None]
    ) -> None:
        self._loop = loop
        self._on_answer = on_answer
        self._tickets: OrderedDict[_Key, _Ticket] = OrderedDict()
        self._asking: Counter[Requester] = Counter()

    def find(self, grant: RelayGrant, namespace_id: bytes, block: int) -> ReadRight:
        """Whether a grant of a `block` of its lease, which is in this namespace, may be served;
        `ASKED`: its `right` will be set."""
        source = grant.source
        if not source.ticket:
            return ReadRight.REFUSED
        key = (source.daemon.key, source.ticket)
        ticket = self._tickets.setdefault(key, _Ticket())
        self._tickets.move_to_end(key)
        self._bound()
        age_s = self._loop.time() - ticket.answered_at
        lasts_s = CONFIRMED_S if ticket.namespace_id else REFUSED_S
        if age_s < lasts_s:
            if ticket.namespace_id and age_s > lasts_s / 2:
                self._ask(key, ticket, grant, block)
            return ticket.right_in(namespace_id)
        if not self._ask(key, ticket, grant, block):
            return ReadRight.REFUSED
        ticket.waiting.append((grant, namespace_id))
        return ReadRight.ASKED

    def refused(self, source: Source) -> None:
        """The daemon has refused a read under this ticket: ask before anything is served."""
        ticket = self._tickets.get((source.daemon.key, source.ticket))
        if ticket is not None:
            ticket.answered_at = _NEVER

    def daemon_lost(self, daemon: DaemonLink) -> None:
        """Its tickets may have died with it."""
        for (link, _), ticket in self._tickets.items():
            if link == daemon.key:
                ticket.answered_at = _NEVER

    def close(self) -> None:
        """Ask no more."""
        for ticket in self._tickets.values():
            if ticket.asking is not None:
                ticket.asking.cancel()
        self._tickets.clear()

    def _ask(self, key: _Key, ticket: _Ticket, grant: RelayGrant, block: int) -> bool:
        """Whether the daemon is being asked now."""
        if ticket.asking is None and self._asking[grant.requester] < ASKING_MAX:
            self._asking[grant.requester] += 1
            ticket.asking = self._loop.create_task(
                self._answer(ticket, grant.requester, grant.source, block)
            )
        return ticket.asking is not None

    async def _answer(
        self, ticket: _Ticket, requester: Requester, source: Source, block: int
    ) -> None:
        asked_at = self._loop.time()
        try:
            ticket.namespace_id = await source.daemon.namespace_of(source.ticket, block)
        except DualPathError:
            # The read at the daemon, which follows, tells the requester why.
            ticket.namespace_id = b""
        finally:
            self._asking[requester] -= 1
            if not self._asking[requester]:
                del self._asking[requester]
            ticket.asking = None
        ticket.answered_at = asked_at if ticket.namespace_id else self._loop.time()
        waiting, ticket.waiting = ticket.waiting, []
        for grant, namespace_id in waiting:
            grant.right = ticket.right_in(namespace_id)
        self._on_answer([grant for grant, _ in waiting])

    def _bound(self) -> None:
        if len(self._tickets) > TICKETS_MAX:
            for key, ticket in self._tickets.items():
                if ticket.asking is None:
                    del self._tickets[key]
                    return
