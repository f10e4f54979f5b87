"""Grants of loads on their way to whoever serves them.

Owns what is said to send chunks: the window that they land in, armed before anybody is asked, and
the message. Keeps a grant back while its load lacks the ticket or the lease for it. Belongs to the
loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from dualpath.agent.active_load import ActiveLoad
from dualpath.agent.load_refresh import LoadRefresh, OnReady, OnRefused
from dualpath.agent.load_routes import LoadRoutes
from dualpath.agent.load_window import LoadWindow
from dualpath.agent.mailbox import Mailbox
from dualpath.agent.slice_table import GRANT_CHUNKS_MAX, message_of
from dualpath.proto.v1 import common_pb2
from dualpath.transfer.dispatcher import Dispatcher
from dualpath.transfer.errors import DualPathError, PathDown
from dualpath.transfer.grant import Grant
from dualpath.transfer.lane import Lane

log = logging.getLogger(__name__)

OnWindowProgress = Callable[[LoadWindow, common_pb2.GrantProgress], None]


class OutgoingGrants:
    """See the module docstring. `on_lost(path, reason)` follows a grant that could not be sent."""

    def __init__(
        self,
        loads: Mapping[str, ActiveLoad],
        dispatcher: Dispatcher,
        routes: LoadRoutes,
        refresh: LoadRefresh,
        arrivals: Mailbox[LoadWindow],
        loop: asyncio.AbstractEventLoop,
        *,
        on_ready: OnReady,
        on_refused: OnRefused,
        on_progress: OnWindowProgress,
        on_lost: Callable[[str, str], None],
    ) -> None:
        self._loads = loads
        self._dispatcher = dispatcher
        self._routes = routes
        self._refresh = refresh
        self._arrivals = arrivals
        self._loop = loop
        self._on_ready = on_ready
        self._on_refused = on_refused
        self._on_progress = on_progress
        self._on_lost = on_lost

    def send(self, grant: Grant) -> None:
        """Ask for what was granted, now or when there is a ticket for it."""
        load = self._loads.get(grant.load_id)
        if load is None:
            return
        if load.looking is not None and not load.looking.sent:
            grant, rest = load.looking.split(grant, load.progress.chunk_nbytes)
            load.held += [] if rest is None else [rest]
        elif not self._refresh.ready(load, grant.path):
            load.held.append(grant)
            self._refresh.delegate(load, (grant.path,), self._on_ready, self._on_refused)
            return
        for first in range(0, len(grant.chunks), GRANT_CHUNKS_MAX):
            try:
                self._grant(load, grant.path, grant.chunks[first : first + GRANT_CHUNKS_MAX])
            except PathDown:
                self._on_lost(grant.path, "path_lost")
                return
            except DualPathError as error:
                self._on_lost(grant.path, error.reason)
                log.warning("path %s: %s", grant.path, error)
                return

    def send_held(self, load: ActiveLoad) -> None:
        """Tickets or a new lease came: send what waited for them."""
        held, load.held = load.held, []
        inflight = self._dispatcher.inflight(load.spec.load_id)
        for grant in held:
            still = set(inflight.get(grant.path, ()))
            chunks = tuple(chunk for chunk in grant.chunks if chunk in still)
            if chunks:
                self.send(Grant(grant.load_id, grant.path, chunks, grant.nbytes))

    @staticmethod
    def take_held(load: ActiveLoad, paths: Collection[str]) -> list[Grant]:
        """What waits of a load for these paths; it waits no longer."""
        taken = [grant for grant in load.held if grant.path in paths]
        load.held = [grant for grant in load.held if grant.path not in paths]
        return taken

    def _grant(self, load: ActiveLoad, path: str, chunks: Sequence[int]) -> None:
        # A path that was lost since this grant was made has its chunks no more.
        chunks = self._dispatcher.inflight_on(load.spec.load_id, path, chunks)
        if not chunks:
            return
        window = self._window(load, path)
        armed = load.arm(chunks)
        now = self._loop.time()
        window.arm(armed, now)
        left_s = load.deadline_at - now
        message = common_pb2.ChunkGrant(
            window=window.descriptor.to_bytes(),
            lane=Lane.LOAD_PREFILL,
            deadline_ms=max(1, round(left_s * 1000)),
            block=armed.blocks,
            chunk=armed.chunks,
            tag=armed.tags,
            target=message_of(armed.targets),
        )
        on_progress = partial(self._on_progress, window)
        grant_id = self._routes.send(load, path, message, on_progress)
        window.grant_ids.add(grant_id)
        window.hungry = self._dispatcher.waiting(load.spec.load_id) > 0

    def _window(self, load: ActiveLoad, path: str) -> LoadWindow:
        window = load.windows.get(path)
        if window is None:
            network = self._routes.network(load, path)
            window = load.windows[path] = LoadWindow(
                load.spec.load_id, path, network, load.entry.region, load.span, self._arrivals
            )
        return window
