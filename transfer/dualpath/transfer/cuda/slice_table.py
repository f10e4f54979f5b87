"""Which slices of host memory belong to which places of paged device memory.

Pure arithmetic on arrays. An engine keeps KV in pages, layer by layer; a Full Block arrives with
its layers one after another. A table pairs the two: slice i is `nbytes` bytes at `host[i]` of one
range and at `device[i]` of the other, in bytes from the start of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from dualpath.transfer.errors import InvalidRequest
from numpy.typing import NDArray

SLICES_MAX = 1 << 20
"""Most slices of one table."""


@dataclass(frozen=True, slots=True)
class HostRun:
    """`count` slices, the first at `offset` of host memory, each `stride` bytes after the one
    before; `packed` is where the first belongs when all are packed. A lone slice has stride 0."""

    offset: int
    stride: int
    count: int
    packed: int


@dataclass(frozen=True, slots=True)
class SliceTable:
    """See the module docstring. Raises InvalidRequest on columns that do not fit together."""

    host: NDArray[np.int64]
    device: NDArray[np.int64]
    nbytes: int

    def __post_init__(self) -> None:
        if self.host.shape != self.device.shape or self.host.ndim != 1:
            raise InvalidRequest(
                f"{self.host.shape} host offsets and {self.device.shape} device offsets: one of "
                "each a slice is needed"
            )
        if not 1 <= len(self.host) <= SLICES_MAX:
            raise InvalidRequest(f"{len(self.host)} slices; a table has 1..{SLICES_MAX}: split it")
        if self.nbytes < 1:
            raise InvalidRequest(f"a slice must have at least 1 byte, not {self.nbytes}")

    @staticmethod
    def of_pages(
        layer_bases: Sequence[int],
        pages: Sequence[int],
        *,
        page_stride_bytes: int,
        layer_block_bytes: int,
        block_bases: Sequence[int],
    ) -> SliceTable:
        """Layer Blocks of Full Blocks against pages of an engine, layer after layer.

        Block b starts at `block_bases[b]` of host memory, its layers follow one another; its
        layer l belongs at `layer_bases[l] + pages[b] * page_stride_bytes` of device memory.
        """
        if len(pages) != len(block_bases):
            raise InvalidRequest(f"{len(pages)} pages for {len(block_bases)} blocks: one each")
        if page_stride_bytes < layer_block_bytes:
            raise InvalidRequest(
                f"pages {page_stride_bytes} bytes apart cannot hold {layer_block_bytes} bytes each"
            )
        layers = np.arange(len(layer_bases), dtype=np.int64)[:, None]
        host = np.asarray(block_bases, np.int64)[None, :] + layers * layer_block_bytes
        device = np.asarray(layer_bases, np.int64)[:, None] + np.asarray(pages, np.int64)[
            None, :
        ] * np.int64(page_stride_bytes)
        return SliceTable(host.ravel(), device.ravel(), layer_block_bytes)

    @property
    def total_bytes(self) -> int:
        """Bytes of all slices."""
        return len(self.host) * self.nbytes

    def check_inside(self, host_bytes: int, device_bytes: int) -> None:
        """Raises InvalidRequest if a slice leaves a range of that many bytes."""
        for name, offsets, size in (
            ("host", self.host, host_bytes),
            ("device", self.device, device_bytes),
        ):
            low, high = int(offsets.min()), int(offsets.max()) + self.nbytes
            if low < 0 or high > size:
                raise InvalidRequest(
                    f"slices cover [{low}, {high}) of {size} bytes of {name} memory"
                )

    def host_runs(self, start: int, end: int) -> list[HostRun]:
        """Slices [start, end), in table order, as runs that lie at one stride in host memory."""
        offsets = self.host[start:end]
        steps = np.diff(offsets)
        edges = np.flatnonzero(np.diff(steps)) + 1
        # Stretches of equal steps; a slice that ends one run does not start the next.
        stretches = zip([0, *edges.tolist()], [*edges.tolist(), len(steps)], strict=True)
        runs: list[HostRun] = []
        first = 0
        for at, until in stretches:
            if until <= first or at == until:
                continue
            stride = int(steps[at])
            if stride < self.nbytes:
                lone = range(max(at, first), until)
                runs += [self._run(start, index, 1, 0) for index in lone]
                first = until
                continue
            begin = max(at, first)
            runs.append(self._run(start, begin, until - begin + 1, stride))
            first = until + 1
        if first < len(offsets):
            runs.append(self._run(start, first, 1, 0))
        return runs

    def _run(self, start: int, first: int, count: int, stride: int) -> HostRun:
        return HostRun(int(self.host[start + first]), stride, count, first * self.nbytes)

    def scatter_of_host(self) -> float:
        """Stretches of equal steps in host memory a slice: near 0 in order, near 1 at random."""
        return float(np.count_nonzero(np.diff(self.host, 2)) + 1) / len(self.host)

    def by_host(self) -> SliceTable:
        """The same slices in the order of host memory, which makes runs as long as they get."""
        order = np.argsort(self.host, kind="stable")
        return SliceTable(self.host[order], self.device[order], self.nbytes)

    def vector_bytes(self, device_base: int) -> int:
        """The widest of 16, 4 and 1 bytes to which every device slice is aligned."""
        odd = self.nbytes | device_base | int(np.bitwise_or.reduce(self.device))
        return 16 if odd % 16 == 0 else 4 if odd % 4 == 0 else 1
