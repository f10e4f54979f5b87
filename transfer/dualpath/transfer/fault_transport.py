"""A transport over which things go wrong, on purpose and by a seed. For tests and demos.

Decorates any Transport and keeps the port's contract itself, as seen by the caller: each write
completes once, its source is free afterwards (copies are replayed, never the source). What the
peer sees is a bad network: see FaultPlan. Faults that need a copy are left out, and counted,
while `SCRATCH_BYTES_MAX` bytes of copies are in use.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from dualpath.transfer.errors import DualPathError, Overloaded, PeerLost
from dualpath.transfer.fault_plan import FaultDice, FaultPlan, Faults
from dualpath.transfer.outbox import check_write
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slice_copy import copy_slices
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import (
    Completion,
    OnArrival,
    OnBatchCompletion,
    OnCompletion,
    OnHashed,
    PeerTraffic,
    Transport,
    Write,
    WriteBatch,
    WriteStatus,
)
from dualpath.transfer.write_split import write_split

SCRATCH_BYTES_MAX = 256 << 20
HELD_MAX = 1 << 16
REPLAY_DEADLINE_S = 5.0
JOIN_S = 5.0

_log = logging.getLogger(__name__)

Action = Callable[[bool], None]
"""Called once, with True if the transport is closing instead of the time having come."""


@runtime_checkable
class TruncatingTransport(Protocol):
    """A transport that can cut a write short; all of ours can."""

    def write_truncated(
        self, peer: str, write: Write, nbytes: int, on_completion: OnCompletion
    ) -> None:
        """Send only `nbytes` bytes of `write`, then end the connection."""


class FaultTransport:
    """See the port's contract; faults befall what is written through this object."""

    def __init__(self, inner: Transport, plan: FaultPlan) -> None:
        self._inner = inner
        self._plan = plan
        self._dice = FaultDice(plan)
        self._changed = threading.Condition()  # guards what follows
        self._held: list[tuple[float, int, Action]] = []
        self._order = itertools.count()
        self._scratch_bytes = 0
        self._counts: Counter[str] = Counter()
        self._closed = False
        self._clock = threading.Thread(target=self._run, name="dualpath-faults", daemon=True)
        self._clock.start()

    # The port, unchanged.

    @property
    def name(self) -> str:
        """The name of the transport within."""
        return self._inner.name

    @property
    def address(self) -> str:
        """See Transport.address."""
        return self._inner.address

    def listen(self, address: str) -> str:
        """See Transport.listen."""
        return self._inner.listen(address)

    def invite(self, peer: str) -> bytes:
        """See Transport.invite."""
        return self._inner.invite(peer)

    def connect(self, peer: str, address: str, invitation: bytes, *, deadline_s: float) -> None:
        """See Transport.connect."""
        self._inner.connect(peer, address, invitation, deadline_s=deadline_s)

    def disconnect(self, peer: str) -> None:
        """See Transport.disconnect."""
        self._inner.disconnect(peer)

    def expose(
        self,
        region: Region,
        offset: int,
        nbytes: int,
        on_arrival: OnArrival,
        *,
        on_hashed: OnHashed | None = None,
    ) -> RegionDescriptor:
        """See Transport.expose."""
        return self._inner.expose(region, offset, nbytes, on_arrival, on_hashed=on_hashed)

    def arm(self, window: RegionDescriptor, targets: Sequence[tuple[int, Slices]]) -> None:
        """See Transport.arm."""
        self._inner.arm(window, targets)

    def arm_table(self, window: RegionDescriptor, first_tag: int, targets: SliceTable) -> None:
        """See Transport.arm_table."""
        self._inner.arm_table(window, first_tag, targets)

    def disarm(self, window: RegionDescriptor, tags: Collection[int]) -> frozenset[int]:
        """See Transport.disarm."""
        return self._inner.disarm(window, tags)

    def revoke(self, window: RegionDescriptor) -> None:
        """See Transport.revoke."""
        self._inner.revoke(window)

    def place(self, window: RegionDescriptor, tag: int, target: Slices, source: memoryview) -> str:
        """See Transport.place."""
        return self._inner.place(window, tag, target, source)

    def traffic(self) -> Sequence[PeerTraffic]:
        """See Transport.traffic; replays count."""
        return self._inner.traffic()

    def close(self) -> None:
        """See Transport.close; writes held back complete as CLOSED."""
        with self._changed:
            self._closed = True
            held, self._held = self._held, []
            self._changed.notify_all()
        for _, _, action in sorted(held):
            action(True)
        self._inner.close()
        if threading.current_thread() is not self._clock:
            self._clock.join(JOIN_S)

    # Writes.

    def write(self, peer: str, write: Write, on_completion: OnCompletion) -> None:
        """See Transport.write; a write that is held back may end as LOST for any reason."""
        if self._plan.is_null:
            self._inner.write(peer, write, on_completion)
            return
        check_write(write)
        with self._changed:
            faults = self._dice.draw(write.source_slices.nbytes)
        if faults.delay_s < 0:
            self._submit(peer, write, on_completion, faults)
            return
        if not any(each.connected for each in self.traffic() if each.peer == peer):
            raise PeerLost(f"{peer!r} is not connected")
        due = time.monotonic() + faults.delay_s

        def submit_late(closing: bool) -> None:
            ended = Completion(
                peer, write.tag, WriteStatus.CLOSED, write.source_slices.nbytes, "closed"
            )
            if not closing:
                late = replace(write, deadline_s=write.deadline_s - faults.delay_s)
                try:
                    self._submit(peer, late, on_completion, faults)
                except DualPathError as error:
                    ended = replace(ended, status=WriteStatus.LOST, detail=error.reason)
                else:
                    return
            _deliver(on_completion, ended)

        self._count("delay")
        self._hold(due, submit_late)

    def write_batch(self, peer: str, batch: WriteBatch, on_completion: OnBatchCompletion) -> None:
        """See Transport.write_batch; faults strike single writes of it."""
        if self._plan.is_null:
            self._inner.write_batch(peer, batch, on_completion)
        else:
            write_split(self, peer, batch, on_completion)

    def counts(self) -> Mapping[str, int]:
        """Faults injected by kind, `skipped` for want of scratch, and how replays ended, as
        `duplicate:refused` or `stale:done`."""
        with self._changed:
            return dict(self._counts)

    def settle(self, timeout_s: float) -> bool:
        """Wait until every fault of the writes so far has happened; False if time ran out."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._held and not self._scratch_bytes, timeout_s
            )

    def _submit(self, peer: str, write: Write, on_completion: OnCompletion, faults: Faults) -> None:
        copy = None
        if faults.flip_at is not None or faults.duplicate or faults.stale_s >= 0:
            copy = self._copy(write)
        on_end = on_completion
        if copy is not None:
            if faults.flip_at is not None:
                self._count("flip")
                copy.view[faults.flip_at] ^= 0x40
                write = replace(write, source=copy, source_slices=Slices.contiguous(0, copy.nbytes))
            on_end = self._ending(peer, write, on_completion, copy, faults)
        try:
            self._submit_inner(peer, write, on_end, faults)
        except BaseException:
            if copy is not None:
                self._free(copy)
            raise
        if faults.reset_s >= 0:
            self._count("reset")
            self._hold(
                time.monotonic() + faults.reset_s,
                lambda closing: None if closing else self._inner.disconnect(peer),
            )

    def _submit_inner(self, peer: str, write: Write, on_end: OnCompletion, faults: Faults) -> None:
        if faults.truncate_at is None:
            self._inner.write(peer, write, on_end)
            return
        self._count("truncate")
        if isinstance(self._inner, TruncatingTransport):
            self._inner.write_truncated(peer, write, faults.truncate_at, on_end)
        else:
            self._inner.write(peer, write, on_end)
            self._inner.disconnect(peer)

    def _ending(
        self, peer: str, write: Write, on_completion: OnCompletion, copy: Region, faults: Faults
    ) -> OnCompletion:
        """What follows the write's own completion: its replays out of `copy`, one by one."""
        slices = Slices.contiguous(0, copy.nbytes)
        replay = replace(write, source=copy, source_slices=slices, deadline_s=REPLAY_DEADLINE_S)

        def again(kind: str, then: Callable[[], None]) -> None:
            def on_end(completion: Completion) -> None:
                self._count(f"{kind}:{completion.status.value}")
                then()

            self._count(kind)
            try:
                self._inner.write(peer, replay, on_end)
            except DualPathError:
                self._count(f"{kind}:unsent")
                then()

        def free() -> None:
            self._free(copy)

        def stale() -> None:
            if faults.stale_s < 0:
                free()
                return
            self._hold(
                time.monotonic() + faults.stale_s,
                lambda closing: free() if closing else again("stale", free),
            )

        def on_end(completion: Completion) -> None:
            _deliver(on_completion, completion)
            if faults.duplicate:
                again("duplicate", stale)
            else:
                stale()

        return on_end

    # Copies.

    def _copy(self, write: Write) -> Region | None:
        nbytes = write.source_slices.nbytes
        with self._changed:
            if self._scratch_bytes + nbytes > SCRATCH_BYTES_MAX:
                self._counts["skipped"] += 1
                return None
            self._scratch_bytes += nbytes
        copy = Region.memfd("dualpath-fault", nbytes)
        slices = Slices.contiguous(0, nbytes)
        copy_slices(copy.view, slices, write.source.view, write.source_slices)
        return copy

    def _free(self, copy: Region) -> None:
        with self._changed:
            self._scratch_bytes -= copy.nbytes
            self._changed.notify_all()
        try:
            copy.close()
        except BufferError:
            _log.debug("a copy is still read; it goes with its last reader")

    # Time.

    def _count(self, what: str) -> None:
        with self._changed:
            self._counts[what] += 1

    def _hold(self, due: float, action: Action) -> None:
        with self._changed:
            if not self._closed:
                if len(self._held) >= HELD_MAX:
                    raise Overloaded(f"{HELD_MAX} faults wait for their time", retry_after_s=0.1)
                heapq.heappush(self._held, (due, next(self._order), action))
                self._changed.notify_all()
                return
        action(True)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                if not self._held or self._held[0][0] > now:
                    self._changed.wait(self._held[0][0] - now if self._held else None)
                    continue
                _, _, action = heapq.heappop(self._held)
                self._changed.notify_all()
            try:
                action(False)
            except Exception:  # noqa: BLE001 - one fault must not end all others
                _log.exception("a planned fault failed")


def _deliver(on_completion: OnCompletion, completion: Completion) -> None:
    try:
        on_completion(completion)
    except Exception:  # noqa: BLE001 - a callback of others
        _log.exception("on_completion of tag %d raised", completion.tag)
