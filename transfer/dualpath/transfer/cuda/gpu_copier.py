"""Scatter and gather between page-locked host memory and paged memory of a GPU, with cupy.

A copy call costs 5-7 us, so one a 40 KiB slice would be the bottleneck. Slices go in batches
instead: the copy engine moves a batch between host memory and a staging buffer (slices at one
stride in host memory by one 2-D copy), and one small kernel moves it between staging and the
pages. The kernel only touches device memory and takes a few microseconds on a few multiprocessors;
a kernel that reads host memory itself is as fast but holds its multiprocessors for as long as
the PCIe transfer takes, which slows the model down. It is the fallback (`MAPPED`) for slices that
lie scattered in host memory too. Slices of megabytes are copied one by one (`SINGLE`).

Not thread-safe: one copier a thread. Knows nothing of blocks.
"""

from __future__ import annotations

import enum
import os
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from dualpath.transfer.cuda.device_memory import DeviceMemory, check_pinned
from dualpath.transfer.cuda.slice_copier import HostBytes
from dualpath.transfer.cuda.slice_table import SliceTable
from dualpath.transfer.errors import InvalidRequest, Unavailable

_THREADS = 512
_PART_BYTES = 16 << 10
"""What one block of threads copies at a time."""
_SINGLE_BYTES_MIN = 2 << 20
_RUN_BYTES_MIN = 128 << 10
"""Shorter runs in host memory than this, on average, cost the copy engine too many calls."""
_CALLS_MAX = 64
"""Most calls under way; the next one waits for the first of them."""
_WAIT_S_MAX = 60.0
_TO_DEVICE, _TO_HOST = 1, 2

_SOURCE = r"""
template <typename V> __device__ void copy(const char *from, const long long *sources, char *to,
        const long long *targets, long long nbytes, int slices, int parts) {
    long long vectors = nbytes / sizeof(V), per = (vectors + parts - 1) / parts;
    for (long long work = blockIdx.x; work < (long long)slices * parts; work += gridDim.x) {
        int slice = work / parts;
        long long at = (work % parts) * per, end = min(at + per, vectors);
        const V *s = (const V *)(from + (sources ? sources[slice] : slice * nbytes));
        V *t = (V *)(to + (targets ? targets[slice] : slice * nbytes));
        long long step = blockDim.x;
        for (at += threadIdx.x; at + 3 * step < end; at += 4 * step) {
            V a = s[at], b = s[at + step], c = s[at + 2 * step], d = s[at + 3 * step];
            t[at] = a; t[at + step] = b; t[at + 2 * step] = c; t[at + 3 * step] = d;
        }
        for (; at < end; at += step) t[at] = s[at];
    }
}
#define KERNEL(V, name) extern "C" __global__ void name(const char *from, \
        const long long *sources, char *to, const long long *targets, long long nbytes, \
        int slices, int parts) { copy<V>(from, sources, to, targets, nbytes, slices, parts); }
KERNEL(uint4, copy_slices_16)
KERNEL(unsigned int, copy_slices_4)
KERNEL(char, copy_slices_1)
"""


class Method(enum.Enum):
    """How a table was copied; see the module docstring."""

    STAGED = "staged"
    MAPPED = "mapped"
    SINGLE = "single"


class EventCompletion:
    """See slice_copier.Completion. Holds what the copies use until they are over."""

    def __init__(self, cuda: Any, event: Any, held: object) -> None:
        self._cuda = cuda
        self._event = event
        self._held = held

    def done(self) -> bool:
        """See Completion."""
        if self._event.done:
            self._held = None
            return True
        return False

    def wait(self, deadline_s: float) -> bool:
        """See Completion. Gives the processor away while it waits."""
        end = time.monotonic() + deadline_s
        while not self.done():
            if time.monotonic() >= end:
                return False
            os.sched_yield()
        return True

    def order_before(self, stream: int) -> None:
        """See Completion."""
        self._cuda.ExternalStream(stream).wait_event(self._event)


@dataclass(slots=True)
class _Slot:
    """A staging buffer and the event after which it may be filled again."""

    buffer: Any
    free: Any


class GpuCopier:
    """See the module docstring. `blocks` is how many multiprocessors a copying kernel may take
    at most. Raises Unavailable (`no_gpu`) where there is no CUDA device or no cupy."""

    def __init__(
        self, device: int = 0, *, staging_bytes: int = 16 << 20, slots: int = 3, blocks: int = 8
    ) -> None:
        try:
            import cupy  # noqa: PLC0415 - the extra `cuda`

            count = cupy.cuda.runtime.getDeviceCount()
        except Exception as error:
            # ImportError without cupy, CUDARuntimeError without a driver or a device.
            raise Unavailable(f"no GPU can be used: {error}", reason="no_gpu") from error
        if not 0 <= device < count:
            raise InvalidRequest(f"device {device} does not exist; there are {count}")
        if staging_bytes < 1 << 20 or slots < 2 or blocks < 1:
            raise InvalidRequest(
                f"staging_bytes {staging_bytes} (least 1 MiB), slots {slots} (least 2), "
                f"blocks {blocks} (least 1)"
            )
        self._cupy = cupy
        self._device = cupy.cuda.Device(device)
        self._blocks = blocks
        self._staging_bytes = staging_bytes
        self._calls: deque[EventCompletion] = deque()
        self._next = 0
        self.method = Method.STAGED
        """Of the last call."""
        with self._device:
            module = cupy.RawModule(code=_SOURCE, options=("-std=c++14",))
            self._kernels = {
                width: module.get_function(f"copy_slices_{width}") for width in (16, 4, 1)
            }
            self._engine = cupy.cuda.Stream(non_blocking=True)
            self._kernel = cupy.cuda.Stream(non_blocking=True)
            self._slots = [
                _Slot(cupy.cuda.alloc(staging_bytes), self._event()) for _ in range(slots)
            ]
        name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
        self.description = (
            f"{name}, copy engine and kernel through {staging_bytes} bytes of staging"
        )

    def _event(self) -> Any:
        return self._cupy.cuda.Event(block=False, disable_timing=True)

    def order_after(self, stream: int) -> None:
        """Copies queued from now on start only after what is queued on this CUDA stream now:
        whoever still reads the pages is done."""
        with self._device:
            event = self._event()
            event.record(self._cupy.cuda.ExternalStream(stream))
            self._engine.wait_event(event)
            self._kernel.wait_event(event)

    def scatter(self, host: HostBytes, device: DeviceMemory, slices: SliceTable) -> EventCompletion:
        """See SliceCopier."""
        return self._copy(host, device, slices, to_device=True)

    def gather(self, device: DeviceMemory, host: HostBytes, slices: SliceTable) -> EventCompletion:
        """See SliceCopier."""
        if not host.flags.writeable:
            raise InvalidRequest("the host memory is read-only: nothing can be gathered into it")
        return self._copy(host, device, slices, to_device=False)

    def _copy(
        self, host: HostBytes, device: DeviceMemory, slices: SliceTable, *, to_device: bool
    ) -> EventCompletion:
        slices.check_inside(host.nbytes, device.nbytes)
        check_pinned(host)
        while len(self._calls) >= _CALLS_MAX:
            if not self._calls.popleft().wait(_WAIT_S_MAX):
                raise Unavailable(
                    f"a GPU copy did not end within {_WAIT_S_MAX} s", reason="stalled"
                )
        with self._device:
            if slices.nbytes >= min(_SINGLE_BYTES_MIN, self._staging_bytes):
                self.method = Method.SINGLE
                self._singly(host, device, slices, to_device=to_device)
                last = self._engine
                held: object = (host, device)
            else:
                slices = slices.by_host()
                last, held = self._in_batches(host, device, slices, to_device=to_device)
            event = self._event()
            event.record(last)
        completion = EventCompletion(self._cupy.cuda, event, held)
        self._calls.append(completion)
        return completion

    def _singly(
        self, host: HostBytes, device: DeviceMemory, slices: SliceTable, *, to_device: bool
    ) -> None:
        copy, stream = self._cupy.cuda.runtime.memcpyAsync, self._engine.ptr
        for at, to in zip(slices.host.tolist(), slices.device.tolist(), strict=True):
            near, far = host.ctypes.data + at, device.pointer + to
            if to_device:
                copy(far, near, slices.nbytes, _TO_DEVICE, stream)
            else:
                copy(near, far, slices.nbytes, _TO_HOST, stream)

    def _in_batches(
        self, host: HostBytes, device: DeviceMemory, slices: SliceTable, *, to_device: bool
    ) -> tuple[Any, object]:
        """Return the stream on which the copies end, and what they use."""
        table, pinned = self._upload(slices)
        count = len(slices.host)
        width = slices.vector_bytes(device.pointer)
        if slices.nbytes / slices.scatter_of_host() < _RUN_BYTES_MIN:
            self.method = Method.MAPPED
            width = _host_width(width, host, slices)
            ends = (host.ctypes.data, table.data.ptr), (device.pointer, table.data.ptr + 8 * count)
            source, target = ends if to_device else ends[::-1]
            self._launch(width, source, target, slices.nbytes, count)
            return self._kernel, (host, device, table, pinned)
        self.method = Method.STAGED
        per = self._staging_bytes // slices.nbytes
        for start in range(0, count, per):
            end = min(start + per, count)
            batch = (end - start, table.data.ptr + 8 * (count + start), width)
            runs = slices.host_runs(start, end)
            self._stage(host, device, slices.nbytes, runs, batch, to_device)
        return (self._kernel if to_device else self._engine), (host, device, table, pinned)

    def _upload(self, slices: SliceTable) -> tuple[Any, Any]:
        """Both columns, on the device before any kernel reads them."""
        count = len(slices.host)
        pinned = self._cupy.cuda.alloc_pinned_memory(16 * count)
        columns = np.frombuffer(pinned, np.int64, 2 * count)
        columns[:count], columns[count:] = slices.host, slices.device
        table = self._cupy.empty(2 * count, np.int64)
        self._cupy.cuda.runtime.memcpyAsync(
            table.data.ptr, columns.ctypes.data, 16 * count, _TO_DEVICE, self._kernel.ptr
        )
        return table, (pinned, columns)

    def _stage(
        self,
        host: HostBytes,
        device: DeviceMemory,
        nbytes: int,
        runs: list[Any],
        batch: tuple[int, int, int],
        to_device: bool,
    ) -> None:
        count, table, width = batch
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        first, second = (self._engine, self._kernel) if to_device else (self._kernel, self._engine)
        first.wait_event(slot.free)
        packed, pages = (slot.buffer.ptr, 0), (device.pointer, table)
        if to_device:
            self._engine_copies(host, slot, nbytes, runs, to_device=True)
        else:
            self._launch(width, pages, packed, nbytes, count)
        halfway = self._event()
        halfway.record(first)
        second.wait_event(halfway)
        if to_device:
            self._launch(width, packed, pages, nbytes, count)
        else:
            self._engine_copies(host, slot, nbytes, runs, to_device=False)
        slot.free.record(second)

    def _engine_copies(
        self, host: HostBytes, slot: _Slot, nbytes: int, runs: list[Any], *, to_device: bool
    ) -> None:
        runtime, stream = self._cupy.cuda.runtime, self._engine.ptr
        for run in runs:
            near, far = host.ctypes.data + run.offset, slot.buffer.ptr + run.packed
            if run.stride in (0, nbytes):
                if to_device:
                    runtime.memcpyAsync(far, near, run.count * nbytes, _TO_DEVICE, stream)
                else:
                    runtime.memcpyAsync(near, far, run.count * nbytes, _TO_HOST, stream)
            elif to_device:
                runtime.memcpy2DAsync(
                    far, nbytes, near, run.stride, nbytes, run.count, _TO_DEVICE, stream
                )
            else:
                runtime.memcpy2DAsync(
                    near, run.stride, far, nbytes, nbytes, run.count, _TO_HOST, stream
                )

    def _launch(
        self, width: int, source: tuple[int, int], target: tuple[int, int], nbytes: int, count: int
    ) -> None:
        """Copy slices; an offset table at 0 means that they are packed."""
        parts = max(1, nbytes // _PART_BYTES)
        arguments = (
            *map(np.uint64, source),
            *map(np.uint64, target),
            np.int64(nbytes),
            np.int32(count),
            np.int32(parts),
        )
        with self._kernel:
            self._kernels[width]((min(self._blocks, count * parts),), (_THREADS,), arguments)

    def close(self) -> None:
        """Wait for what is under way and give the staging buffers back."""
        with self._device:
            self._engine.synchronize()
            self._kernel.synchronize()
        self._calls.clear()
        self._slots.clear()


def _host_width(width: int, host: HostBytes, slices: SliceTable) -> int:
    odd = host.ctypes.data | int(np.bitwise_or.reduce(slices.host))
    while odd % width:
        width = 4 if width == 16 and odd % 4 == 0 else 1
    return width
