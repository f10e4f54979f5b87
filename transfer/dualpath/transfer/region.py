"""Memory that a transport may read from or write into.

`Region` is the local handle and never leaves the process. `RegionDescriptor` is what a peer may
hold: a *window* on a region, valid for one generation and until it is revoked; it travels as
bytes, so that the library needs no RPC. A region created here is closed by its creator, after
the transports that expose it have revoked its windows.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest, Unavailable

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20

F_SEAL_SEAL = 0x0001
F_SEAL_SHRINK = 0x0002
F_SEAL_GROW = 0x0004
F_SEAL_FUTURE_WRITE = 0x0010
_MADV_POPULATE_READ = 22  # of Linux 5.14; Python 3.11 does not name them
_MADV_POPULATE_WRITE = 23


@dataclass(frozen=True, slots=True)
class DmaBuf:
    """Memory as a device's driver shares it with others: from byte `offset` of `fd` on."""

    fd: int
    offset: int


class Region:
    """A contiguous range of this process's memory, or of a device's.

    `view` is its bytes, writable unless `read_only`. `fd` is the memfd behind it, if any; only
    regions with an `fd` can be the source of the `shm` transport. `serial` tells the regions of
    this process apart, also after one was closed. With a `dmabuf` network cards reach the memory
    by that; if it is not `on_host`, then only by that, and `view` is empty.
    """

    __slots__ = (
        "__weakref__",
        "_mmap",
        "before_close",
        "dmabuf",
        "fd",
        "nbytes",
        "on_host",
        "owner",
        "read_only",
        "serial",
        "view",
    )

    _serials = itertools.count(1)

    def __init__(self, view: memoryview, *, fd: int = -1, mapping: mmap.mmap | None = None) -> None:
        self.view = view
        self.nbytes = view.nbytes
        self.read_only = view.readonly
        self.serial = next(Region._serials)
        self.fd = fd
        self.dmabuf: DmaBuf | None = None
        self.owner: object = None
        self.on_host = True
        """Whether the processor reaches the memory."""
        self._mmap = mapping
        self.before_close: list[Callable[[int], None]] = []
        """Called with `serial`: whoever has registered the memory somewhere lets it go."""

    @staticmethod
    def anonymous(nbytes: int) -> Region:
        """Private page-aligned memory, on huge pages where the kernel grants them.

        Raises Unavailable (`no_memory`) where the machine has not that much.
        """
        mapping = _mapped(-1, _checked(nbytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return Region(memoryview(mapping), mapping=mapping)

    @staticmethod
    def memfd(name: str, nbytes: int, *, reserved_huge_pages: bool = False) -> Region:
        """Shareable memory, sealed against shrinking and growing before anyone else sees it; from
        the kernel's pool of huge pages if asked, `nbytes` being a multiple of HUGE_PAGE_BYTES.

        Raises Unavailable (`no_memory`) as `anonymous` does; OSError where there is no memfd.
        """
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if reserved_huge_pages:
            if nbytes % HUGE_PAGE_BYTES:
                raise InvalidRequest(f"{nbytes} bytes are not whole pages of {HUGE_PAGE_BYTES}")
            flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
        fd = os.memfd_create(name, flags)
        try:
            os.ftruncate(fd, _checked(nbytes))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
            mapping = _mapped(fd, nbytes, mmap.MAP_SHARED)
        except BaseException:
            os.close(fd)
            raise
        return Region(memoryview(mapping), fd=fd, mapping=mapping)

    @staticmethod
    def of(buffer: bytearray | memoryview | mmap.mmap) -> Region:
        """A region over memory that the caller keeps alive."""
        return Region(memoryview(buffer).cast("B"))

    @staticmethod
    def of_device(dmabuf: DmaBuf, nbytes: int, owner: object = None) -> Region:
        """Memory that only network cards reach; keeps `owner`, and takes over `dmabuf.fd`."""
        region = Region(memoryview(bytearray()))
        region.nbytes = _checked(nbytes)
        region.dmabuf, region.owner, region.on_host = dmabuf, owner, False
        return region

    @staticmethod
    def received(fd: int, nbytes: int, *, writable: bool) -> Region:
        """Map a peer's memfd; takes ownership of `fd`, also when it raises.

        Raises InvalidRequest if it is not a memfd sealed against shrinking (a peer could
        truncate it under us: SIGBUS) or smaller than `nbytes`.
        """
        try:
            try:
                seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            except OSError as error:
                raise InvalidRequest(f"shared memory must be a memfd: {error}") from error
            if not seals & F_SEAL_SHRINK:
                raise InvalidRequest(
                    f"shared memory is not sealed against shrinking (seals {seals:#x}); "
                    "add F_SEAL_SHRINK before sending it",
                    reason="unsealed",
                )
            size = os.fstat(fd).st_size
            if nbytes <= 0 or size < nbytes:
                raise InvalidRequest(f"shared memory has {size} bytes, {nbytes} were announced")
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=access)
        except BaseException:
            os.close(fd)
            raise
        return Region(memoryview(mapping), fd=fd, mapping=mapping)

    def forbid_new_writers(self) -> None:
        """Seal the memfd so that mappings made from now on are read-only (FUTURE_WRITE)."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)

    def ask_huge_pages(self) -> None:
        """Use huge pages where the kernel grants them on demand; harmless elsewhere."""
        if self._mmap is not None and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                self._mmap.madvise(mmap.MADV_HUGEPAGE)

    def prefault(self, start: int = 0, nbytes: int = 0) -> None:
        """Have every page of a range now (0 bytes: up to the end), so that no transfer pays for it.
        `start` lies on a page. Raises OSError if memory runs out."""
        nbytes = nbytes or self.nbytes - start
        if self._mmap is not None:
            try:
                self._mmap.madvise(_MADV_POPULATE_WRITE, start, nbytes)
            except OSError as error:
                if error.errno != errno.EINVAL:  # which kernels before 5.14 say
                    raise
            else:
                return
        for offset in range(start, start + nbytes, PAGE_BYTES):
            self.view[offset] = self.view[offset]

    def map_pages(self) -> None:
        """Map all pages that are there already, for reading, so that no access faults; harmless
        where the kernel cannot."""
        if self._mmap is not None:
            with contextlib.suppress(OSError):
                self._mmap.madvise(_MADV_POPULATE_READ)

    def close(self) -> None:
        """Drop the mapping and the descriptor. Raises BufferError while views are held."""
        while self.before_close:
            self.before_close.pop()(self.serial)
        self.view.release()
        if self._mmap is not None:
            self._mmap.close()
            self._mmap = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.dmabuf is not None:
            os.close(self.dmabuf.fd)
            self.dmabuf = self.owner = None


def check_on_host(region: Region) -> None:
    """Raises InvalidRequest (`device_memory`) unless the processor reaches the memory."""
    if not region.on_host:
        raise InvalidRequest(
            "this is memory of a device, which only `rdma` reaches, and without digests: use a "
            "region in host memory and copy",
            reason="device_memory",
        )


def _checked(nbytes: int) -> int:
    if nbytes <= 0:
        raise InvalidRequest(f"a region needs at least one byte, not {nbytes}")
    return nbytes


def _mapped(fd: int, nbytes: int, flags: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, nbytes, flags=flags)
    except OSError as error:
        raise Unavailable(
            f"cannot get {nbytes} bytes of memory: {error.strerror}; ask for fewer, or free some",
            reason="no_memory",
        ) from error


_DESCRIPTOR = struct.Struct("<8sQQQI")
_MAGIC = b"dpwindw1"


@dataclass(frozen=True, slots=True)
class RegionDescriptor:
    """A window on a region of another process: what its holder may write into.

    `key` is random and unguessable (64 bits), as an rkey; `generation` rises each time the
    memory is exposed again; offsets in `Slices` count from the start of the *region*, and the
    bytes [offset, offset + nbytes) of it are within bounds.
    """

    key: int
    generation: int
    offset: int
    nbytes: int

    def to_bytes(self) -> bytes:
        """Fixed 36-byte form, little endian."""
        return _DESCRIPTOR.pack(_MAGIC, self.key, self.offset, self.nbytes, self.generation)

    @staticmethod
    def from_bytes(data: bytes) -> RegionDescriptor:
        """Inverse of `to_bytes`. Raises InvalidRequest on anything else."""
        if len(data) != _DESCRIPTOR.size:
            raise InvalidRequest(
                f"a region descriptor has {_DESCRIPTOR.size} bytes, not {len(data)}"
            )
        magic, key, offset, nbytes, generation = _DESCRIPTOR.unpack(data)
        if magic != _MAGIC:
            raise InvalidRequest(f"not a region descriptor of this version: {magic!r}")
        return RegionDescriptor(key, generation, offset, nbytes)
