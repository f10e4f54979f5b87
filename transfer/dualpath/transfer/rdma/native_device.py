"""RDMA devices by libibverbs, called natively: one call posts a batch, and nothing is an object a
request.

The extension module (`transfer/native/verbs_*.c`) opens the library at run time, so neither
building nor installing needs rdma-core. `pyverbs_device` does the same by way of pyverbs, where
the extension could not be built; `library` chooses.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dualpath.transfer.errors import Unavailable
from dualpath.transfer.rdma.verbs import (
    CompletionQueue,
    DeviceInfo,
    GidEntry,
    LinkLayer,
    MemoryKeys,
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
from dualpath.transfer.rdma.work_rows import rows_of

try:
    from dualpath.transfer.rdma import _verbs
except ImportError as error:
    MISSING = f"the native part was not built ({error})"
else:
    MISSING = ""

LIBRARY = "libibverbs.so.1"
REMEDY = (
    "install libibverbs1 and ibverbs-providers (Debian, Ubuntu) or rdma-core, load the network "
    "card's driver (without one: modprobe rdma_rxe; rdma link add rxe0 type rxe netdev eth0), and "
    "raise the limit on locked memory (ulimit -l unlimited)"
)
_NO_RDMA = "no_rdma"
_MTU_UNIT = 128
_GID_KINDS = {0: "IB", 1: "RoCE v1", 2: "RoCE v2"}
_ABOUT = (Received.MESSAGE, Received.IMMEDIATE, Received.REQUEST)


@contextmanager
def _named(call: str) -> Iterator[None]:
    """Raise Unavailable, naming the call, for what the library refuses or has been closed."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise Unavailable(f"{call}: {why}; {REMEDY}", reason=_NO_RDMA) from error
    except ValueError as error:
        raise Unavailable(f"{call}: {error}", reason="closed") from error


class NativeVerbs:
    """The library at `path`. Raises Unavailable (`no_rdma`) if it, or the native part, is not
    there."""

    def __init__(self, path: str = LIBRARY) -> None:
        if MISSING:
            raise Unavailable(f"{MISSING}; {REMEDY}", reason=_NO_RDMA)
        with _named("opening the library of RDMA"):
            self._library = _verbs.load(path)

    def devices(self) -> Sequence[str]:
        """See the port."""
        with _named("ibv_get_device_list"):
            names = _verbs.devices(self._library)
        if not names:
            raise Unavailable(f"this machine has no RDMA device; {REMEDY}", reason=_NO_RDMA)
        return names

    def open(self, name: str, *, memory_windows: bool = True) -> NativeDevice:
        """See the port."""
        return NativeDevice(self._library, name, memory_windows=memory_windows)


class NativeDevice:
    """See the port."""

    def __init__(self, library: object, name: str, *, memory_windows: bool) -> None:
        with _named(f"opening the RDMA device {name!r}"):
            self._device = _verbs.open(library, name)
            self._info = self._query(name, memory_windows)

    @property
    def info(self) -> DeviceInfo:
        """See the port."""
        return self._info

    def _query(self, name: str, memory_windows: bool) -> DeviceInfo:
        requests, pieces, completions, flags, count = _verbs.query(self._device)
        ports = [(each, _verbs.query_port(self._device, each)) for each in range(1, count + 1)]
        rows = _verbs.gids(self._device, max(1, sum(port[4] for _, port in ports)))
        return DeviceInfo(
            name=name,
            requests_max=requests,
            pieces_max=min(pieces, _verbs.PIECES_MAX),
            completions_max=completions,
            memory_windows=memory_windows and bool(flags & _verbs.WINDOWS_2B),
            ports=[
                PortInfo(
                    number,
                    active,
                    LinkLayer.INFINIBAND if infiniband else LinkLayer.ETHERNET,
                    lid,
                    _MTU_UNIT << mtu,
                    [
                        GidEntry(row, gid, _GID_KINDS.get(kind, "?"))
                        for port, row, kind, gid in rows
                        if port == number
                    ],
                )
                for number, (active, infiniband, lid, mtu, _) in ports
            ],
        )

    def register(self, address: int, nbytes: int, *, writable: bool) -> MemoryKeys:
        """See the port."""
        with _named(f"registering {nbytes} bytes of memory"):
            return _Memory(
                _verbs.register(self._device, address, nbytes, writable, self._info.memory_windows)
            )

    def register_dmabuf(self, fd: int, offset: int, nbytes: int, *, writable: bool) -> MemoryKeys:
        """See the port."""
        try:
            made = _verbs.register_dmabuf(
                self._device, fd, offset, nbytes, writable, self._info.memory_windows
            )
        except OSError as error:
            raise Unavailable(
                f"the device {self._info.name} cannot register a dmabuf: {error.strerror}",
                reason="no_dmabuf",
            ) from error
        return _Memory(made)

    def window(self) -> Window:
        """See the port."""
        with _named("ibv_alloc_mw"):
            return _MemoryWindow(_verbs.window(self._device))

    def completion_queue(self, depth: int) -> CompletionQueue:
        """See the port."""
        with _named("making a completion queue"):
            return _CompletionQueue(_verbs.completion_queue(self._device, depth))

    def queue_pair(self, queue: CompletionQueue, limits: QueueLimits, port: int) -> QueuePair:
        """See the port."""
        assert isinstance(queue, _CompletionQueue)
        with _named("making a queue pair"):
            return NativeQueuePair(
                _verbs.queue_pair(
                    self._device, queue.queue, limits.sends, limits.receives, limits.pieces, port
                )
            )

    def close(self) -> None:
        """See the port."""
        with _named("closing the RDMA device"):
            _verbs.close(self._device)


class _Memory:
    def __init__(self, made: object) -> None:
        self.memory = made
        self.lkey, self.rkey = _verbs.keys(made)

    def close(self) -> None:
        with _named("ibv_dereg_mr"):
            _verbs.close(self.memory)


class _MemoryWindow:
    def __init__(self, made: object) -> None:
        self.window = made

    def next_key(self) -> int:
        return _verbs.next_key(self.window)

    def close(self) -> None:
        with _named("ibv_dealloc_mw"):
            _verbs.close(self.window)


def _capsule(made: object) -> object:
    if isinstance(made, _MemoryWindow):
        return made.window
    assert isinstance(made, _Memory)
    return made.memory


class _CompletionQueue:
    def __init__(self, made: object) -> None:
        self.queue = made
        self._fd = _verbs.descriptor(made)
        os.set_blocking(self._fd, False)

    def fileno(self) -> int:
        return self._fd

    def arm(self) -> None:
        with _named("ibv_req_notify_cq"):
            _verbs.arm(self.queue)

    def acknowledge(self) -> None:
        with _named("ibv_get_cq_event"):
            _verbs.acknowledge(self.queue)

    def poll(self, most: int) -> list[WorkCompletion]:
        with _named("ibv_poll_cq"):
            found = _verbs.poll(self.queue, most)
        return [
            WorkCompletion(ident, status, _ABOUT[about], nbytes, immediate, pair)
            for ident, status, about, nbytes, immediate, pair in found
        ]

    def close(self) -> None:
        with _named("ibv_destroy_cq"):
            _verbs.close(self.queue)


class NativeQueuePair:
    """See the port. `pair` is for the benchmark."""

    def __init__(self, made: object) -> None:
        self.pair = made
        self.number = _verbs.number(made)
        # A reset begins the queue anew, which must not happen in the middle of a post.
        self._posting = threading.Lock()
        self._halted = False

    def join(self, own: QueuePairAddress, peer: QueuePairAddress, path: PathSettings) -> None:
        """See the port."""
        with _named("joining a queue pair"):
            _verbs.join(
                self.pair,
                (min(own.mtu, peer.mtu) // _MTU_UNIT).bit_length() - 1,
                peer.number,
                peer.packet_number,
                own.packet_number,
                path.port,
                peer.lid if own.lid else 0,
                path.service_level,
                path.gid_index,
                path.traffic_class,
                path.hop_limit,
                peer.gid,
                path.timeout_exponent,
                path.retries,
                path.receiver_retries,
                path.receiver_timer,
            )

    def post_receive(self, ident: int, piece: Piece) -> None:
        """See the port."""
        with self._posting, _named("ibv_post_recv"):
            self._check_running()
            _verbs.post_receive(self.pair, ident, *piece)

    def post_send(self, requests: Sequence[WorkRequest]) -> None:
        """See the port."""
        rows, objects = rows_of(requests)
        self._post(rows, [_capsule(each) for each in objects])

    def post_rows(self, rows: bytes | bytearray) -> None:
        """See the port."""
        self._post(rows, ())

    def _post(self, rows: bytes | bytearray, objects: Sequence[object]) -> None:
        with self._posting:
            self._check_running()
            try:
                posted, count, code = _verbs.post(self.pair, rows, objects)
            except ValueError as error:
                raise Unavailable(f"ibv_post_send: {error}") from error
        if code:
            raise Unavailable(
                f"ibv_post_send: the device took {posted} of {count} work requests and refused "
                f"the next: {errno.errorcode.get(code, code)} ({os.strerror(code)})",
                reason="refused_post",
            )

    def _check_running(self) -> None:
        if self._halted:
            raise Unavailable("the queue pair has been halted")

    def halt(self) -> None:
        """See the port."""
        with self._posting, _named("ibv_modify_qp"):
            self._halted = True
            _verbs.halt(self.pair)

    def close(self) -> None:
        """See the port."""
        with _named("ibv_destroy_qp"):
            _verbs.close(self.pair)
