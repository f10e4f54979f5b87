"""What a hand-off is asked for, and what it came to: values of the prefill side.

Owns the limits of a request and their check, and the order in which its chunks go: chunk 0 of every
block, then chunk 1 of every block, ..., so that they are final in the order of the layers (paper,
"The idea": the KV goes to the decode side layer by layer).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass

from dualpath.agent.holdings import REQUEST_CHARS_MAX
from dualpath.agent.load_spec import check_deadline, check_hashes
from dualpath.agent.places import Places
from dualpath.kvstore.layout import KVLayout
from dualpath.transfer.errors import InvalidRequest

HAND_OFF_CHUNKS_MAX = 1 << 16
"""Most chunks of one hand-off."""


@dataclass(frozen=True, slots=True)
class HandOffSpec:
    """Give the blocks `hashes`, in `places` of region `region`, to the agent `decode_peer` for
    `request`. The last one may be a partial block under a name of its own. `deadline_s` is time
    left from now."""

    request: str
    decode_peer: str
    namespace_id: bytes
    hashes: tuple[bytes, ...]
    region: int
    places: Places
    deadline_s: float

    def __post_init__(self) -> None:
        check_request(self.request)
        check_hashes(self.hashes)
        check_distinct(self.hashes)
        if len(self.places.base_bytes) != len(self.hashes):
            raise InvalidRequest(
                f"{len(self.hashes)} hashes, but places of {len(self.places.base_bytes)} blocks"
            )
        check_deadline(self.deadline_s)


@dataclass(frozen=True, slots=True)
class HandOffResult:
    """How a hand-off ended: the decode side holds the leading `blocks` whole, all of them if
    `reason` is "". `sent_bytes` went there, `held_bytes` were there already. `detail` is for
    people."""

    blocks: int
    sent_bytes: int
    held_bytes: int
    reason: str = ""
    detail: str = ""
    elapsed_s: float = 0.0


class LayerGate:
    """How far the engine is: `layers` leading layers of all blocks are final. Belongs to a loop."""

    def __init__(self) -> None:
        self.layers = 0
        self.closed = False
        """No further layer will come."""
        self.aborted = False
        self.on_abort: Callable[[], None] = lambda: None
        self._changed = asyncio.Event()
        self._most = sys.maxsize

    def limit(self, layers: int) -> None:
        """There are so many layers. Raises InvalidRequest if more are done already."""
        self._most = layers
        self._check(self.layers - 1)

    def _check(self, layer: int) -> None:
        if layer >= self._most:
            raise InvalidRequest(f"layer {layer} is done, of layers 0 to {self._most - 1}")

    def done(self, layer: int) -> None:
        """Layers [0, layer] are final. Raises InvalidRequest."""
        if layer < 0:
            raise InvalidRequest(f"a layer has a number from 0 on, not {layer}")
        self._check(layer)
        self.layers = max(self.layers, layer + 1)
        self._changed.set()

    def close(self) -> None:
        """No further layer will come."""
        self.closed = True
        self._changed.set()

    def abort(self) -> None:
        """Nobody wants the hand-off any more."""
        self.aborted = True
        self.on_abort()
        self.close()

    async def more(self, than: int) -> None:
        """Wait until there are more layers, or no further one will come."""
        while self.layers <= than and not self.closed:
            self._changed.clear()
            await self._changed.wait()


def check_request(request: str) -> None:
    """Raise InvalidRequest unless it can be the name of a request."""
    if not 1 <= len(request) <= REQUEST_CHARS_MAX:
        raise InvalidRequest(
            f"a hand-off names its request in 1..{REQUEST_CHARS_MAX} characters, not {len(request)}"
        )


def check_distinct(hashes: tuple[bytes, ...]) -> None:
    """Raise InvalidRequest if two blocks have the same name."""
    if len(set(hashes)) != len(hashes):
        raise InvalidRequest("two blocks have the same hash; each has a name of its own")


def check_chunks(layout: KVLayout, blocks: int) -> None:
    """Raise InvalidRequest for more chunks than one hand-off may have."""
    if layout.chunk_count * blocks > HAND_OFF_CHUNKS_MAX:
        raise InvalidRequest(
            f"{blocks} blocks of {layout.chunk_count} chunks; a hand-off has at most "
            f"{HAND_OFF_CHUNKS_MAX} chunks: hand the prompt over in parts"
        )
