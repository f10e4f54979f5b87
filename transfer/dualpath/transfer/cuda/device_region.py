"""GPU memory as a region that RDMA writes into, or from, without a copy in host memory.

The CUDA driver shares a range of it as a dmabuf, which the network card's driver registers. Never
run on hardware; whoever gets Unavailable (`no_dmabuf`) here or from the transport goes by host
memory and a SliceCopier.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable

from dualpath.transfer.cuda.device_memory import DeviceMemory
from dualpath.transfer.errors import Unavailable
from dualpath.transfer.region import DmaBuf, Region

_DMA_BUF_FD = 1
"""CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD"""

Share = Callable[[int, int], int]
"""The descriptor of a dmabuf over (pointer, bytes), both whole host pages. Raises Unavailable."""


def device_region(memory: DeviceMemory, share: Share | None = None) -> Region:
    """A region over `memory`, which it keeps alive; `share` is the CUDA driver's by default.

    Raises Unavailable (`no_dmabuf`) where the driver or the GPU shares no memory.
    """
    start = memory.pointer - memory.pointer % mmap.PAGESIZE
    end = memory.pointer + memory.nbytes
    end += -end % mmap.PAGESIZE
    fd = (share or _shared_by_driver)(start, end - start)
    try:
        return Region.of_device(DmaBuf(fd, memory.pointer - start), memory.nbytes, memory.owner)
    except BaseException:
        os.close(fd)
        raise


def _shared_by_driver(pointer: int, nbytes: int) -> int:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        share = driver.cuMemGetHandleForAddressRange  # CUDA 11.7 and later
    except (OSError, AttributeError) as error:
        raise Unavailable(
            f"the CUDA driver shares no memory as dmabuf: {error}", reason="no_dmabuf"
        ) from error
    fd = ctypes.c_int(-1)
    code = share(
        ctypes.byref(fd),
        ctypes.c_ulonglong(pointer),
        ctypes.c_size_t(nbytes),
        ctypes.c_int(_DMA_BUF_FD),
        ctypes.c_ulonglong(0),
    )
    if code:
        raise Unavailable(
            f"the CUDA driver shares no dmabuf of {nbytes} bytes (CUresult {code}); it takes the "
            "open kernel modules, and memory of cudaMalloc or of whole mapped allocations",
            reason="no_dmabuf",
        )
    return fd.value
