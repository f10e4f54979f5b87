"""Grants that were sent on one stream and have not ended.

Owns their ids and who hears of their progress. A grant ends by progress with `done`, by being
forgotten, or with its stream; nothing is heard of it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from dualpath.proto.v1 import common_pb2

OnProgress: TypeAlias = Callable[[common_pb2.GrantProgress], None]


class OpenGrants:
    """See the module docstring. Belongs to the loop."""

    def __init__(self) -> None:
        self.next_id = 1
        """Of the grant that is `add`ed next; never used twice."""
        self._callbacks: dict[int, OnProgress] = {}

    def add(self, on_progress: OnProgress) -> int:
        """The grant `next_id` was sent; returns its id."""
        grant_id = self.next_id
        self.next_id += 1
        self._callbacks[grant_id] = on_progress
        return grant_id

    def tell(self, progress: common_pb2.GrantProgress) -> None:
        """Hand news to whoever made the grant; of unknown ones it is dropped."""
        callback = self._callbacks.get(progress.grant_id)
        if callback is None:
            return
        if progress.done:
            del self._callbacks[progress.grant_id]
        callback(progress)

    def forget(self, grant_ids: Iterable[int]) -> list[int]:
        """Hear no more of these; returns those that were open."""
        return [grant_id for grant_id in grant_ids if self._callbacks.pop(grant_id, None)]

    def clear(self) -> None:
        """The stream has ended, and all grants with it."""
        self._callbacks.clear()
