"""The region socket: each answer belongs to its request, and memory ends with its connection."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
from dualpath.agent.region_socket import RegionClient, RegionSocket
from dualpath.agent.regions import Regions
from dualpath.transfer.errors import InvalidRequest, Unavailable
from dualpath.transfer.region import Region

WAIT_S = 20.0
Body = Callable[[Regions, str], Awaitable[None]]


def run(tmp_path: Path, body: Body) -> None:
    async def main() -> None:
        regions = Regions()
        path = str(tmp_path / "agent.regions")
        sockets = RegionSocket(path, regions, asyncio.get_running_loop())
        sockets.start()
        try:
            await asyncio.wait_for(body(regions, path), WAIT_S)
        finally:
            await sockets.close()
        assert not Path(path).exists()

    asyncio.run(main())


def test_threads_that_share_a_connection_get_their_own_handles(tmp_path: Path) -> None:
    async def body(regions: Regions, path: str) -> None:
        client = await asyncio.to_thread(RegionClient, path)

        def work(number: int) -> list[tuple[int, int]]:
            made = []
            for index in range(20):
                region = Region.memfd("test", 4096 * (1 + number * 20 + index))
                made.append((client.register(region, behind_compute_link=False), region.nbytes))
                region.close()
            return made

        everything = await asyncio.gather(*(asyncio.to_thread(work, n) for n in range(6)))
        for made in everything:
            for handle, nbytes in made:
                assert regions.get(handle).region.nbytes == nbytes
        client.close()

    run(tmp_path, body)


def test_closing_the_connection_drops_its_memory_and_tells_its_users(tmp_path: Path) -> None:
    async def body(regions: Regions, path: str) -> None:
        client = await asyncio.to_thread(RegionClient, path)
        other = await asyncio.to_thread(RegionClient, path)
        region = Region.memfd("test", 8192)
        mine = await asyncio.to_thread(client.register, region, behind_compute_link=True)
        theirs = await asyncio.to_thread(other.register, region, behind_compute_link=False)
        assert regions.get(mine).behind_compute_link
        gone = asyncio.Event()
        regions.get(mine).on_gone["test"] = gone.set
        regions.get(mine).region.view[:5] = b"hello"
        assert bytes(region.view[:5]) == b"hello"
        with pytest.raises(InvalidRequest, match="no such region of this connection"):
            await asyncio.to_thread(client._ask, _drop_request(theirs), [])
        client.close()
        await gone.wait()
        with pytest.raises(InvalidRequest, match="unknown region handle"):
            regions.get(mine)
        assert regions.get(theirs).handle == theirs
        other.close()

    run(tmp_path, body)


def _drop_request(handle: int) -> bytes:
    from dualpath.agent import region_socket

    return region_socket._REQUEST.pack(region_socket.MAGIC, region_socket.Operation.DROP, 0, handle)


def test_only_our_user_may_open_the_socket(tmp_path: Path) -> None:
    async def body(regions: Regions, path: str) -> None:
        del regions
        assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0

    run(tmp_path, body)


def test_an_absent_agent_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no agent takes memory"):
        RegionClient(str(tmp_path / "nobody"))


def test_engines_still_come_after_one_could_not_be_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accept, failures = loop.sock_accept, [errno.EMFILE, errno.ECONNABORTED]

        async def failing(listener: socket.socket) -> object:
            if failures:
                raise OSError(failures.pop(), "cannot accept")
            return await accept(listener)

        monkeypatch.setattr(loop, "sock_accept", failing)
        sockets = RegionSocket(str(tmp_path / "agent.regions"), Regions(), loop)
        sockets.start()
        try:
            client = await asyncio.to_thread(RegionClient, sockets.path)
            region = Region.memfd("test", 4096)
            register = partial(client.register, region, behind_compute_link=False)
            assert await asyncio.wait_for(asyncio.to_thread(register), WAIT_S)
            client.close()
        finally:
            await sockets.close()

    asyncio.run(main())
