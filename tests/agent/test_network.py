"""The loop's view of a transport: dialling beside everything else."""

from __future__ import annotations

import asyncio
import threading

import pytest
from dualpath.agent.network import DIALS_MAX, Network
from dualpath.transfer.errors import DeadlineExceeded
from dualpath.transfer.memory_transport import MemoryHub, MemoryTransport
from dualpath.transfer.transport import OnPeerLost

WAIT_S = 20.0


class _Silent(MemoryTransport):
    """Whoever is dialled does not answer before `answered`."""

    answered: threading.Event

    def connect(self, peer: str, address: str, invitation: bytes, *, deadline_s: float) -> None:
        assert self.answered.wait(deadline_s)


def test_peers_that_do_not_answer_leave_the_loops_threads_to_others() -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        answered = threading.Event()

        def make(name: str, lost: object) -> _Silent:
            transport = _Silent(name, lambda *_: None, MemoryHub())
            transport.answered = answered
            return transport

        network = Network("n", make, loop)
        dials = [
            asyncio.create_task(network.connect(f"p{n}", "a", b"", deadline_s=4 * WAIT_S))
            for n in range(DIALS_MAX)
        ]
        await asyncio.sleep(0)  # each has begun
        try:
            # As hashing for a save does.
            assert await asyncio.wait_for(loop.run_in_executor(None, int, "7"), WAIT_S) == 7
        finally:
            answered.set()
            await asyncio.gather(*dials)
            await network.close()

    asyncio.run(body())


class _Late(MemoryTransport):
    """Dials heedless of their deadline, as a name that is looked up does."""

    go_on: threading.Event

    def connect(self, peer: str, address: str, invitation: bytes, *, deadline_s: float) -> None:
        assert self.go_on.wait(WAIT_S)
        super().connect(peer, address, invitation, deadline_s=deadline_s)


@pytest.mark.parametrize("given_up", [False, True])
def test_a_connection_that_comes_too_late_is_dropped(given_up: bool) -> None:
    async def body() -> None:
        loop, hub, go_on = asyncio.get_running_loop(), MemoryHub(), threading.Event()
        server = MemoryTransport("server", lambda *_: None, hub)
        address = server.listen("a")

        def make(name: str, lost: OnPeerLost) -> _Late:
            transport = _Late(name, lost, hub)
            transport.go_on = go_on
            return transport

        network = Network("n", make, loop)
        lost = asyncio.Event()
        network.watch("p", lambda _: lost.set())
        try:
            dial = asyncio.create_task(
                network.connect("p", address, server.invite("n"), deadline_s=0.01)
            )
            if given_up:
                await asyncio.sleep(0)
                dial.cancel()
            with pytest.raises(asyncio.CancelledError if given_up else DeadlineExceeded):
                await dial
            go_on.set()
            await asyncio.wait_for(lost.wait(), WAIT_S)
            assert not any(each.connected for each in network.transport.traffic())
        finally:
            go_on.set()
            await network.close()
            server.close()

    asyncio.run(body())
