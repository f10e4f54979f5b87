"""Copies of chunks that are fetched to try paths which were lost, and thrown away.

Owns, for each path on trial, the scratch memory, the window on it and the grant. Nothing of it
touches a load's memory or holds up its end: only its lease is kept until the copy is over. The
relay is told to give the copy up in half of the time after which the path counts as stalled, so
that one which answers, but cannot read, is told from one that is silent. Belongs to the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from dualpath.agent.active_load import ActiveLoad
from dualpath.agent.load_refresh import LoadRefresh, OnReady, OnRefused
from dualpath.agent.load_routes import LoadRoutes
from dualpath.agent.load_window import ArmedChunks, LoadWindow
from dualpath.agent.mailbox import Mailbox
from dualpath.agent.relay_job import REASON_OF_FAILURE
from dualpath.agent.slice_table import message_of
from dualpath.proto.v1 import common_pb2
from dualpath.transfer.dispatcher import Dispatcher
from dualpath.transfer.errors import DualPathError
from dualpath.transfer.grant import Grant
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import Region
from dualpath.transfer.slice_table import SliceTable

ANSWER_SHARE = 0.5
"""Part of a path's patience in which a copy has to come, or be reported as failed."""


@dataclass(slots=True, eq=False)
class _Trial:
    """One copy. `window` once it is asked for; `over` is awaited before the load's lease goes."""

    load: ActiveLoad
    chunk: int
    over: asyncio.Future[None]
    window: LoadWindow | None = None


class PathTrials:
    """See the module docstring. `on_failed(path, reason)`: the path is to be left again;
    `on_proven(path)`: it works."""

    def __init__(
        self,
        loads: Mapping[str, ActiveLoad],
        dispatcher: Dispatcher,
        routes: LoadRoutes,
        refresh: LoadRefresh,
        loop: asyncio.AbstractEventLoop,
        *,
        on_ready: OnReady,
        on_refused: OnRefused,
        on_failed: Callable[[str, str], None],
        on_proven: Callable[[str], None],
    ) -> None:
        self._loads = loads
        self._dispatcher = dispatcher
        self._routes = routes
        self._refresh = refresh
        self._loop = loop
        self._on_ready = on_ready
        self._on_refused = on_refused
        self._on_failed = on_failed
        self._on_proven = on_proven
        self._arrivals: Mailbox[LoadWindow] = Mailbox(loop, self._on_arrivals)
        self._trials: dict[str, _Trial] = {}
        self._scratch: dict[str, Region] = {}

    def __len__(self) -> int:
        return len(self._trials)

    def begin(self, grant: Grant) -> None:
        """Fetch a copy of a chunk by a path on trial."""
        self.end(grant.path)
        load = self._loads[grant.load_id]
        trial = _Trial(load, grant.chunks[0], self._loop.create_future())
        self._trials[grant.path] = trial
        load.reports.append(trial.over)
        self._send(grant.path, trial)

    def go_on(self, load: ActiveLoad) -> None:
        """Tickets or a new lease came."""
        for path, trial in tuple(self._trials.items()):
            if trial.load is load and trial.window is None:
                self._send(path, trial)

    def refused(self, load: ActiveLoad, paths: Collection[str], reason: str) -> None:
        """No ticket for these paths."""
        for path in paths:
            trial = self._trials.get(path)
            if trial is not None and trial.load is load and trial.window is None:
                self._on_failed(path, reason)

    def forget(self, load: ActiveLoad) -> None:
        """It has ended: what was not asked for yet is not asked for."""
        for path, trial in tuple(self._trials.items()):
            if trial.load is load and trial.window is None:
                self.end(path)
                self._dispatcher.untried(path, self._loop.time())

    def end(self, path: str) -> None:
        """Fence the copy that is on its way by this path, if there is one."""
        trial = self._trials.pop(path, None)
        if trial is None:
            return
        if trial.window is not None:
            trial.window.close()
            self._routes.cancel(trial.load, path, trial.window.grant_ids)
        if not trial.over.done():
            trial.over.set_result(None)

    def close(self) -> None:
        """End all."""
        for path in tuple(self._trials):
            self.end(path)
        for region in self._scratch.values():
            with contextlib.suppress(BufferError):  # somebody looks at it: it goes with him
                region.close()
        self._scratch.clear()

    def _send(self, path: str, trial: _Trial) -> None:
        load = trial.load
        if load.spec.load_id not in self._loads or not self._refresh.ready(load, path):
            self._refresh.delegate(load, (path,), self._on_ready, self._on_refused)
            return
        index, sizes = trial.chunk, load.progress.chunk_nbytes
        chunk, block = divmod(index, load.progress.blocks)
        targets = SliceTable.contiguous([0], [sizes[index]])
        armed = ArmedChunks(1, [index], [block], [chunk], targets, ())
        checksums = load.checksums_of(armed)
        armed = ArmedChunks(1, [index], [block], [chunk], targets, checksums)
        try:
            scratch = self._scratch_of(path, sizes[index])
            trial.window = window = LoadWindow(
                load.spec.load_id,
                path,
                self._routes.network(load, path),
                scratch,
                (0, sizes[index]),
                self._arrivals,
            )
            window.arm(armed, self._loop.time())
            answer_s = ANSWER_SHARE * self._dispatcher.patience_s(path)
            message = common_pb2.ChunkGrant(
                window=window.descriptor.to_bytes(),
                lane=Lane.LOAD_PREFILL,
                deadline_ms=max(1, round(answer_s * 1000)),
                block=armed.blocks,
                chunk=armed.chunks,
                tag=armed.tags,
                target=message_of(targets),
            )
            on_progress = partial(self._on_progress, trial)
            window.grant_ids.add(self._routes.send(load, path, message, on_progress, copy=True))
        except DualPathError as error:
            self._on_failed(path, error.reason)

    def _scratch_of(self, path: str, nbytes: int) -> Region:
        """Memory that no other window reaches: each path has its own, one copy at a time."""
        region = self._scratch.get(path)
        if region is None or region.nbytes < nbytes:
            region = self._scratch[path] = Region.anonymous(nbytes)
        return region

    # News.

    def _on_arrivals(self, windows: list[LoadWindow]) -> None:
        now = self._loop.time()
        for window in windows:
            trial = self._trials.get(window.path)
            landed = window.take_landed(now)
            if trial is None or trial.window is not window:
                continue
            if landed.corrupt:
                self._on_failed(window.path, "corrupt")
            elif landed.intact:
                self.end(window.path)
                self._dispatcher.tried(window.path, now)
                self._on_proven(window.path)

    def _on_progress(self, trial: _Trial, progress: common_pb2.GrantProgress) -> None:
        self._arrivals.drain()  # what landed before this message was sent
        window = trial.window
        if window is None or self._trials.get(window.path) is not trial:
            return
        if progress.done:
            window.grant_ids.discard(progress.grant_id)
        for failure in progress.failure:
            self._on_failed(window.path, REASON_OF_FAILURE.get(failure, "refused"))
            return
