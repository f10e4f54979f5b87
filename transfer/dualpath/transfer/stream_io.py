"""Moving many bytes through a stream socket with one call: native where it could be built.

`receive(fd, parts, inside, nbytes, behind, interrupt, wait_ms, hashed)` fills `nbytes` bytes of
`parts`, of whose first `inside` bytes are there already, and then `behind` (may be empty) with
what happens to be there by then. Returns (bytes, bytes behind, whether the peer has ended,
digests): with `hashed` the xxh3-64 of each part that became complete, 0 for one shorter than
HASHED_BYTES_MIN.

`send(fd, parts, interrupt, wait_ms)` returns how many bytes it sent.

Both take a non-blocking socket and at most PARTS_MAX buffers, wait for the socket at most
`wait_ms` at a time, return early then or when `interrupt[0]` was set by another thread, within
`wait_ms`, and raise OSError, or ValueError for buffers that do not fit. The native ones let the
other threads run all the while.
"""

from __future__ import annotations

from dualpath.transfer import stream_io_twin
from dualpath.transfer.stream_io_twin import HASHED_BYTES_MIN, PARTS_MAX

try:
    from dualpath.transfer._native import receive, send
except ImportError:
    receive, send = stream_io_twin.receive, stream_io_twin.send

__all__ = ["HASHED_BYTES_MIN", "PARTS_MAX", "receive", "send"]
