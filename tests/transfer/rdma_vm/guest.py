"""What runs inside the virtual machine of `make test-rdma`: guest.py VERDICT [CHECK ...].

The whole conformance suite over real verbs between two devices, posted natively; parts of it over
pyverbs, and with one end of each kind; and what only real devices show: packet loss, a cut cable, a
wrong key, a writer that is stopped, a writer that is killed. The verdict is written after every
check, so that a crash leaves what was found until then.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from dualpath.transfer.conformance import CHECKS
from dualpath.transfer.conformance_scene import (
    READER,
    WAIT_S,
    WRITER,
    Recorder,
    TransportPair,
    extents,
    pattern,
    scene_of,
    wait_for_byte,
)
from dualpath.transfer.errors import Unavailable
from dualpath.transfer.lane import Lane
from dualpath.transfer.lane_marks import LaneMarks
from dualpath.transfer.rdma.config import RdmaConfig
from dualpath.transfer.rdma.engine import RdmaEngine
from dualpath.transfer.rdma.library import open_verbs
from dualpath.transfer.rdma.messages import Grant
from dualpath.transfer.rdma.native_device import NativeVerbs
from dualpath.transfer.rdma.port_choice import choose_port
from dualpath.transfer.rdma.pyverbs_device import PyverbsVerbs
from dualpath.transfer.rdma.rdma_transport import RdmaTransport
from dualpath.transfer.rdma.registration_cache import address_of
from dualpath.transfer.rdma.verbs import PathSettings, QueueLimits, QueuePairAddress
from dualpath.transfer.rdma.work_rows import write_rows
from dualpath.transfer.region import DmaBuf, Region, RegionDescriptor
from dualpath.transfer.tcp_transport import TcpConfig
from dualpath.transfer.transport import OnPeerLost, Write, WriteStatus

MIB = 1 << 20
QUEUE_BYTES_MAX = 32 * MIB
CHECK_S_MAX = 100
# The processor is emulated and may stand still for a third of a second where the machine is busy:
# no reason to give a peer up.
CONFIG = RdmaConfig(
    device="rxe0",
    timeout_exponent=16,
    fence_wait_s=5.0,
    grace_s=5.0,
    set_up=TcpConfig(queue_bytes_max=QUEUE_BYTES_MAX),
)
# Which queue pair is served first is the network's business then.
LANES_APART = replace(
    CONFIG, set_up=TcpConfig(queue_bytes_max=QUEUE_BYTES_MAX, marks=LaneMarks((8, 10, 12, 14)))
)
DONE, LOST = WriteStatus.DONE, WriteStatus.LOST


@contextmanager
def pair(
    writer_lost: OnPeerLost,
    reader_lost: OnPeerLost,
    config: RdmaConfig = CONFIG,
    libraries: tuple[str, str] = ("native", "native"),
) -> Iterator[TransportPair]:
    """The writer on one device, the reader on the other. What ends a connection is printed."""
    writer_lost, reader_lost = _told(WRITER, writer_lost), _told(READER, reader_lost)
    ours, theirs = map(open_verbs, libraries)
    writer = RdmaTransport(WRITER, writer_lost, ours, config)
    reader = RdmaTransport(READER, reader_lost, theirs, replace(config, device="rxe1"))
    try:
        yield TransportPair(
            writer, reader, "127.0.0.1:0", lambda n: Region.memfd("test", n), QUEUE_BYTES_MAX
        )
    finally:
        writer.close()
        reader.close()


def _told(name: str, on_lost: OnPeerLost) -> OnPeerLost:
    def told(peer: str, reason: str) -> None:
        on_lost(peer, reason)
        print(f"  the {name} lost the {peer}: {reason}")

    return told


WITHOUT_WINDOWS = partial(pair, config=replace(CONFIG, memory_windows=False))


ESSENTIAL = (
    "strided_ranges_land_byte_for_byte",
    "revoke_fences_what_is_arriving",
    "disarm_fences_its_tags_only",
    "each_write_completes_exactly_once",
)


def without_memory_windows_the_contract_holds_too() -> None:
    """Fences end the connection then, where the writer does not come to its end."""
    for name in ESSENTIAL:
        CHECKS[name](WITHOUT_WINDOWS)


def by_pyverbs_the_contract_holds_too() -> None:
    """It is used where the native part was not built."""
    for name in ESSENTIAL:
        if name != "revoke_fences_what_is_arriving":  # the longest, and the mixed ends run it
            CHECKS[name](partial(pair, libraries=("pyverbs", "pyverbs")))


def a_native_end_and_one_by_pyverbs_understand_each_other() -> None:
    """Whichever of them writes."""
    CHECKS["either_side_may_write"](partial(pair, libraries=("native", "pyverbs")))
    CHECKS["revoke_fences_what_is_arriving"](partial(pair, libraries=("pyverbs", "native")))


def both_ways_find_the_same_device() -> None:
    """Limits, ports, GIDs."""
    found = []
    for library in (NativeVerbs(), PyverbsVerbs()):
        assert sorted(library.devices()) == ["rxe0", "rxe1"]
        device = library.open("rxe1")
        found.append(device.info)
        device.close()
    native, other = found
    assert native.ports == other.ports, found
    assert replace(native, pieces_max=0) == replace(other, pieces_max=0), found


def a_dmabuf_that_is_refused_is_named_and_host_memory_taken_instead() -> None:
    """This kernel's rdma_rxe registers none."""
    for library in (NativeVerbs(), PyverbsVerbs()):
        device = library.open("rxe0")
        region = Region.memfd("exported", MIB)
        reason = "a memfd was registered"
        try:
            device.register_dmabuf(region.fd, 0, MIB, writable=True).close()
        except Unavailable as error:
            reason = error.reason
            print(f"  {error}")
        device.close()
        assert reason == "no_dmabuf", reason
    with scene_of(pair) as scene:
        source, target = scene.source(MIB), Region.anonymous(MIB)
        target.dmabuf = DmaBuf(os.memfd_create("exported"), 0)
        scene.send(source, scene.window(target), extents(1, MIB)[0])
        assert scene.finish(1) == [DONE]
        assert target.view == source.view


def a_post_that_is_refused_is_named() -> None:
    """One that has more pieces than the queue pair was made for."""
    device = NativeVerbs().open("rxe0")
    queue = device.completion_queue(16)
    limits = QueueLimits(sends=8, receives=1, pieces=2)
    made = device.queue_pair(queue, limits, 1)
    target = device.queue_pair(queue, limits, 1)
    region = Region.anonymous(4096)
    memory = device.register(address_of(region), region.nbytes, writable=True)
    port = choose_port(device.info)
    ends = [
        QueuePairAddress(each.number, 7, port.port.lid, port.gid.gid, port.port.mtu)
        for each in (made, target)
    ]
    made.join(ends[0], ends[1], PathSettings(1, port.gid.row, 0, 0))
    pieces = [(address_of(region) + at, 8) for at in range(0, 32, 8)]
    good, bad = (write_rows(pieces[:count], memory.lkey, 0, 1) for count in (2, 4))
    said = ""
    try:
        made.post_rows(good * 3 + bad + good)
    except Unavailable as error:
        said = str(error)
    assert "took 3 of 5" in said, said
    for each in (made, target):
        each.halt()
        each.close()
    memory.close()
    queue.close()
    device.close()


def lanes_have_queue_pairs_of_their_own() -> None:
    """Where they are marked apart."""
    apart = partial(pair, config=LANES_APART)
    for name in ("either_side_may_write", "a_fence_stops_its_parts_of_a_batch_only"):
        CHECKS[name](apart)


# Packets.


@contextmanager
def netem(*arguments: str) -> Iterator[None]:
    """The cable treats packets as told, in both directions."""
    for end in ("cable0", "cable1"):
        subprocess.run(
            ["tc", "qdisc", "replace", "dev", end, "root", "netem", *arguments],
            check=True,
            timeout=WAIT_S,
        )
    try:
        yield
    finally:
        for end in ("cable0", "cable1"):
            subprocess.run(
                ["tc", "qdisc", "delete", "dev", end, "root"], check=True, timeout=WAIT_S
            )


def dropped() -> int:
    """Packets that the cable has lost so far."""
    said = subprocess.run(
        ["tc", "-s", "qdisc", "show"], check=True, capture_output=True, text=True, timeout=WAIT_S
    )
    words = said.stdout.replace(",", " ").split()
    return sum(int(words[at + 1]) for at, word in enumerate(words) if word == "(dropped")


def lost_packets_are_sent_again() -> None:
    """One packet in a hundred is lost, and every byte lands.

    Without memory windows: this kernel's rdma_rxe does not always go on after a loss once a BIND
    or an INVALIDATE is in the send queue.
    """
    soon = replace(CONFIG, memory_windows=False, timeout_exponent=14)
    with scene_of(partial(pair, config=soon)) as scene, netem("loss", "1%"):
        source, target = scene.source(8 * MIB), Region.anonymous(8 * MIB)
        window = scene.window(target)
        for slices in extents(32, 256 << 10):
            scene.send(source, window, slices)
        assert scene.finish(32) == [DONE] * 32
        assert target.view == source.view
        lost = dropped()
        assert lost > 0, "no packet was lost"
        print(f"  {lost} packets were lost")


def with_memory_windows_a_loss_costs_the_connection_at_most() -> None:
    """Every write ends in bounded time, and what is DONE is right."""
    with scene_of(
        partial(pair, config=replace(CONFIG, silent_s=2.0, timeout_exponent=14))
    ) as scene:
        source, target = scene.source(8 * MIB), Region.anonymous(8 * MIB)
        window = scene.window(target)
        with netem("loss", "2%"):
            for slices in extents(32, 256 << 10):
                scene.send(source, window, slices)
            statuses = scene.finish(32)
        assert set(statuses) <= {DONE, LOST}, statuses
        for status, slices in zip(statuses, extents(32, 256 << 10), strict=True):
            part = slice(slices.start, slices.end)
            assert status is LOST or target.view[part] == source.view[part]
        print(f"  {statuses.count(DONE)} of 32 writes were done, then {scene.writer_heard.losses}")


def a_cut_cable_ends_in_bounded_time() -> None:
    """The retries of the device end, and the writes are lost by name."""
    with scene_of(pair) as scene:
        source, target = scene.source(4 * MIB), Region.anonymous(4 * MIB)
        window = scene.window(target)
        scene.send(source, window, extents(1, MIB)[0])
        assert scene.finish(1) == [DONE]
        with netem("loss", "100%"):
            begun = time.monotonic()
            scene.send(source, window, extents(4, MIB)[1])
            assert scene.finish(2) == [DONE, LOST]
            took = time.monotonic() - begun
        scene.writer_heard.wait_losses(1)
        assert "retries exhausted" in scene.writer_heard.losses[0][1], scene.writer_heard
        assert took < 10, took
        print(f"  noticed after {took:.1f} s")
        scene.reader_heard.wait_losses(1)
        scene.connect()
        scene.send(source, scene.window(target), extents(1, MIB)[0])
        assert scene.finish(3)[2] is DONE


# Keys.


def a_wrong_key_touches_nothing() -> None:
    """The device refuses it, and both ends lose the connection."""
    with scene_of(pair) as scene:
        source, target = scene.source(MIB), Region.anonymous(MIB)
        window = scene.window(target)
        sender = scene.writer._connected(READER).first.sender  # type: ignore[attr-defined]
        assert isinstance(sender, RdmaEngine)
        granted = sender._writer.granted

        def forge(grant: Grant) -> None:
            granted(replace(grant, rkey=grant.rkey ^ 0x100))

        sender._writer.granted = forge  # type: ignore[method-assign]
        scene.send(source, window, extents(1, MIB)[0])
        assert scene.finish(1) == [LOST]
        scene.writer_heard.wait_losses(1)
        assert "remote access" in scene.writer_heard.losses[0][1], scene.writer_heard
        scene.reader_heard.wait_losses(1)
        assert target.view == bytes(MIB)


# Another process.


class Child:
    """A writer in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--writer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.address, secret = self.process.stdout.readline().split()
        self.invitation = bytes.fromhex(secret)

    def write(self, window: RegionDescriptor, count: int) -> None:
        """Begin to write `count` MiB."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{window.to_bytes().hex()} {count}\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """Without a word."""
        self.process.kill()
        self.process.wait(WAIT_S)


def write_as_told() -> None:
    """The child's side."""
    transport = RdmaTransport(WRITER, lambda *_: None, NativeVerbs(), CONFIG)
    print(transport.listen("127.0.0.1:0"), transport.invite(READER).hex(), flush=True)
    for line in sys.stdin:
        said, count = line.split()
        window = RegionDescriptor.from_bytes(bytes.fromhex(said))
        source = Region.anonymous(int(count) * MIB)
        source.view[:] = pattern(source.nbytes)
        for tag, slices in enumerate(extents(int(count), MIB)):
            write = Write(source, slices, window, slices, Lane.LOAD_PREFILL, tag, 60.0)
            transport.write(READER, write, lambda _: None)


def a_fence_of_a_stopped_writer_returns_and_holds() -> None:
    """Also when the writer is let go on later."""
    heard, child = Recorder(), Child()
    config = replace(CONFIG, device="rxe1", fence_wait_s=0.5, withdraw_wait_s=2.0)
    reader = RdmaTransport(READER, heard.on_lost, NativeVerbs(), config)
    try:
        target = Region.anonymous(24 * MIB)
        window = reader.expose(target, 0, target.nbytes, heard.on_arrival)
        reader.arm(window, list(enumerate(extents(24, MIB))))
        reader.connect(WRITER, child.address, child.invitation, deadline_s=WAIT_S)
        child.write(window, 24)
        wait_for_byte(target, MIB)
        child.process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        unlanded = reader.disarm(window, range(24))
        reader.revoke(window)
        took = time.monotonic() - begun
        before = bytes(target.view)
        print(f"  the fence took {took:.2f} s, {len(unlanded)} of 24 had not landed")
        assert took < 15, took
        child.process.send_signal(signal.SIGCONT)
        time.sleep(2)  # for whatever was posted; nothing may come of it
        assert bytes(target.view) == before, "bytes landed after the fence"
        arrived = {arrival.tag for arrival in heard.arrivals}
        assert unlanded == set(range(24)) - arrived, (unlanded, arrived)
    finally:
        child.kill()
        reader.close()


def a_killed_writer_is_noticed_and_replaced() -> None:
    """In bounded time; what had not landed can be armed again."""
    heard, child = Recorder(), Child()
    reader = RdmaTransport(READER, heard.on_lost, NativeVerbs(), replace(CONFIG, device="rxe1"))
    try:
        target = Region.anonymous(24 * MIB)
        window = reader.expose(target, 0, target.nbytes, heard.on_arrival)
        reader.arm(window, list(enumerate(extents(24, MIB))))
        reader.connect(WRITER, child.address, child.invitation, deadline_s=WAIT_S)
        child.write(window, 24)
        wait_for_byte(target, 0)
        child.kill()
        begun = time.monotonic()
        heard.wait_losses(1)
        print(f"  noticed after {time.monotonic() - begun:.2f} s")
        unlanded = reader.disarm(window, range(24))
        arrived = {arrival.tag for arrival in heard.arrivals}
        assert unlanded == set(range(24)) - arrived, (unlanded, arrived)
        child = Child()
        reader.connect(WRITER, child.address, child.invitation, deadline_s=WAIT_S)
        fresh = Recorder()
        window = reader.expose(target, 0, target.nbytes, fresh.on_arrival)
        reader.arm(window, list(enumerate(extents(24, MIB))))
        child.write(window, 24)
        fresh.wait_arrivals(24)
        assert target.view == pattern(target.nbytes)
    finally:
        child.kill()
        reader.close()


def conformance(check: Callable[..., None]) -> Callable[[], None]:
    """A check of the suite, over the devices."""
    return lambda: check(pair)


def main(verdict: Path, names: list[str]) -> None:
    """Run the checks with these names, or all of them."""
    checks: dict[str, Callable[[], None]] = {
        name: conformance(check) for name, check in CHECKS.items()
    }
    for check in (
        both_ways_find_the_same_device,
        a_post_that_is_refused_is_named,
        a_dmabuf_that_is_refused_is_named_and_host_memory_taken_instead,
        by_pyverbs_the_contract_holds_too,
        a_native_end_and_one_by_pyverbs_understand_each_other,
        lanes_have_queue_pairs_of_their_own,
        without_memory_windows_the_contract_holds_too,
        with_memory_windows_a_loss_costs_the_connection_at_most,
        lost_packets_are_sent_again,
        a_cut_cable_ends_in_bounded_time,
        a_wrong_key_touches_nothing,
        a_fence_of_a_stopped_writer_returns_and_holds,
        a_killed_writer_is_noticed_and_replaced,
    ):
        checks[check.__name__] = check
    found: dict[str, str] = {}
    for name in names or checks:
        begun = time.monotonic()
        faulthandler.dump_traceback_later(CHECK_S_MAX, exit=True)
        try:
            checks[name]()
            found[name] = "passed"
        except Exception:  # noqa: BLE001 - it is the verdict
            found[name] = traceback.format_exc()
        print(f"{time.monotonic() - begun:6.1f} s  {name}: {found[name]}", flush=True)
        verdict.write_text(json.dumps(found))
    faulthandler.cancel_dump_traceback_later()
    found["finished"] = "passed"
    verdict.write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "--writer":
        write_as_told()
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
