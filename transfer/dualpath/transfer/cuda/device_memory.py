"""Memory that a GPU copies to and from: device memory by its array interface, and host memory
that is page-locked.

`DeviceMemory` keeps whoever owns the memory alive; `HostPin` page-locks memory that exists
already (an arena, also one that is mapped read-only) for as long as it is open.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from dualpath.transfer.errors import InvalidRequest, Unavailable
from numpy.typing import NDArray

_PORTABLE = 0x01
_READ_ONLY = 0x08
_HOST_MEMORY = 1
"""cudaMemoryTypeHost: allocated or registered with CUDA."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """`nbytes` bytes of device memory at `pointer`; `owner` keeps them."""

    pointer: int
    nbytes: int
    owner: object

    @staticmethod
    def of(array: object) -> DeviceMemory:
        """The memory of an array of cupy, torch or whatever else has the CUDA array interface.

        Raises InvalidRequest if it has none, is read-only or is not contiguous.
        """
        interface: dict[str, Any] | None = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            raise InvalidRequest(f"{type(array).__name__} has no __cuda_array_interface__")
        pointer, read_only = interface["data"]
        item = int(np.dtype(interface["typestr"]).itemsize)
        shape = interface["shape"]
        if read_only:
            raise InvalidRequest("the device array is read-only")
        strides = interface.get("strides")
        if strides is not None and tuple(strides) != _packed_strides(shape, item):
            raise InvalidRequest(f"the device array is not contiguous: strides {strides}")
        return DeviceMemory(int(pointer), int(np.prod(shape, dtype=np.int64)) * item, array)


def _packed_strides(shape: tuple[int, ...], item: int) -> tuple[int, ...]:
    strides: list[int] = []
    step = item
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


class HostPin:
    """Host memory, page-locked for the GPU until `close`. A context manager.

    Raises Unavailable (`no_pin`) where CUDA refuses: too much memory, a limit on locked memory.
    """

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        import cupy  # noqa: PLC0415 - only where there is CUDA

        self._runtime = cupy.cuda.runtime
        self._memory: NDArray[np.uint8] | None = memory
        flags = _PORTABLE if memory.flags.writeable else _PORTABLE | _READ_ONLY
        try:
            self._runtime.hostRegister(memory.ctypes.data, memory.nbytes, flags)
        except self._runtime.CUDARuntimeError as error:
            raise Unavailable(
                f"{memory.nbytes} bytes of host memory cannot be page-locked: {error}",
                reason="no_pin",
            ) from error

    def close(self) -> None:
        """Unlock. No copy may be under way. Idempotent."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self._runtime.hostUnregister(memory.ctypes.data)

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Unlock."""
        self.close()


def check_pinned(memory: NDArray[np.uint8]) -> None:
    """Raises InvalidRequest unless CUDA knows both ends of the memory as page-locked."""
    import cupy  # noqa: PLC0415 - only where there is CUDA

    if not memory.flags.c_contiguous:
        raise InvalidRequest("the host memory is not contiguous")
    for address in (memory.ctypes.data, memory.ctypes.data + memory.nbytes - 1):
        attributes = cupy.cuda.runtime.pointerGetAttributes(address)
        if attributes.type != _HOST_MEMORY:
            raise InvalidRequest(
                "the host memory is not page-locked; hold a HostPin on it, or take it from "
                "cupy.cuda.alloc_pinned_memory"
            )
