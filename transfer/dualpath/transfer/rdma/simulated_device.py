"""RDMA devices inside this process, for tests: the verbs port without hardware or kernel support.

A `SimulatedFabric` joins them and carries out their requests a packet at a time, so that fences,
lost packets and dead peers hit writes half way. What is checked is what hardware checks: states of
queue pairs, keys and their bounds with every packet, memory windows, posted receives, retry
limits. Time plays no part: a retry follows at once.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from dualpath.transfer.errors import Unavailable
from dualpath.transfer.rdma.simulated_fabric import SimulatedFabric
from dualpath.transfer.rdma.verbs import (
    FLUSHED,
    POST_MAX,
    RECEIVER_NOT_READY,
    REMOTE_ACCESS,
    RETRIES_EXHAUSTED,
    SUCCESS,
    CompletionQueue,
    DeviceInfo,
    GidEntry,
    LinkLayer,
    MemoryKeys,
    Opcode,
    PathSettings,
    Piece,
    PortInfo,
    QueueLimits,
    QueuePair,
    QueuePairAddress,
    Received,
    Window,
    WorkCompletion,
    WorkRequest,
)
from dualpath.transfer.rdma.work_rows import requests_in

PACKET_BYTES = 64 << 10
_LOCAL_PROTECTION = 4
_LOCAL_LENGTH = 1


@dataclass(frozen=True, slots=True)
class _Range:
    """What a key opens: [start, end), for peers only if `writable`, by way of one queue pair if
    it is that of a window. What lies at `start` is in this process at `start + base`."""

    start: int
    end: int
    writable: bool
    queue_pair: int = 0
    memory: MemoryKeys | None = None
    base: int = 0


class SimulatedDevice:
    """See the port's contract. With `dmabuf` it registers them, which here are memfds."""

    def __init__(
        self,
        fabric: SimulatedFabric,
        name: str,
        *,
        memory_windows: bool = True,
        dmabuf: bool = True,
    ) -> None:
        self.fabric = fabric
        self.dmabuf = dmabuf
        self.ranges: dict[int, _Range] = {}
        self._keys = itertools.count(0x1000, 0x100)
        gid = bytes(10) + b"\xff\xff\x0a\x00\x00" + bytes((1 + sum(name.encode()) % 250,))
        self.info = DeviceInfo(
            name=name,
            requests_max=256,
            pieces_max=4,
            completions_max=1 << 16,
            memory_windows=memory_windows,
            ports=[
                PortInfo(
                    1,
                    True,
                    LinkLayer.ETHERNET,
                    0,
                    4096,
                    [
                        GidEntry(0, bytes((0xFE, 0x80)) + bytes(14), "RoCE v1"),
                        GidEntry(1, gid, "RoCE v2"),
                    ],
                )
            ],
        )

    def next_key(self) -> int:
        """A key that is not in use."""
        return next(self._keys)

    def register(self, address: int, nbytes: int, *, writable: bool) -> MemoryKeys:
        """See the port."""
        return SimulatedMemory(self, address, nbytes, writable)

    def register_dmabuf(self, fd: int, offset: int, nbytes: int, *, writable: bool) -> MemoryKeys:
        """See the port."""
        if not self.dmabuf:
            raise Unavailable("the simulated device registers no dmabuf", reason="no_dmabuf")
        mapping = mmap.mmap(fd, 0)
        at = np.frombuffer(mapping, np.uint8).ctypes.data
        return SimulatedMemory(self, offset, nbytes, writable, base=at, mapping=mapping)

    def window(self) -> Window:
        """See the port."""
        if not self.info.memory_windows:
            raise Unavailable("the device has no memory windows")
        return SimulatedWindow(self)

    def completion_queue(self, depth: int) -> CompletionQueue:
        """See the port."""
        return SimulatedCompletionQueue(self.fabric, depth)

    def queue_pair(self, queue: CompletionQueue, limits: QueueLimits, port: int) -> QueuePair:
        """See the port."""
        assert isinstance(queue, SimulatedCompletionQueue)
        return SimulatedQueuePair(self, queue, limits)

    def close(self) -> None:
        """See the port."""


class SimulatedVerbs:
    """The library: the devices of one fabric."""

    def __init__(self, *devices: SimulatedDevice) -> None:
        self._devices = {device.info.name: device for device in devices}

    def devices(self) -> Sequence[str]:
        """See the port."""
        return list(self._devices)

    def open(self, name: str, *, memory_windows: bool = True) -> SimulatedDevice:
        """See the port."""
        if name not in self._devices:
            raise Unavailable(f"no RDMA device {name!r}; there are {list(self._devices)}")
        device = self._devices[name]
        shown = device.info.memory_windows and memory_windows
        device.info = replace(device.info, memory_windows=shown)
        return device


class SimulatedMemory:
    """See the port."""

    def __init__(
        self,
        device: SimulatedDevice,
        address: int,
        nbytes: int,
        writable: bool,
        *,
        base: int = 0,
        mapping: mmap.mmap | None = None,
    ) -> None:
        self._device = device
        self._mapping = mapping
        self.lkey = self.rkey = device.next_key()
        self.range = _Range(address, address + nbytes, writable, base=base)
        with device.fabric.changed:
            device.ranges[self.rkey] = self.range

    def close(self) -> None:
        """See the port."""
        with self._device.fabric.changed:
            bound = [each for each in self._device.ranges.values() if each.memory is self]
            assert not bound, "memory is deregistered to which a window is bound"
            self._device.ranges.pop(self.rkey, None)


class SimulatedWindow:
    """See the port."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self.key = device.next_key()

    def next_key(self) -> int:
        """See the port."""
        return (self.key & ~0xFF) | ((self.key + 1) & 0xFF)

    def close(self) -> None:
        """See the port."""
        with self._device.fabric.changed:
            self._device.ranges.pop(self.key, None)


class SimulatedCompletionQueue:
    """See the port."""

    def __init__(self, fabric: SimulatedFabric, depth: int) -> None:
        self._fabric = fabric
        self._depth = depth
        self._entries: deque[WorkCompletion] = deque()
        self._armed = False
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """See the port."""
        return self._fd

    def arm(self) -> None:
        """See the port."""
        with self._fabric.changed:
            self._armed = True

    def acknowledge(self) -> None:
        """See the port."""
        os.eventfd_read(self._fd)

    def poll(self, most: int) -> list[WorkCompletion]:
        """See the port."""
        with self._fabric.changed:
            count = min(most, len(self._entries))
            return [self._entries.popleft() for _ in range(count)]

    def push(self, completion: WorkCompletion) -> None:
        """Add one; called with the fabric locked."""
        assert len(self._entries) < self._depth, "the completion queue ran over"
        self._entries.append(completion)
        if self._armed and self._fd >= 0:
            self._armed = False
            os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """See the port."""
        with self._fabric.changed:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class SimulatedQueuePair:
    """See the port."""

    def __init__(
        self, device: SimulatedDevice, queue: SimulatedCompletionQueue, limits: QueueLimits
    ) -> None:
        self.device = device
        self.device_name = device.info.name
        self.number = next(device.fabric.numbers)
        self.sends: deque[WorkRequest] = deque()
        self.receives: deque[tuple[int, Piece]] = deque()
        self.path: PathSettings | None = None
        self.state = "init"
        self.retried = 0
        self._peer = 0
        self._queue = queue
        self._limits = limits
        self._sent = 0  # bytes of the first request
        self._unsignaled = 0
        with device.fabric.changed:
            device.fabric.pairs[self.number] = self

    def join(self, own: QueuePairAddress, peer: QueuePairAddress, path: PathSettings) -> None:
        """See the port."""
        with self.device.fabric.changed:
            assert self.state == "init", self.state
            self._peer, self.path, self.state = peer.number, path, "ready"

    def post_receive(self, ident: int, piece: Piece) -> None:
        """See the port."""
        with self.device.fabric.changed:
            if self.state == "reset":
                raise Unavailable("post_receive: the queue pair was reset")
            assert len(self.receives) < self._limits.receives, "the receive queue ran over"
            self.receives.append((ident, piece))

    def post_send(self, requests: Sequence[WorkRequest]) -> None:
        """See the port."""
        assert 1 <= len(requests) <= POST_MAX, f"{len(requests)} requests with one post"
        with self.device.fabric.changed:
            if self.state in ("init", "reset"):
                raise Unavailable(f"post_send: the queue pair is in the state {self.state}")
            room = self._limits.sends - len(self.sends) - self._unsignaled
            assert len(requests) <= room, "the send queue ran over"
            assert all(len(each.pieces) <= self._limits.pieces for each in requests)
            self.sends.extend(requests)
            if self.state == "error":
                self._flush()
            self.device.fabric.enqueue(self)

    def post_rows(self, rows: bytes | bytearray) -> None:
        """See the port."""
        self.post_send(requests_in(rows))

    def halt(self) -> None:
        """See the port."""
        with self.device.fabric.changed:
            self.state = "reset"
            self.sends.clear()
            self.receives.clear()

    def close(self) -> None:
        """See the port."""
        self.halt()
        with self.device.fabric.changed:
            bound = [each for each in self.device.ranges.values() if each.queue_pair == self.number]
            assert not bound, "a queue pair is freed by way of which a window is bound"
            self.device.fabric.pairs.pop(self.number, None)

    # The rest is the fabric's, which is locked.

    def carry_out(self, request: WorkRequest) -> None:
        """A packet of the first request."""
        if request.opcode is Opcode.BIND:
            self._bind(request)
            self._complete(request)
        elif request.opcode is Opcode.INVALIDATE:
            self.device.ranges.pop(request.rkey, None)
            self._complete(request)
        else:
            peer = self.device.fabric.pairs.get(self._peer)
            if not isinstance(peer, SimulatedQueuePair) or peer.state != "ready":
                self.retry(RETRIES_EXHAUSTED)
            elif request.opcode is Opcode.SEND:
                self._send(request, peer)
            else:
                self._write(request, peer)

    def retry(self, status: int) -> None:
        """The packet goes again, or the queue pair is in error."""
        assert self.path is not None
        self.retried += 1
        if self.retried > (
            self.path.retries if status == RETRIES_EXHAUSTED else self.path.receiver_retries
        ):
            self._fail(status)

    def _bind(self, request: WorkRequest) -> None:
        window, memory = request.window, request.memory
        assert isinstance(window, SimulatedWindow)
        assert isinstance(memory, SimulatedMemory)
        assert window.key not in self.device.ranges, "a window is bound that is bound already"
        assert request.rkey == window.next_key(), "a window is bound under another key"
        start, end = request.remote_address, request.remote_address + request.nbytes
        assert memory.range.start <= start < end <= memory.range.end, "bound out of bounds"
        window.key = request.rkey
        self.device.ranges[window.key] = _Range(
            start, end, True, self.number, memory, memory.range.base
        )

    def _send(self, request: WorkRequest, peer: SimulatedQueuePair) -> None:
        if not self._is_readable(request):
            self._fail(_LOCAL_PROTECTION)
        elif not peer.receives:
            self.retry(RECEIVER_NOT_READY)
        else:
            ident, piece = peer.receives.popleft()
            nbytes = sum(each.nbytes for each in request.pieces)
            if nbytes > piece.nbytes:
                peer._queue.push(
                    WorkCompletion(ident, _LOCAL_LENGTH, Received.MESSAGE, 0, 0, peer.number)
                )
                peer._fail(FLUSHED)
                self._fail(9)
                return
            at = piece.address
            for each in request.pieces:
                ctypes.memmove(at, each.address, each.nbytes)
                at += each.nbytes
            peer._queue.push(
                WorkCompletion(ident, SUCCESS, Received.MESSAGE, nbytes, 0, peer.number)
            )
            self._complete(request)

    def _write(self, request: WorkRequest, peer: SimulatedQueuePair) -> None:
        nbytes = sum(each.nbytes for each in request.pieces)
        opened = peer.device.ranges.get(request.rkey)
        at = request.remote_address + self._sent
        if not self._is_readable(request):
            self._fail(_LOCAL_PROTECTION)
            return
        if (
            opened is None
            or not opened.writable
            or opened.queue_pair not in (0, peer.number)
            or at < opened.start
            or request.remote_address + nbytes > opened.end
        ):
            self._fail(REMOTE_ACCESS)
            peer._fail(FLUSHED)
            return
        last = self._sent + PACKET_BYTES >= nbytes
        if last and request.opcode is Opcode.WRITE_IMM and not peer.receives:
            self.retry(RECEIVER_NOT_READY)
            return
        left, skip = PACKET_BYTES, self._sent
        for piece in request.pieces:
            take = min(left, max(0, piece.nbytes - skip))
            if take:
                base = self.device.ranges[piece.lkey].base
                ctypes.memmove(opened.base + at, base + piece.address + skip, take)
            at, left, skip = at + take, left - take, max(0, skip - piece.nbytes)
        self._sent += PACKET_BYTES
        if not last:
            return
        if request.opcode is Opcode.WRITE_IMM:
            ident, _ = peer.receives.popleft()
            peer._queue.push(
                WorkCompletion(
                    ident, SUCCESS, Received.IMMEDIATE, nbytes, request.immediate, peer.number
                )
            )
        self._complete(request)

    def _is_readable(self, request: WorkRequest) -> bool:
        for piece in request.pieces:
            opened = self.device.ranges.get(piece.lkey)
            if opened is None or not (
                opened.start <= piece.address and piece.address + piece.nbytes <= opened.end
            ):
                return False
        return True

    def _complete(self, request: WorkRequest) -> None:
        self.sends.popleft()
        self._sent = self.retried = 0
        self._unsignaled += 1
        if request.signaled:
            self._unsignaled = 0
            self._queue.push(
                WorkCompletion(request.ident, SUCCESS, Received.REQUEST, 0, 0, self.number)
            )

    def _fail(self, status: int) -> None:
        """The first request fails with `status`, everything else is flushed."""
        if self.state != "ready":
            return
        self.state = "error"
        if self.sends and status != FLUSHED:
            ident = self.sends.popleft().ident
            self._queue.push(WorkCompletion(ident, status, Received.REQUEST, 0, 0, self.number))
        self._flush()

    def _flush(self) -> None:
        for ident in [each.ident for each in self.sends] + [each for each, _ in self.receives]:
            self._queue.push(WorkCompletion(ident, FLUSHED, Received.REQUEST, 0, 0, self.number))
        self.sends.clear()
        self.receives.clear()
