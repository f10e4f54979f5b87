"""Runs a test's body in a loop of its own, with a daemon."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from dualpath.client.loopback_cluster import LoopbackCluster, loopback_cluster

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
