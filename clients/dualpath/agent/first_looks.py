"""Loads of one daemon whose look-up goes out with their first grant.

Owns when that may be, and what is done with the answer: the load goes on with what was found, or
is taken back as if nothing had been asked. Guarantees that a lease which comes too late is given
back. Belongs to the loop.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Protocol

from dualpath.agent.active_load import ActiveLoad
from dualpath.agent.daemon_link import DaemonLink, lookup_message
from dualpath.agent.first_look import FirstLook
from dualpath.agent.load_refresh import LoadRefresh
from dualpath.agent.load_routes import LoadRoutes
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.dispatcher import Dispatcher
from dualpath.transfer.errors import DualPathError
from dualpath.transfer.placement import DIRECT_PATH, PlacementPolicy

log = logging.getLogger(__name__)


class Runner(Protocol):
    """Who runs the loads: `DaemonLoads`."""

    daemon: DaemonLink
    loads: dict[str, ActiveLoad]
    dispatcher: Dispatcher

    def add(self, load: ActiveLoad, policy: PlacementPolicy) -> None:
        """Run a load that has begun. Raises InvalidRequest, Overloaded."""

    def remove(self, load: ActiveLoad) -> None:
        """Fence a load and forget it."""

    def cut(self, load: ActiveLoad, block: int, reason: str, detail: str) -> None:
        """The prefix ends before `block`."""

    def sendable(self, load: ActiveLoad) -> None:
        """Send what waited for a lease."""


class FirstLooks:
    """See the module docstring."""

    def __init__(
        self,
        runner: Runner,
        routes: LoadRoutes,
        refresh: LoadRefresh,
        loop: asyncio.AbstractEventLoop,
        lease_s: float,
    ) -> None:
        self._runner = runner
        self._routes = routes
        self._refresh = refresh
        self._loop = loop
        self._lease_s = lease_s

    def may_begin(self, load: ActiveLoad) -> bool:
        """Whether `begin` would send at once: only the direct path is there, and nobody waits."""
        spec = load.spec
        return (
            self._runner.daemon.looks_up
            and not load.entry.behind_compute_link
            and (not spec.paths or DIRECT_PATH in spec.paths)
            and not any(self._routes.up(name) for name in self._routes.names if name != DIRECT_PATH)
            and not any(self._runner.dispatcher.waiting(load_id) for load_id in self._runner.loads)
        )

    def begin(self, load: ActiveLoad, policy: PlacementPolicy) -> asyncio.Future[bool] | None:
        """Run a load that is not looked up yet. The answer says whether it runs, or has ended.
        False or None: it was taken back, go on with a new one. Raises as `DaemonLoads.add`."""
        spec = load.spec
        answered: asyncio.Future[bool] = self._loop.create_future()
        request = lookup_message(spec.namespace_id, spec.hashes, self._lease_s)
        look = FirstLook(request, partial(self._found, load), answered)
        load.assume(look)
        self._runner.add(load, policy)
        if look.sent:
            return answered
        self.withdraw(load)
        return None

    def withdraw(self, load: ActiveLoad) -> None:
        """Take a load back that waits for its first look-up; fenced when this returns."""
        if self._runner.loads.get(load.spec.load_id) is load:
            self._runner.remove(load)
            if load.looking is not None:
                load.looking.end(begun=False)

    def _found(self, load: ActiveLoad, hit: store_pb2.LookupResponse | None) -> None:
        look = load.looking
        waits = look is not None and self._runner.loads.get(load.spec.load_id) is load
        if hit is not None and waits:
            try:
                load.found(hit, self._loop.time())
            except DualPathError as error:
                log.warning("daemon %s: %s", self._runner.daemon.address, error)
        if look is None or load.looking is not None:
            self.withdraw(load)
            if hit is not None:  # nobody needs its lease any more
                load.lease_id = hit.lease_id
                self._refresh.release(load)
            return
        for window in load.windows.values():
            window.reveal(load.checksums_of)
        self._runner.cut(load, load.hit.hit_blocks, load.miss.value, load.detail)
        look.end(begun=True)
        self._runner.sendable(load)
