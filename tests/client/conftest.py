"""Runs a test's body in a loop of its own, with a daemon."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dualpath.client.local_loopback import Served, serving, until
from dualpath.client.loopback_cluster import LoopbackCluster, loopback_cluster
from dualpath.kvstore.service.readiness import Phase

TEST_S_MAX = 50.0

Body = Callable[[LoopbackCluster], Awaitable[None]]


@pytest.fixture
def run_cluster(tmp_path: Path) -> Callable[..., None]:
    """Call it with the body and, if need be, settings of the daemon."""

    async def run(body: Body, settings: dict[str, Any]) -> None:
        async with loopback_cluster(tmp_path, **settings) as cluster:
            await body(cluster)

    async def watched(body: Body, settings: dict[str, Any]) -> None:
        task = asyncio.ensure_future(run(body, settings))
        done, _ = await asyncio.wait((task,), timeout=TEST_S_MAX)
        if not done:
            for other in asyncio.all_tasks():
                other.print_stack(limit=8)
            task.cancel()
        await task

    def run_body(body: Body, **settings: Any) -> None:
        asyncio.run(watched(body, settings))
        left = [t.name for t in threading.enumerate() if t.name.startswith("dualpath-")]
        assert not left, f"threads were left behind: {left}"

    return run_body


@pytest.fixture(scope="module")
def shared_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("shared")) as served:
        yield served


@pytest.fixture
def served(shared_local: Served) -> Iterator[Served]:
    """The shared store for one test: a namespace and clients of its own."""
    with contextlib.ExitStack() as clients:
        own = replace(shared_local, stack=clients)
        yield own
    until(lambda: len(own.socket) == 0)
    own.readiness.enter(Phase.SERVING)
