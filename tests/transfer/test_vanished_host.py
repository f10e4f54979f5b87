"""A host that vanishes without a word is noticed, whether anything is being sent or not."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.tcp_transport import TcpConfig, TcpTransport
from dualpath.transfer.transport import Completion, Write, WriteStatus

WAIT_S = 30.0
NBYTES = 1 << 20

PEER = """
import sys
from dualpath.transfer import TcpTransport
transport = TcpTransport("peer", lambda *_: None)
print(transport.listen(sys.argv[1]), transport.invite("us").hex(), flush=True)
input()
"""

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None,
        reason="needs root and `ip` to make a network namespace",
    ),
]


@dataclass(frozen=True, slots=True)
class OtherHost:
    """A network namespace that is joined to ours by a cable."""

    name: str
    address: str

    def run(self, *command: str) -> list[str]:
        """The command, inside."""
        return ["ip", "netns", "exec", self.name, *command]

    def vanish(self) -> None:
        """Pull the cable out."""
        _ip("-n", self.name, "link", "set", "eth0", "down")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=WAIT_S)


@pytest.fixture
def other_host() -> Iterator[OtherHost]:
    unique = secrets.token_hex(3)
    name, cable = f"vanish-{unique}", f"van{unique}"
    # From the block for tests between devices (RFC 2544), so that it is nobody's network.
    subnet = f"198.19.{secrets.randbelow(256)}"
    try:
        _ip("netns", "add", name)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
    except (OSError, subprocess.CalledProcessError) as error:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        pytest.skip(f"this machine makes no network namespace: {error}")
    try:
        _ip("address", "add", f"{subnet}.1/24", "dev", cable)
        _ip("link", "set", cable, "up")
        _ip("-n", name, "address", "add", f"{subnet}.2/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        yield OtherHost(name, f"{subnet}.2:0")
    finally:
        _ip("netns", "delete", name)  # the cable goes with it


@pytest.mark.parametrize("busy", [False, True])
def test_a_host_that_vanished_is_given_up_and_its_writes_are_lost(
    other_host: OtherHost, busy: bool
) -> None:
    lost, ended = threading.Event(), threading.Event()
    completions: list[Completion] = []

    def on_completion(completion: Completion) -> None:
        completions.append(completion)
        ended.set()

    command = other_host.run(sys.executable, "-c", PEER, other_host.address)
    us = TcpTransport("us", lambda *_: lost.set(), TcpConfig(vanished_s=2.0))
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as peer:
        try:
            assert peer.stdout is not None
            address, invitation = peer.stdout.readline().split()
            us.connect("peer", address, bytes.fromhex(invitation), deadline_s=WAIT_S)
            other_host.vanish()
            assert not lost.is_set()
            if busy:
                source, whole = Region.anonymous(NBYTES), Slices.contiguous(0, NBYTES)
                window = RegionDescriptor(1, 1, 0, NBYTES)
                write = Write(source, whole, window, whole, Lane.SAVE, 1, 2 * WAIT_S)
                us.write("peer", write, on_completion)
                assert ended.wait(WAIT_S), "the write outlived its host"
                assert completions[0].status is WriteStatus.LOST
            assert lost.wait(WAIT_S), "nobody noticed"
        finally:
            us.close()
            peer.kill()
