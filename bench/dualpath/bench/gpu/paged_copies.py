"""Paged scatter and gather on a GPU: checked against NumPy, then timed against the bus.

The limit is one large copy from page-locked memory by the copy engine, measured in the same
rounds. A loop of single copies and, where the `cuda-bindings` package is there, one
cudaMemcpyBatchAsync stand for what engines do without a kernel. Slow-down is how much longer a
queue of matrix products takes while slices are scattered.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from dualpath.transfer.cuda.device_memory import DeviceMemory, HostPin
from dualpath.transfer.cuda.gpu_copier import GpuCopier
from dualpath.transfer.cuda.slice_copier import NumpyCopier
from dualpath.transfer.cuda.slice_table import SliceTable
from dualpath.transfer.errors import Corrupt
from numpy.typing import NDArray

SLICE_BYTES = (40960, 41984, 262144, 4 << 20)
_MEMORY_BYTES = 1 << 30
_CHECKED_BYTES = 64 << 20
_SLICES_MAX = 1 << 14
_PRODUCT = 8192
_PRODUCTS = 60
_WAIT_S = 60.0
_TO_DEVICE, _TO_HOST = 1, 2
_GIB = float(1 << 30)


class PagedCopies:
    """One GPU, its copier and 1 GiB on both sides. `close` when done."""

    def __init__(self) -> None:
        self._copier = GpuCopier()
        import cupy  # noqa: PLC0415 - GpuCopier has said in its own words if it is missing

        self._cupy: Any = cupy
        self.description = self._copier.description
        self._host: NDArray[np.uint8] = np.empty(_MEMORY_BYTES, np.uint8)
        words = np.random.default_rng(1).integers(0, 1 << 63, _MEMORY_BYTES // 8, np.int64)
        self._host.view(np.int64)[:] = words
        self._pin = HostPin(self._host)
        self._array = cupy.zeros(_MEMORY_BYTES, np.uint8)
        self._device = DeviceMemory.of(self._array)
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._rng = np.random.default_rng(2)

    def close(self) -> None:
        """Give the memory back."""
        self._copier.close()
        self._pin.close()

    def check(self) -> int:
        """Scatter and gather against NumPy; return the bytes compared. Raises Corrupt."""
        compared = 0
        for nbytes in SLICE_BYTES:
            slices = self._slices(nbytes, _CHECKED_BYTES)
            self._array[:] = 0
            self._cupy.cuda.Device().synchronize()
            self._copier.scatter(self._host, self._device, slices).wait(_WAIT_S)
            expected = np.zeros(_MEMORY_BYTES, np.uint8)
            NumpyCopier().scatter(self._host, expected, slices)
            _same(self._cupy.asnumpy(self._array), expected, f"scatter of {nbytes}-byte slices")
            back = np.zeros(_MEMORY_BYTES, np.uint8)
            with HostPin(back):
                self._copier.gather(self._device, back, slices).wait(_WAIT_S)
            expected = np.zeros(_MEMORY_BYTES, np.uint8)
            for at in slices.host.tolist():
                expected[at : at + nbytes] = self._host[at : at + nbytes]
            _same(back, expected, f"gather of {nbytes}-byte slices")
            compared += 2 * _MEMORY_BYTES
        return compared

    def measure(self, rounds: int, progress: Callable[[str], None]) -> dict[str, object]:
        """GiB/s, medians of interleaved rounds, and ratios to the peak of the same rounds."""
        works: dict[str, Callable[[], int]] = {
            "peak_to_device": lambda: self._whole(_TO_DEVICE),
            "peak_to_host": lambda: self._whole(_TO_HOST),
        }
        for nbytes in SLICE_BYTES:
            slices = self._slices(nbytes, _MEMORY_BYTES)
            works[f"scatter_{nbytes}"] = self._ours(slices, to_device=True)
            works[f"gather_{nbytes}"] = self._ours(slices, to_device=False)
            works[f"single_copies_{nbytes}"] = self._single_copies(slices)
            batch = self._batch_copy(slices)
            if batch is not None:
                works[f"memcpy_batch_{nbytes}"] = batch
        times: dict[str, list[float]] = {name: [] for name in works}
        for number in range(-1, rounds):
            progress(f"copies: round {number + 1} of {rounds}")
            for name, work in works.items():
                rate = self._timed(work)
                if number >= 0:  # the first round warms up
                    times[name].append(rate)
        rates = {name: statistics.median(values) for name, values in times.items()}
        peaks = {"gather": rates["peak_to_host"]}
        return {
            name: {
                "gibs": rate / _GIB,
                "ratio_to_peak": rate / peaks.get(name.split("_")[0], rates["peak_to_device"]),
            }
            for name, rate in rates.items()
        }

    def slow_down(self, rounds: int, progress: Callable[[str], None]) -> dict[str, float]:
        """Time of a queue of matrix products while slices move, relative to alone."""
        cupy = self._cupy
        left = cupy.random.standard_normal((_PRODUCT, _PRODUCT), dtype=np.float32)
        left = left.astype(np.float16)
        out = cupy.empty_like(left)
        busy = cupy.cuda.Stream(non_blocking=True)
        slices = self._slices(41984, _MEMORY_BYTES)
        moves: dict[str, Callable[[], object] | None] = {
            "alone": None,
            "scatter": lambda: self._copier.scatter(self._host, self._device, slices),
            "gather": lambda: self._copier.gather(self._device, self._host, slices),
        }
        times: dict[str, list[float]] = {name: [] for name in moves}
        for number in range(-1, rounds):
            progress(f"slow-down: round {number + 1} of {rounds}")
            for name, move in moves.items():
                cupy.cuda.Device().synchronize()
                start, end = cupy.cuda.Event(), cupy.cuda.Event()
                with busy:
                    start.record(busy)
                    for _ in range(_PRODUCTS):
                        cupy.matmul(left, left, out=out)
                    end.record(busy)
                while move is not None and not end.done:
                    move()
                end.synchronize()
                if number >= 0:
                    times[name].append(cupy.cuda.get_elapsed_time(start, end))
        medians = {name: statistics.median(values) for name, values in times.items()}
        return {name: value / medians["alone"] for name, value in medians.items()}

    def _slices(self, nbytes: int, total: int) -> SliceTable:
        """Packed Full Blocks on the host, pages in random order on the device."""
        count = min(total // nbytes, _SLICES_MAX)
        pages = self._rng.permutation(_MEMORY_BYTES // nbytes)[:count]
        return SliceTable(
            np.arange(count, dtype=np.int64) * nbytes, pages.astype(np.int64) * nbytes, nbytes
        )

    def _timed(self, work: Callable[[], int]) -> float:
        """Bytes a second by the device's clock."""
        cupy = self._cupy
        cupy.cuda.Device().synchronize()
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(self._stream)
        self._copier.order_after(self._stream.ptr)
        moved = work()
        end.record(self._stream)
        end.synchronize()
        seconds = float(cupy.cuda.get_elapsed_time(start, end)) / 1e3
        return moved / seconds

    def _whole(self, kind: int) -> int:
        ends = (self._device.pointer, self._host.ctypes.data)
        target, source = ends if kind == _TO_DEVICE else ends[::-1]
        self._cupy.cuda.runtime.memcpyAsync(target, source, _MEMORY_BYTES, kind, self._stream.ptr)
        return _MEMORY_BYTES

    def _ours(self, slices: SliceTable, *, to_device: bool) -> Callable[[], int]:
        def work() -> int:
            if to_device:
                done = self._copier.scatter(self._host, self._device, slices)
            else:
                done = self._copier.gather(self._device, self._host, slices)
            done.order_before(self._stream.ptr)
            return slices.total_bytes

        return work

    def _single_copies(self, slices: SliceTable) -> Callable[[], int]:
        pairs = list(zip(slices.device.tolist(), slices.host.tolist(), strict=True))
        copy = self._cupy.cuda.runtime.memcpyAsync

        def work() -> int:
            device, host = self._device.pointer, self._host.ctypes.data
            for to, at in pairs:
                copy(device + to, host + at, slices.nbytes, _TO_DEVICE, self._stream.ptr)
            return slices.total_bytes

        return work

    def _batch_copy(self, slices: SliceTable) -> Callable[[], int] | None:
        try:
            from cuda.bindings import runtime  # noqa: PLC0415 - optional
        except ImportError:
            return None
        if not hasattr(runtime, "cudaMemcpyBatchAsync"):
            return None
        targets = (slices.device + self._device.pointer).tolist()
        sources = (slices.host + self._host.ctypes.data).tolist()
        sizes = [slices.nbytes] * len(sources)
        attributes = runtime.cudaMemcpyAttributes()
        order = runtime.cudaMemcpySrcAccessOrder
        attributes.srcAccessOrder = order.cudaMemcpySrcAccessOrderStream

        def work() -> int:
            result = runtime.cudaMemcpyBatchAsync(
                targets, sources, sizes, len(sizes), [attributes], [0], 1, self._stream.ptr
            )
            if int(result[0]) != 0:
                raise OSError(f"cudaMemcpyBatchAsync: {result[0]}")
            return slices.total_bytes

        return work


def _same(got: NDArray[np.uint8], expected: NDArray[np.uint8], what: str) -> None:
    if not np.array_equal(got, expected):
        first = int(np.flatnonzero(got != expected)[0])
        raise Corrupt(f"{what}: byte {first} is {got[first]}, not {expected[first]}")
