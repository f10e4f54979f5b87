"""The look-up of a load that goes out with the load's first grant, in one message.

Owns what is asked, how much may go with it, and the wait for the answer. Until that has come the
load runs as if all of its blocks were stored: the first of their chunks are armed and asked for,
and what lands of them is kept unjudged. It spares a load a round trip before its first byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dualpath.agent.daemon_link import OnFound
from dualpath.agent.slice_table import GRANT_CHUNKS_MAX
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.grant import Grant

FIRST_BYTES = 64 << 20
"""What is asked for with the look-up: enough to keep a link busy until the answer has come."""


class FirstLook:
    """See the module docstring. Belongs to the loop."""

    def __init__(
        self,
        request: store_pb2.LookupRequest,
        on_found: OnFound,
        answered: asyncio.Future[bool],
    ) -> None:
        self.request = request
        self.on_found = on_found
        self.answered = answered
        """Whether the load has begun, or ended meanwhile; False: as if nothing had been asked."""
        self.sent = False

    def split(self, grant: Grant, sizes: Sequence[int]) -> tuple[Grant, Grant | None]:
        """What goes along, at least one chunk, and the rest; `sizes` of the load's chunks."""
        nbytes = count = 0
        for chunk in grant.chunks[:GRANT_CHUNKS_MAX]:
            if count and nbytes + sizes[chunk] > FIRST_BYTES:
                break
            nbytes += sizes[chunk]
            count += 1
        if count == len(grant.chunks):
            return grant, None
        return (
            Grant(grant.load_id, grant.path, grant.chunks[:count], nbytes),
            Grant(grant.load_id, grant.path, grant.chunks[count:], grant.nbytes - nbytes),
        )

    def end(self, begun: bool) -> None:
        """Let whoever waits go on."""
        if not self.answered.done():
            self.answered.set_result(begun)
