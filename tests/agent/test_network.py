"""The loop's view of a transport: dialling beside everything else."""

from __future__ import annotations

import asyncio
import threading

from dualpath.agent.network import DIALS_MAX, Network
from dualpath.transfer.memory_transport import MemoryHub, MemoryTransport

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
