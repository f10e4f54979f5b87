"""Copying tables of slices between packed and paged memory: the port, and its twin in NumPy.

`scatter` moves slices from host memory to device memory, `gather` back. A call returns once the
copies are queued; host and device memory must stay until its `Completion` is done. Slices of one
table must not overlap in what is written. The GPU implementation is `gpu_copier.GpuCopier`;
`NumpyCopier`, whose "device" memory is an array in this process, is the reference that it is
tested against and what runs where there is no GPU.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
from dualpath.transfer.cuda.slice_table import SliceTable
from numpy.typing import NDArray

HostBytes = NDArray[np.uint8]
DeviceBytes_contra = TypeVar("DeviceBytes_contra", contravariant=True)


class Completion(Protocol):
    """The end of one call's copies."""

    def done(self) -> bool:
        """Whether every byte has arrived."""

    def wait(self, deadline_s: float) -> bool:
        """Wait at most so many seconds; whether every byte has arrived."""

    def order_before(self, stream: int) -> None:
        """What is queued on this CUDA stream (its handle) from now on starts only afterwards;
        does not block the caller."""


class SliceCopier(Protocol[DeviceBytes_contra]):
    """See the module docstring. Raises InvalidRequest on slices outside of the memory."""

    @property
    def description(self) -> str:
        """What copies: the device, or NumPy and why."""

    def scatter(
        self, host: HostBytes, device: DeviceBytes_contra, slices: SliceTable
    ) -> Completion:
        """Host to device."""

    def gather(self, device: DeviceBytes_contra, host: HostBytes, slices: SliceTable) -> Completion:
        """Device to host."""


class Done:
    """Copies that were over before the call returned."""

    def done(self) -> bool:
        """See Completion."""
        return True

    def wait(self, deadline_s: float) -> bool:
        """See Completion."""
        return True

    def order_before(self, stream: int) -> None:
        """See Completion."""


class NumpyCopier:
    """See the module docstring."""

    description = "numpy, in host memory"

    def scatter(self, host: HostBytes, device: HostBytes, slices: SliceTable) -> Completion:
        """See SliceCopier."""
        slices.check_inside(host.nbytes, device.nbytes)
        _copy(host, slices.host, device, slices.device, slices.nbytes)
        return Done()

    def gather(self, device: HostBytes, host: HostBytes, slices: SliceTable) -> Completion:
        """See SliceCopier."""
        slices.check_inside(host.nbytes, device.nbytes)
        _copy(device, slices.device, host, slices.host, slices.nbytes)
        return Done()


def _copy(
    source: HostBytes,
    sources: NDArray[np.int64],
    target: HostBytes,
    targets: NDArray[np.int64],
    nbytes: int,
) -> None:
    for at, to in zip(sources.tolist(), targets.tolist(), strict=True):
        target[to : to + nbytes] = source[at : at + nbytes]
