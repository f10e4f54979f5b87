"""The first message of a stream, which says whose it is: waited for no longer than it needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from dualpath.transfer.errors import DeadlineExceeded

FIRST_MESSAGE_S_MAX = 10.0

T = TypeVar("T")


async def first_message(requests: AsyncIterator[T]) -> T | None:
    """It, or None if the stream ends without one. Raises DeadlineExceeded."""
    try:
        async with asyncio.timeout(FIRST_MESSAGE_S_MAX):
            return await anext(requests, None)
    except TimeoutError:
        raise DeadlineExceeded(
            f"no first message with the session within {FIRST_MESSAGE_S_MAX:.0f} s"
        ) from None
