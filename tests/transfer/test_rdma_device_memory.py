"""Regions that network cards reach by a dmabuf: written into and from without host memory between,
or refused by name. A memfd on a simulated device takes the place of a GPU's memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from dualpath.transfer.conformance_scene import (
    READER,
    WRITER,
    Recorder,
    Scene,
    TransportPair,
)
from dualpath.transfer.cuda.device_memory import DeviceMemory
from dualpath.transfer.cuda.device_region import device_region
from dualpath.transfer.errors import InvalidRequest, Unavailable
from dualpath.transfer.memory_transport import MemoryHub, MemoryTransport
from dualpath.transfer.rdma.native_device import MISSING, NativeVerbs
from dualpath.transfer.rdma.rdma_transport import RdmaTransport
from dualpath.transfer.rdma.simulated_device import SimulatedDevice, SimulatedVerbs
from dualpath.transfer.rdma.simulated_fabric import SimulatedFabric
from dualpath.transfer.region import DmaBuf, Region
from dualpath.transfer.slices import Slices
from dualpath.transfer.tcp_transport import TcpTransport
from dualpath.transfer.transport import WriteStatus

KIB = 1 << 10
OFFSET = 3 * KIB
BYTES = 256 * KIB


class Device:
    """So to speak: memory that is reached by its descriptor only."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("device")
        os.ftruncate(self.fd, OFFSET + BYTES)
        self.memory = mmap.mmap(self.fd, OFFSET + BYTES)

    def region(self) -> Region:
        return Region.of_device(DmaBuf(os.dup(self.fd), OFFSET), BYTES, self)

    @property
    def bytes(self) -> bytes:
        return self.memory[OFFSET:]


@contextmanager
def scene_of(*, memory_windows: bool = True, dmabuf: bool = True) -> Iterator[Scene]:
    heard = Recorder(), Recorder()
    with SimulatedFabric() as fabric:

        def made(name: str, recorder: Recorder) -> RdmaTransport:
            device = SimulatedDevice(fabric, name, memory_windows=memory_windows, dmabuf=dmabuf)
            return RdmaTransport(name, recorder.on_lost, SimulatedVerbs(device))

        writer, reader = made(WRITER, heard[0]), made(READER, heard[1])
        try:
            scene = Scene(
                TransportPair(writer, reader, "127.0.0.1:0", Region.anonymous, 32 << 20), *heard
            )
            scene.connect()
            yield scene
        finally:
            writer.close()
            reader.close()


@pytest.mark.parametrize("memory_windows", [True, False])
def test_bytes_go_from_device_to_device_slice_by_slice(memory_windows: bool) -> None:
    with scene_of(memory_windows=memory_windows) as scene:
        ours, theirs = Device(), Device()
        ours.memory[OFFSET:] = content = os.urandom(BYTES)
        source, target = ours.region(), theirs.region()
        window = scene.window(target)
        slices = Slices.strided(8 * KIB, 40 * KIB, 5, 24 * KIB)
        scene.send(source, window, slices)
        assert scene.finish(1) == [WriteStatus.DONE]
        expected = bytearray(BYTES)
        for at, nbytes in slices.pieces():
            expected[at : at + nbytes] = content[at : at + nbytes]
        assert theirs.bytes == bytes(expected)
        assert theirs.memory[:OFFSET] == bytes(OFFSET), "bytes landed in front of the region"
        scene.reader.revoke(window)
        for region in (source, target):
            region.close()


def test_what_a_card_does_not_register_is_refused_by_name_where_it_is_exposed_or_written() -> None:
    with scene_of(dmabuf=False) as scene:
        region = Device().region()
        with pytest.raises(Unavailable) as caught:
            scene.window(region)
        assert caught.value.reason == "no_dmabuf"
        window, slices = scene.window(Region.anonymous(BYTES)), Slices.contiguous(0, KIB)
        with pytest.raises(Unavailable) as caught:
            scene.write(region, window, slices, 1)
        assert caught.value.reason == "no_dmabuf"
        region.close()


def test_memory_that_the_host_reaches_too_goes_by_the_host_then() -> None:
    with scene_of(dmabuf=False) as scene:
        source, target = scene.source(BYTES), Region.anonymous(BYTES)
        target.dmabuf = DmaBuf(os.dup(Device().fd), OFFSET)
        scene.send(source, scene.window(target), Slices.contiguous(0, BYTES))
        assert scene.finish(1) == [WriteStatus.DONE]
        assert target.view == source.view


def test_what_needs_the_processor_is_refused_for_device_memory() -> None:
    region, slices = Device().region(), Slices.contiguous(0, KIB)
    with scene_of() as scene:
        with pytest.raises(InvalidRequest, match="digests") as caught:
            scene.reader.expose(
                region,
                0,
                BYTES,
                scene.reader_heard.on_arrival,
                on_hashed=lambda tags, _: [True for _ in tags],
            )
        assert caught.value.reason == "device_memory"
        window = scene.window(region)
        scene.reader.arm(window, [(1, slices)])
        assert scene.reader.place(window, 1, slices, memoryview(bytes(KIB))) == "rejected"
        scene.reader.revoke(window)
    for transport in (
        MemoryTransport("a", lambda *_: None, MemoryHub()),
        TcpTransport("a", lambda *_: None),
    ):
        with pytest.raises(InvalidRequest, match="rdma"):
            transport.expose(region, 0, BYTES, lambda _: True)
        transport.close()
    region.close()


def test_gpu_memory_is_shared_by_whole_pages_around_it() -> None:
    page = mmap.PAGESIZE
    asked: list[tuple[int, int]] = []

    def share(pointer: int, nbytes: int) -> int:
        asked.append((pointer, nbytes))
        return os.memfd_create("gpu")

    owner = object()
    for pointer, nbytes in ((7 * page, page), (7 * page + 512, page), (7 * page + 1, page - 1)):
        region = device_region(DeviceMemory(pointer, nbytes, owner), share)
        start, size = asked.pop()
        assert start % page == size % page == 0
        assert start <= pointer < pointer + nbytes <= start + size < pointer + nbytes + page
        assert region.dmabuf is not None
        assert region.dmabuf.offset == pointer - start
        assert (region.nbytes, region.owner, region.on_host) == (nbytes, owner, False)
        region.close()


def test_without_a_cuda_driver_the_reason_is_named() -> None:
    if os.path.exists("/proc/driver/nvidia"):
        pytest.skip("there is a CUDA driver here")
    with pytest.raises(Unavailable, match="CUDA driver") as caught:
        device_region(DeviceMemory(4096, 4096, None))
    assert caught.value.reason == "no_dmabuf"


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_the_native_device_registers_a_dmabuf_or_names_why_not() -> None:
    from dualpath.bench.transfer import _null_verbs

    device = NativeVerbs(_null_verbs.__file__).open("null0")
    _null_verbs.begin(-1, False, True)
    memory = device.register_dmabuf(Device().fd, OFFSET, BYTES, writable=True)
    assert memory.lkey
    memory.close()
    _null_verbs.begin(-1, False, False)
    with pytest.raises(Unavailable, match="cannot register a dmabuf") as caught:
        device.register_dmabuf(Device().fd, OFFSET, BYTES, writable=True)
    assert caught.value.reason == "no_dmabuf"
    device.close()
