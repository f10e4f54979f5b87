"""A call that is made again by another link if the first has not answered soon.

Owns the race of a few equal calls, and that none is left running. What is called must not mind
being done twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

HEDGE_S = 0.25
"""How long the first may take; an answer of a peer that is there takes some milliseconds."""

T = TypeVar("T")


async def hedged(
    calls: Sequence[Callable[[], Coroutine[Any, Any, T]]], pause_s: float = HEDGE_S
) -> T:
    """The first good answer. The second call begins after `pause_s` without one, and so on. Raises
    what the first call raised if it did so before that, or if no other does better."""
    assert calls
    tasks: list[asyncio.Task[T]] = []
    try:
        for call in calls:
            tasks.append(asyncio.create_task(call()))
            done, _ = await asyncio.wait(
                tasks,
                timeout=pause_s if len(tasks) < len(calls) else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if done and len(tasks) == 1:
                return tasks[0].result()
            if good := [task for task in done if task.exception() is None]:
                return good[0].result()
        left = {task for task in tasks if not task.done()}
        while left:
            done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            if good := [task for task in done if task.exception() is None]:
                return good[0].result()
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
