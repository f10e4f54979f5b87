"""What a relay tells its requesters: progress of their grants, and what waits for others.

Owns what is still to be told, and when. Reports of one turn of the loop go together, and no caller
is re-entered. Belongs to the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dualpath.agent.relay_job import RelayGrant, Requester
from dualpath.proto.v1 import common_pb2

TELL_S = 0.05
"""Pause between two reports of the read queue to the requesters."""


class RelayReports:
    """See the module docstring. `others_bytes(requester)` wait for the storage link on behalf of
    everybody else; `tell_queue` tells all that is to be told of that."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        others_bytes: Callable[[Requester], int],
        tell_queue: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._others_bytes = others_bytes
        self._tell_queue = tell_queue
        self._grants: dict[RelayGrant, None] = {}
        self._telling: asyncio.TimerHandle | None = None

    def add(self, grant: RelayGrant) -> None:
        """There is news of a grant."""
        if not self._grants:
            # Later, so that one message carries a burst and no caller is re-entered.
            self._loop.call_soon(self._report)
        self._grants[grant] = None

    def queue_changed(self) -> None:
        """More or less waits for the storage link than before."""
        if self._telling is None:
            self._telling = self._loop.call_later(TELL_S, self._tell)

    def close(self) -> None:
        """Tell of the queue no more."""
        if self._telling is not None:
            self._telling.cancel()

    def _report(self) -> None:
        grants, self._grants = self._grants, {}
        for grant in grants:
            failures, grant.failures = grant.failures, []
            held_bytes, grant.held_bytes = grant.held_bytes, 0
            if grant.requester.closed:
                continue
            grant.on_progress(
                common_pb2.GrantProgress(
                    grant_id=grant.grant_id,
                    done=grant.open_chunks == 0,
                    failed_tag=[tag for tag, _ in failures],
                    failure=[failure for _, failure in failures],
                    queue_bytes=self._others_bytes(grant.requester),
                    detail=grant.detail,
                    held_bytes=held_bytes,
                )
            )

    def _tell(self) -> None:
        self._telling = None
        self._tell_queue()
