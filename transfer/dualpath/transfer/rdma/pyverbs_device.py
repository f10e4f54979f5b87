"""RDMA devices by libibverbs, through pyverbs: the extra `rdma`, or Debian's `python3-pyverbs`.

Made for rdma-core 44 to 59 (which renamed the module of the enumerations). What pyverbs does not
offer is worked around here and nowhere else: the descriptor of a completion channel before 56, a
second binding of one memory window, requests that it never frees.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

from dualpath.transfer.errors import Unavailable
from dualpath.transfer.rdma.verbs import (
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

REMEDY = (
    "install python3-pyverbs and ibverbs-providers (Debian, Ubuntu) or the extra `rdma`, load the "
    "network card's driver (without one: modprobe rdma_rxe; rdma link add rxe0 type rxe netdev "
    "eth0), and raise the limit on locked memory (ulimit -l unlimited)"
)
_NO_RDMA = "no_rdma"
_CHANNEL = "infinibandevent"
_MTU_UNIT = 128
_GID_KINDS = {0: "IB", 1: "RoCE v1", 2: "RoCE v2"}
_INFINIBAND = 1
_ACTIVE = 4
_opening_channel = threading.Lock()


class _Library:
    """The modules of pyverbs; importing it is left until it is needed."""

    def __init__(self) -> None:
        root, quiet = logging.getLogger(), logging.NullHandler()
        root.addHandler(quiet)  # pyverbs configures the root logger unless that has a handler
        try:
            from pyverbs import addr, cq, device, mr, pd, pyverbs_error, qp, wr  # noqa: PLC0415

            self.enums = _enums()
        except ImportError as error:
            raise Unavailable(f"no pyverbs ({error}); {REMEDY}", reason=_NO_RDMA) from error
        finally:
            root.removeHandler(quiet)
        self.addr, self.cq, self.device, self.mr, self.pd = addr, cq, device, mr, pd
        self.qp, self.wr = qp, wr
        self.error: type[Exception] = pyverbs_error.PyverbsError

    @contextmanager
    def named(self, call: str) -> Iterator[None]:
        """Raise Unavailable, naming the call, for what pyverbs raises."""
        try:
            yield
        except self.error as error:
            raise Unavailable(f"{call}: {error}; {REMEDY}", reason=_NO_RDMA) from error


def _enums() -> ModuleType:
    try:
        from pyverbs import libibverbs_enums  # noqa: PLC0415
    except ImportError:
        from pyverbs import enums  # noqa: PLC0415

        return enums  # type: ignore[no-any-return]
    return libibverbs_enums  # type: ignore[no-any-return]


class PyverbsVerbs:
    """The library. Raises Unavailable (`no_rdma`) without pyverbs."""

    def __init__(self) -> None:
        self._library = _Library()

    def devices(self) -> Sequence[str]:
        """See the port."""
        with self._library.named("ibv_get_device_list"):
            found = self._library.device.get_device_list()
        names = [each.name.decode() for each in found]
        if not names:
            raise Unavailable(f"this machine has no RDMA device; {REMEDY}", reason=_NO_RDMA)
        return names

    def open(self, name: str, *, memory_windows: bool = True) -> PyverbsDevice:
        """See the port."""
        return PyverbsDevice(self._library, name, memory_windows=memory_windows)


class PyverbsDevice:
    """See the port."""

    def __init__(self, library: _Library, name: str, *, memory_windows: bool) -> None:
        self._library = library
        self._memory_windows = memory_windows
        with library.named(f"opening the RDMA device {name!r}"):
            self._context = library.device.Context(name=name)
            self._domain = library.pd.PD(self._context)
            self._info = self._query(name)

    @property
    def info(self) -> DeviceInfo:
        """See the port."""
        return self._info

    def _query(self, name: str) -> DeviceInfo:
        found = self._context.query_device()
        ports = []
        lengths = 0
        for number in range(1, found.phys_port_cnt + 1):
            port = self._context.query_port(number)
            lengths += port.gid_tbl_len
            ports.append((number, port))
        table = self._context.query_gid_table(max(1, lengths))
        return DeviceInfo(
            name=name,
            requests_max=found.max_qp_wr,
            pieces_max=found.max_sge,
            completions_max=found.max_cqe,
            memory_windows=self._memory_windows
            and bool(found.device_cap_flags & self._library.enums.IBV_DEVICE_MEM_WINDOW_TYPE_2B),
            ports=[
                PortInfo(
                    number=number,
                    active=port.state == _ACTIVE,
                    link_layer=(
                        LinkLayer.INFINIBAND
                        if port.link_layer == _INFINIBAND
                        else LinkLayer.ETHERNET
                    ),
                    lid=port.lid,
                    mtu=_MTU_UNIT << port.active_mtu,
                    gids=[
                        GidEntry(
                            entry.gid_index,
                            bytes.fromhex(entry.gid_str().replace(":", "")),
                            _GID_KINDS.get(entry.gid_type, "?"),
                        )
                        for entry in table
                        if entry.port_num == number
                    ],
                )
                for number, port in ports
            ],
        )

    def register(self, address: int, nbytes: int, *, writable: bool) -> MemoryKeys:
        """See the port."""
        with self._library.named(f"registering {nbytes} bytes of memory"):
            return _Memory(
                self._library,
                self._library.mr.MR(
                    self._domain, nbytes, self._access(writable=writable), address=address
                ),
            )

    def register_dmabuf(self, fd: int, offset: int, nbytes: int, *, writable: bool) -> MemoryKeys:
        """See the port."""
        made = getattr(self._library.mr, "DmaBufMR", None)
        if made is None:
            raise Unavailable(
                "this pyverbs registers no dmabuf; use 34 or later", reason="no_dmabuf"
            )
        access = self._access(writable=writable)
        try:
            return _Memory(
                self._library, made(self._domain, nbytes, access, dmabuf=fd, offset=offset)
            )
        except self._library.error as error:
            raise Unavailable(
                f"the device {self._info.name} cannot register a dmabuf: {error}",
                reason="no_dmabuf",
            ) from error

    def _access(self, *, writable: bool) -> int:
        """With memory windows the key of the memory itself opens nothing to peers."""
        enums = self._library.enums
        if not writable:
            return 0
        remote = (
            enums.IBV_ACCESS_MW_BIND if self._info.memory_windows else enums.IBV_ACCESS_REMOTE_WRITE
        )
        return int(enums.IBV_ACCESS_LOCAL_WRITE | remote)

    def window(self) -> Window:
        """See the port."""
        return _MemoryWindow(self._library, self._domain)

    def completion_queue(self, depth: int) -> CompletionQueue:
        """See the port."""
        return _CompletionQueue(self._library, self._context, depth)

    def queue_pair(self, queue: CompletionQueue, limits: QueueLimits, port: int) -> QueuePair:
        """See the port."""
        assert isinstance(queue, _CompletionQueue)
        return _QueuePair(self._library, self._domain, queue, limits, port)

    def close(self) -> None:
        """See the port."""
        with self._library.named("closing the RDMA device"):
            self._domain.close()
            self._context.close()


class _Memory:
    def __init__(self, library: _Library, region: Any) -> None:
        self._library = library
        self.region = region
        self.lkey: int = region.lkey
        self.rkey: int = region.rkey

    def close(self) -> None:
        with self._library.named("ibv_dereg_mr"):
            self.region.close()


class _MemoryWindow:
    """pyverbs binds a window under the key after that with which it was allocated, so only once:
    then it is allocated anew."""

    def __init__(self, library: _Library, domain: Any) -> None:
        self._library = library
        self._domain = domain
        self._window: Any = None
        self.bound = False

    def next_key(self) -> int:
        if self._window is None or self.bound:
            self.close()
            with self._library.named("ibv_alloc_mw"):
                kind = self._library.enums.IBV_MW_TYPE_2
                self._window = self._library.mr.MW(self._domain, kind)
            self.bound = False
        key: int = self._window.rkey
        return (key & ~0xFF) | ((key + 1) & 0xFF)

    def request(self, request: WorkRequest, flags: int) -> Any:
        """The work request that binds it."""
        enums = self._library.enums
        assert isinstance(request.memory, _Memory)
        made = self._library.wr.SendWR(
            wr_id=request.ident, opcode=enums.IBV_WR_BIND_MW, send_flags=flags
        )
        bind = self._library.mr.MWBindInfo(
            request.memory.region,
            request.remote_address,
            request.nbytes,
            enums.IBV_ACCESS_REMOTE_WRITE,
        )
        made.set_bind_wr(self._window, bind)
        assert made.rkey == request.rkey, (made.rkey, request.rkey)
        self.bound = True
        return made

    def close(self) -> None:
        if self._window is not None:
            with self._library.named("ibv_dealloc_mw"):
                self._window.close()
            self._window = None


class _CompletionQueue:
    def __init__(self, library: _Library, context: Any, depth: int) -> None:
        self._library = library
        with library.named("making a completion queue"):
            self._channel, self._fd = _open_channel(library, context)
            self.queue = library.cq.CQ(context, depth, None, self._channel, 0)
        os.set_blocking(self._fd, False)
        received = library.enums
        self._what = {
            received.IBV_WC_RECV: Received.MESSAGE,
            received.IBV_WC_RECV_RDMA_WITH_IMM: Received.IMMEDIATE,
        }

    def fileno(self) -> int:
        return self._fd

    def arm(self) -> None:
        with self._library.named("ibv_req_notify_cq"):
            self.queue.req_notify()

    def acknowledge(self) -> None:
        with self._library.named("ibv_get_cq_event"):
            self._channel.get_cq_event(self.queue)
            self.queue.ack_events(1)

    def poll(self, most: int) -> list[WorkCompletion]:
        with self._library.named("ibv_poll_cq"):
            _, found = self.queue.poll(most)
        return [
            WorkCompletion(
                each.wr_id,
                each.status,
                self._what.get(each.opcode, Received.REQUEST)
                if each.status == SUCCESS
                else Received.REQUEST,
                each.byte_len,
                socket.ntohl(each.imm_data),
                each.qp_num,
            )
            for each in found
        ]

    def close(self) -> None:
        with self._library.named("ibv_destroy_cq"):
            self.queue.close()
            self._channel.close()


def _open_channel(library: _Library, context: Any) -> tuple[Any, int]:
    """A completion channel and its descriptor, which older versions of pyverbs keep to
    themselves: it is the one that is there after it was made and was not before."""
    with _opening_channel:
        before = _channels()
        channel = library.cq.CompChannel(context)
        fd = getattr(channel, "fd", None)
        if fd is None:
            (fd,) = _channels() - before
        return channel, int(fd)


def _channels() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # it was of the listing itself, or has been closed
            continue
        if _CHANNEL in target:
            found.add(int(name))
    return found


class _QueuePair:
    def __init__(
        self,
        library: _Library,
        domain: Any,
        queue: _CompletionQueue,
        limits: QueueLimits,
        port: int,
    ) -> None:
        self._library = library
        enums = library.enums
        self._opcodes = {
            Opcode.SEND: enums.IBV_WR_SEND,
            Opcode.WRITE: enums.IBV_WR_RDMA_WRITE,
            Opcode.WRITE_IMM: enums.IBV_WR_RDMA_WRITE_WITH_IMM,
        }
        with library.named("making a queue pair"):
            cap = library.qp.QPCap(limits.sends, limits.receives, limits.pieces, 1, 0)
            made = library.qp.QPInitAttr(
                qp_type=enums.IBV_QPT_RC, scq=queue.queue, rcq=queue.queue, cap=cap, sq_sig_all=0
            )
            self._pair = library.qp.QP(domain, made)
            attr = library.qp.QPAttr(port_num=port)
            attr.pkey_index = 0
            attr.qp_access_flags = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
            self._pair.to_init(attr)
        self.number: int = self._pair.qp_num

    def join(self, own: QueuePairAddress, peer: QueuePairAddress, path: PathSettings) -> None:
        library, qp = self._library, self._library.qp
        attr = qp.QPAttr(port_num=path.port)
        attr.path_mtu = (min(own.mtu, peer.mtu) // _MTU_UNIT).bit_length() - 1
        attr.dest_qp_num = peer.number
        attr.rq_psn, attr.sq_psn = peer.packet_number, own.packet_number
        attr.max_rd_atomic = attr.max_dest_rd_atomic = 1
        attr.min_rnr_timer = path.receiver_timer
        attr.timeout, attr.retry_cnt = path.timeout_exponent, path.retries
        attr.rnr_retry = path.receiver_retries
        with library.named("joining a queue pair"):
            attr.ah_attr = self._address(own, peer, path)
            self._pair.to_rtr(attr)
            self._pair.to_rts(attr)

    def _address(self, own: QueuePairAddress, peer: QueuePairAddress, path: PathSettings) -> Any:
        addr = self._library.addr
        if own.lid and peer.lid:  # InfiniBand, one subnet
            return addr.AHAttr(
                dlid=peer.lid, sl=path.service_level, is_global=0, port_num=path.port
            )
        words = [peer.gid[at : at + 2].hex() for at in range(0, 16, 2)]
        route = addr.GlobalRoute(
            dgid=addr.GID(":".join(words)),
            sgid_index=path.gid_index,
            hop_limit=path.hop_limit,
            traffic_class=path.traffic_class,
        )
        return addr.AHAttr(sl=path.service_level, is_global=1, port_num=path.port, gr=route)

    def post_receive(self, ident: int, piece: Piece) -> None:
        with self._library.named("ibv_post_recv"):
            sge = self._library.wr.SGE(piece.address, piece.nbytes, piece.lkey)
            request = self._library.wr.RecvWR(wr_id=ident, num_sge=1, sg=[sge])
            try:
                self._pair.post_recv(request)
            finally:
                request.close()
                sge.close()

    def post_send(self, requests: Sequence[WorkRequest]) -> None:
        with self._library.named("ibv_post_send"):
            made = [self._request(each) for each in requests]
            for each, following in pairwise(made):
                each.next_wr = following
            try:
                self._pair.post_send(made[0])
            finally:
                for each in made:
                    each.close()

    def post_rows(self, rows: bytes | bytearray) -> None:
        self.post_send(requests_in(rows))

    def _request(self, request: WorkRequest) -> Any:
        enums, wr = self._library.enums, self._library.wr
        flags = enums.IBV_SEND_SIGNALED if request.signaled else 0
        if request.opcode is Opcode.BIND:
            assert isinstance(request.window, _MemoryWindow)
            return request.window.request(request, flags)
        if request.opcode is Opcode.INVALIDATE:
            # `invalidate_rkey` shares its place with `imm_data`.
            return wr.SendWR(
                wr_id=request.ident,
                opcode=enums.IBV_WR_LOCAL_INV,
                imm_data=request.rkey,
                send_flags=flags,
            )
        pieces = [wr.SGE(*piece) for piece in request.pieces]
        made = wr.SendWR(
            wr_id=request.ident,
            opcode=self._opcodes[request.opcode],
            num_sge=len(pieces),
            imm_data=socket.htonl(request.immediate),
            sg=pieces,
            send_flags=flags,
        )
        for piece in pieces:
            piece.close()
        if request.opcode is not Opcode.SEND:
            made.set_wr_rdma(request.rkey, request.remote_address)
        return made

    def halt(self) -> None:
        enums = self._library.enums
        with self._library.named("ibv_modify_qp"):
            for state in (enums.IBV_QPS_ERR, enums.IBV_QPS_RESET):
                attr = self._library.qp.QPAttr(qp_state=state)
                self._pair.modify(attr, enums.IBV_QP_STATE)

    def close(self) -> None:
        with self._library.named("ibv_destroy_qp"):
            self._pair.close()
