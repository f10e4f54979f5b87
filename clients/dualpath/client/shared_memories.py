"""The memory that a session shares with its agent, also with one that was restarted.

Owns the connection to the agent's region socket and what was registered by it. An agent that comes
back knows no memory of its engines: `again` registers all of it anew, and the handles that engines
hold stay what they were. Blocking, each call within the deadline of the region socket; thread-safe.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from dualpath.agent.region_socket import RegionClient
from dualpath.transfer.region import Region


@dataclass(slots=True)
class _Shared:
    """`current` is its handle at the agent that runs now."""

    region: Region
    behind_compute_link: bool
    current: int


class SharedMemories:
    """See the module docstring."""

    def __init__(self, path: str) -> None:
        """`path`: of the region socket."""
        self._path = path
        # Memory is unmapped after `drop`: its descriptor must not be sent from then on.
        self._lock = threading.Lock()
        self._client: RegionClient | None = None
        self._shared: dict[int, _Shared] = {}

    def add(self, region: Region, *, behind_compute_link: bool) -> int:
        """Register memory; returns its handle. Raises InvalidRequest, Unavailable."""
        with self._lock:
            client = self._connected()
            handle = client.register(region, behind_compute_link=behind_compute_link)
            self._shared[handle] = _Shared(region, behind_compute_link, handle)
        return handle

    def current(self, handle: int) -> int:
        """Its handle at the agent that runs now; itself, if it is not ours."""
        shared = self._shared.get(handle)
        return handle if shared is None else shared.current

    def again(self, handle: int, current: int) -> bool:
        """Register everything anew if the agent that knew `handle` as `current` has gone. False if
        it has not, or if the memory is not ours. Raises InvalidRequest, Unavailable."""
        with self._lock:
            shared = self._shared.get(handle)
            if shared is None:
                return False
            self._connected()
            return shared.current != current

    def drop(self, handle: int) -> None:
        """Take memory back: it is fenced when this returns. Idempotent."""
        with self._lock:
            shared = self._shared.pop(handle, None)
            if shared is not None and self._client is not None:
                self._client.drop(shared.current)

    def close(self) -> None:
        """Take everything back. Idempotent."""
        with self._lock:
            self._shared.clear()
            if self._client is not None:
                self._client.close()
                self._client = None

    def _connected(self) -> RegionClient:
        """A connection to the agent that runs now, by which all of our memory is registered."""
        if self._client is not None and not self._client.lost:
            return self._client
        client = RegionClient(self._path)
        try:
            handles = {
                handle: client.register(
                    shared.region, behind_compute_link=shared.behind_compute_link
                )
                for handle, shared in self._shared.items()
            }
        except BaseException:
            client.close()
            raise
        for handle, current in handles.items():
            self._shared[handle].current = current
        if self._client is not None:
            self._client.close()
        self._client = client
        return client
