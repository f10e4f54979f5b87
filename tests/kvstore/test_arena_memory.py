"""The arena's memory: large pages, one node, all there, and nobody else can write or truncate."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from dualpath.kvstore import arena_memory, numa
from dualpath.kvstore.arena_memory import ArenaMemory, open_arena_memory
from dualpath.kvstore.dram_tier import DramTier
from dualpath.transfer import huge_pages
from dualpath.transfer.errors import InvalidRequest, Unavailable
from dualpath.transfer.region import HUGE_PAGE_BYTES, Region

NBYTES = 3 * HUGE_PAGE_BYTES + 5
FALLOC_PUNCH_HOLE_KEEP_SIZE = 3
MADV_REMOVE = 9

MAPPED_BY_ANOTHER = """
import mmap, os, sys
path, nbytes = sys.argv[1], int(sys.argv[2])
fd = os.open(path, os.O_RDWR)
try:
    mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    sys.exit("mapped for writing")
except PermissionError:
    pass
mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
assert mapping[7] == 42
for call in (lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, 2 * nbytes),
             lambda: os.pwrite(fd, b"x", 0)):
    try:
        call()
        sys.exit("changed")
    except OSError:
        pass
"""


@pytest.fixture(params=[False, True], ids=["private", "shared"])
def memory(request: pytest.FixtureRequest) -> Iterator[ArenaMemory]:
    memory = open_arena_memory("test", NBYTES, shared=request.param)
    yield memory
    memory.region.close()


def resident_bytes(region: Region) -> int:
    """Bytes of the mapping that are in memory now."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = region.nbytes // mmap.PAGESIZE
    seen = (ctypes.c_ubyte * pages)()
    start = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(region.view)))
    assert libc.mincore(start, ctypes.c_size_t(region.nbytes), seen) == 0
    return sum(page & 1 for page in seen) * mmap.PAGESIZE


def test_all_of_it_is_there_at_once_in_whole_huge_pages(memory: ArenaMemory) -> None:
    assert memory.region.nbytes == 4 * HUGE_PAGE_BYTES
    assert resident_bytes(memory.region) == memory.region.nbytes


def test_what_was_got_is_told_and_what_was_not_has_a_remedy(memory: ArenaMemory) -> None:
    assert memory.huge_bytes == huge_pages.obtained_bytes(memory.region.view)
    assert f"of {memory.region.nbytes >> 20} MiB on huge pages" in memory.description
    assert "NUMA" in memory.description
    if memory.huge_bytes < memory.region.nbytes - HUGE_PAGE_BYTES:
        assert memory.remedy


def test_the_twin_without_native_code_fills_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_memory, "native_populate", None)
    memory = open_arena_memory("test", NBYTES, shared=True)
    assert resident_bytes(memory.region) == memory.region.nbytes
    memory.region.close()


def test_another_process_can_neither_write_nor_truncate_it() -> None:
    memory = open_arena_memory("test", NBYTES, shared=True)
    memory.region.view[7] = 42  # we can
    path = f"/proc/{os.getpid()}/fd/{memory.region.fd}"
    child = subprocess.run(
        [sys.executable, "-c", MAPPED_BY_ANOTHER, path, str(memory.region.nbytes)],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    memory.region.close()


def test_a_received_descriptor_takes_no_writes_holes_or_other_seals() -> None:
    memory = open_arena_memory("test", NBYTES, shared=True)
    fd = os.open(f"/proc/self/fd/{memory.region.fd}", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    hole = libc.fallocate(
        fd, FALLOC_PUNCH_HOLE_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(HUGE_PAGE_BYTES)
    )
    assert hole != 0
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x8)
    received = Region.received(fd, memory.region.nbytes, writable=False)
    assert received.read_only
    memory.region.view[5] = 9
    # ctypes gives no address of a read-only buffer.
    start = ctypes.c_void_p(int(np.frombuffer(received.view, np.uint8).ctypes.data))
    assert libc.madvise(start, ctypes.c_size_t(HUGE_PAGE_BYTES), MADV_REMOVE) != 0
    assert libc.mprotect(start, ctypes.c_size_t(HUGE_PAGE_BYTES), 3) != 0
    assert received.view[5] == 9
    received.close()
    memory.region.close()


def test_reserved_huge_pages_are_only_taken_if_there_are_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    real = Region.memfd

    def memfd(name: str, nbytes: int, *, reserved_huge_pages: bool = False) -> Region:
        asked.append(reserved_huge_pages)
        if reserved_huge_pages:
            raise Unavailable("taken by somebody else meanwhile", reason="no_memory")
        return real(name, nbytes)

    monkeypatch.setattr(Region, "memfd", memfd)
    monkeypatch.setattr(huge_pages, "reserved_bytes", lambda: 3 * HUGE_PAGE_BYTES)
    open_arena_memory("test", NBYTES, shared=True).region.close()
    assert asked == [False]
    monkeypatch.setattr(huge_pages, "reserved_bytes", lambda: 4 * HUGE_PAGE_BYTES)
    open_arena_memory("test", NBYTES, shared=True).region.close()
    assert asked == [False, True, False]


@pytest.mark.parametrize("shared", [False, True])
def test_more_memory_than_there_is_is_refused_before_it_is_touched(shared: bool) -> None:
    with pytest.raises(Unavailable, match="lower dram_bytes") as refused:
        DramTier(huge_pages.available_bytes(), 32 << 20, shared=shared)
    assert refused.value.reason == "no_memory"


def test_a_control_group_counts_if_it_has_less(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:   64 kB\n")
    assert huge_pages.available_bytes(meminfo, tmp_path / "none") == 64 << 10
    for name, text in (
        ("memory.max", "50000\n"),
        ("memory.current", "30000\n"),
        ("memory.stat", "anon 10000\ninactive_file 4000\nactive_file 1000\n"),
    ):
        (tmp_path / name).write_text(text)
    assert huge_pages.available_bytes(meminfo, tmp_path) == 25_000
    (tmp_path / "memory.max").write_text("max\n")
    assert huge_pages.available_bytes(meminfo, tmp_path) == 64 << 10


def test_the_choice_of_2_mib_pages_goes_before_the_common_one(tmp_path: Path) -> None:
    assert huge_pages.transparent_choice("shmem_enabled", tmp_path) == "absent"
    (tmp_path / "shmem_enabled").write_text("always [advise] never\n")
    assert huge_pages.transparent_choice("shmem_enabled", tmp_path) == "advise"
    own = tmp_path / "hugepages-2048kB"
    own.mkdir()
    (own / "shmem_enabled").write_text("always [inherit] advise never\n")
    assert huge_pages.transparent_choice("shmem_enabled", tmp_path) == "advise"
    (own / "shmem_enabled").write_text("always inherit advise [never]\n")
    assert huge_pages.transparent_choice("shmem_enabled", tmp_path) == "never"


def nodes(root: Path, **processors: str) -> Path:
    for name, cpus in processors.items():
        (root / name).mkdir()
        (root / name / "cpulist").write_text(cpus + "\n")
    numbers = sorted(int(name.removeprefix("node")) for name in processors)
    (root / "has_memory").write_text(",".join(map(str, numbers)) + "\n")
    return root


def test_memory_comes_from_the_node_of_our_processors(tmp_path: Path) -> None:
    root = nodes(tmp_path, node0="0-3,8", node1="4-7")
    assert numa.memory_nodes(root) == (0, 1)
    assert numa.node_of_processors({1, 8}, root) == 0
    assert numa.node_of_processors({5}, root) == 1
    assert numa.node_of_processors({3, 4}, root) == numa.ANY_NODE


def test_an_unknown_node_is_refused_and_one_that_refuses_is_told(tmp_path: Path) -> None:
    root = nodes(tmp_path, node0="0-4095", node1="5000")
    region = Region.anonymous(HUGE_PAGE_BYTES)
    with pytest.raises(InvalidRequest, match=r"numa_node: 7 .* \[0, 1\]"):
        numa.bind(region.view, 7, root=root)
    where = numa.bind(region.view, numa.ANY_NODE, root=root)
    assert where == "NUMA node 0" or where.startswith("not bound to NUMA node 0: ")
    if len(numa.memory_nodes()) == 1:
        with pytest.raises(InvalidRequest, match="numa_node"):
            numa.bind(region.view, 1, root=root)
    region.close()
