"""Whatever goes wrong on the way, the contract holds, and the bytes are right or refused."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from dualpath.transfer.conformance_scene import Recorder, pattern
from dualpath.transfer.errors import DualPathError, InvalidRequest
from dualpath.transfer.fault_plan import FaultDice, FaultPlan
from dualpath.transfer.fault_transport import FaultTransport
from dualpath.transfer.lane import Lane
from dualpath.transfer.memory_transport import MemoryHub, MemoryTransport
from dualpath.transfer.region import Region
from dualpath.transfer.shm_transport import ShmTransport
from dualpath.transfer.slices import Slices
from dualpath.transfer.tcp_transport import TcpTransport
from dualpath.transfer.transport import OnPeerLost, Transport, Write, WriteStatus
from hypothesis import given
from hypothesis import strategies as st

CHUNK = 96 << 10
CHUNKS = 24
LOAD_S_MAX = 30.0

MakeTwo = Callable[[OnPeerLost, OnPeerLost, str], tuple[Transport, Transport, str]]


def memory(w: OnPeerLost, r: OnPeerLost, folder: str) -> tuple[Transport, Transport, str]:
    hub = MemoryHub()
    return MemoryTransport("w", w, hub), MemoryTransport("r", r, hub), "w"


def tcp(w: OnPeerLost, r: OnPeerLost, folder: str) -> tuple[Transport, Transport, str]:
    return TcpTransport("w", w), TcpTransport("r", r), "127.0.0.1:0"


def shm(w: OnPeerLost, r: OnPeerLost, folder: str) -> tuple[Transport, Transport, str]:
    return ShmTransport("w", w), ShmTransport("r", r), str(Path(folder) / "s")


class Loader:
    """Loads `CHUNKS` chunks over a faulty transport until all have landed intact."""

    def __init__(self, make: MakeTwo, plan: FaultPlan, folder: str, stack: ExitStack) -> None:
        self.heard = Recorder()
        inner, self.reader, address = make(lambda *_: None, lambda *_: None, folder)
        self.writer = FaultTransport(inner, plan)
        stack.callback(self.reader.close)
        stack.callback(self.writer.close)
        self.writer.listen(address)
        self.source = Region.memfd("test", CHUNK * CHUNKS)
        self.source.view[:] = pattern(CHUNK * CHUNKS)
        self.target = Region.anonymous(CHUNK * CHUNKS)
        self.submitted = 0
        self.accepted = 0
        self.corrupt = 0

    def connect(self) -> None:
        self.reader.connect("w", self.writer.address, self.writer.invite("r"), deadline_s=10)

    def turn(self, wanted: set[int]) -> set[int]:
        """Ask once for each wanted chunk; return those that did not land intact."""
        arrived: dict[int, bool] = {}

        def on_arrival(arrival) -> bool:  # type: ignore[no-untyped-def]
            assert arrival.tag not in arrived, "a tag arrived twice"
            start = arrival.slices.start
            intact = (
                self.target.view[start : start + CHUNK] == self.source.view[start : start + CHUNK]
            )
            arrived[arrival.tag] = intact
            return intact

        window = self.reader.expose(self.target, 0, self.target.nbytes, on_arrival)
        self.reader.arm(window, [(chunk, _extent(chunk)) for chunk in wanted])
        for chunk in sorted(wanted):
            slices = _extent(chunk)
            write = Write(self.source, slices, window, slices, Lane.LOAD_PREFILL, chunk, 10.0)
            try:
                self.writer.write("r", write, self.heard.on_completion)
                self.submitted += 1
            except DualPathError:
                self._reconnect()
        self.heard.wait_completions(self.submitted)
        self.reader.revoke(window)
        frozen = bytes(self.target.view)
        # Otherwise a late reset would end the next turn as well.
        assert self.writer.settle(10), f"faults never ended: {self.writer.counts()}"
        self._reconnect()
        assert self.target.view == frozen, "bytes landed after revoke"
        self.corrupt += list(arrived.values()).count(False)
        return wanted - {chunk for chunk, intact in arrived.items() if intact}

    def _reconnect(self) -> None:
        if not any(peer.connected for peer in self.writer.traffic()):
            # A reset that was still under way may end it at once; the next turn tries again.
            with suppress(DualPathError):
                self.connect()


def _extent(chunk: int) -> Slices:
    return Slices.contiguous(chunk * CHUNK, CHUNK)


PLANS = {
    "delays": FaultPlan(seed=1, delay=0.5, delay_s_max=0.02),
    "resets": FaultPlan(seed=2, reset=0.2),
    "short writes": FaultPlan(seed=3, truncate=0.08),
    "duplicates": FaultPlan(seed=4, duplicate=0.5),
    "stale writes": FaultPlan(seed=5, stale=0.5, stale_s_max=0.02),
    "flipped bytes": FaultPlan(seed=6, flip=0.3),
    "everything": FaultPlan(
        seed=7, delay=0.2, reset=0.03, truncate=0.03, duplicate=0.2, stale=0.2, flip=0.1
    ),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("make", [memory, tcp, shm])
def test_a_load_completes_intact_through(make: MakeTwo, plan: str) -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        loader = Loader(make, PLANS[plan], folder, stack)
        loader.connect()
        wanted = set(range(CHUNKS))
        deadline = time.monotonic() + LOAD_S_MAX
        while wanted:
            # On a busy machine many resets come before anything has landed; not in all turns.
            late = time.monotonic() > deadline
            assert not late, f"{len(wanted)} chunks never came: {loader.writer.counts()}"
            wanted = loader.turn(wanted)
        assert loader.target.view == loader.source.view
        counts = loader.writer.counts()
        assert counts, "no fault happened"
        assert counts.get("stale:done", 0) == 0, "a stale write landed"
        assert counts.get("duplicate:done", 0) == 0, "a duplicate landed"
        assert loader.corrupt <= counts.get("flip", 0)
        if plan == "flipped bytes":
            assert loader.corrupt == counts["flip"]


def test_closing_completes_what_is_held_back() -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        plan = FaultPlan(seed=1, delay=1.0, delay_s_max=1000.0)
        loader = Loader(tcp, plan, folder, stack)
        loader.connect()
        slices = _extent(0)
        window = loader.reader.expose(loader.target, 0, CHUNK, lambda arrival: True)
        loader.reader.arm(window, [(1, slices)])
        write = Write(loader.source, slices, window, slices, Lane.SAVE, 1, 10.0)
        loader.writer.write("r", write, loader.heard.on_completion)
        loader.writer.close()
        assert loader.heard.wait_completions(1)[0].status is WriteStatus.CLOSED


@given(st.integers(), st.lists(st.integers(1, 1 << 26), max_size=50))
def test_the_same_seed_gives_the_same_faults(seed: int, sizes: list[int]) -> None:
    plan = FaultPlan(seed, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
    one, other = FaultDice(plan), FaultDice(plan)
    for nbytes in sizes:
        faults = one.draw(nbytes)
        assert faults == other.draw(nbytes)
        assert faults.flip_at is None or 0 <= faults.flip_at < nbytes
        assert faults.truncate_at is None or 0 <= faults.truncate_at < nbytes


def test_one_probability_does_not_move_the_other_dice() -> None:
    some, more = FaultDice(FaultPlan(9, flip=0.5)), FaultDice(FaultPlan(9, flip=0.5, reset=0.9))
    assert [some.draw(100).flip_at for _ in range(50)] == [
        more.draw(100).flip_at for _ in range(50)
    ]


@pytest.mark.parametrize("field", ["delay", "flip", "stale_s_max"])
@pytest.mark.parametrize("value", [-0.1, 1e400])
def test_impossible_plans_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=field):
        FaultPlan(seed=1, **{field: value})
