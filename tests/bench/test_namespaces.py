"""Kernel shaping as it is: links hold their rates, and nothing is left behind."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from dualpath.bench.testbed.namespaces import (
    NAMESPACES_FOLDER,
    Namespaces,
    sweep_stale,
    why_not_kernel,
)
from dualpath.bench.testbed.shaping import LinkRates
from dualpath.bench.testbed.topology import Topology

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

SENDER = """
import socket, sys, threading
server = socket.create_server((sys.argv[1], 9000))
print("ready", flush=True)
def serve(peer):
    data = bytes(1 << 20)
    try:
        while True:
            peer.sendall(data)
    except OSError:
        pass
while True:
    peer, _ = server.accept()
    threading.Thread(target=serve, args=(peer,), daemon=True).start()
"""
RECEIVER = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], 9000), timeout=10)
data, count, start = bytearray(1 << 20), 0, time.monotonic() + 0.3
end = start + 0.9
while (now := time.monotonic()) < end:
    got = peer.recv_into(data)
    count += got if now >= start else 0
print(count / (end - start))
"""


@pytest.fixture(scope="module")
def spaces() -> Iterator[Namespaces]:
    reason = why_not_kernel()
    if reason:
        pytest.skip(f"kernel shaping: {reason}")
    namespaces = Namespaces(Topology.of(1, 1))
    namespaces.shape(LinkRates(20e6, 80e6))
    yield namespaces
    namespaces.close()


def rates(spaces: Namespaces, pairs: list[tuple[str, str, str]]) -> list[float]:
    """Bytes a second of (sender node, its address, receiver node), all at the same time."""
    senders, receivers = [], []
    try:
        for node, address in dict.fromkeys((node, address) for node, address, _ in pairs):
            argv = spaces.enter(node, [sys.executable, "-c", SENDER, address])
            senders.append(subprocess.Popen(argv, stdout=subprocess.PIPE))
            stdout = senders[-1].stdout
            assert stdout is not None
            assert stdout.readline()
        for _, address, node in pairs:
            argv = spaces.enter(node, [sys.executable, "-c", RECEIVER, address])
            receivers.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
        return [float(receiver.communicate(timeout=30)[0]) for receiver in receivers]
    finally:
        for process in senders + receivers:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def test_each_storage_link_has_a_rate_of_its_own(spaces: Namespaces) -> None:
    got = rates(
        spaces,
        [("storage", "10.77.1.1", "prefill-0"), ("storage", "10.77.1.1", "decode-0")],
    )
    assert got == pytest.approx([20e6, 20e6], rel=0.1)


def test_a_nodes_own_traffic_shares_its_compute_link_with_what_comes_from_others(
    spaces: Namespaces,
) -> None:
    alone = rates(spaces, [("prefill-0", "10.77.2.10", "prefill-0")])
    assert alone == pytest.approx([80e6], rel=0.15)
    both = rates(
        spaces,
        [("prefill-0", "10.77.2.10", "prefill-0"), ("decode-0", "10.77.2.100", "prefill-0")],
    )
    assert sum(both) == pytest.approx(80e6, rel=0.15)


def test_namespaces_of_a_killed_run_are_swept(spaces: Namespaces) -> None:
    code = """
from dualpath.bench.testbed.namespaces import Namespaces
from dualpath.bench.testbed.topology import Topology
import signal
print(Namespaces(Topology.of(1, 0)), flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        prefix = run.stdout.readline().split()[1]
        run.send_signal(signal.SIGKILL)
    assert list(NAMESPACES_FOLDER.glob(f"{prefix}-*"))
    assert sweep_stale() >= 3
    assert not list(NAMESPACES_FOLDER.glob(f"{prefix}-*"))


def test_closing_removes_everything_and_may_be_repeated(spaces: Namespaces) -> None:
    prefix = repr(spaces).split()[1]
    other = Namespaces(Topology.of(1, 0))
    name = repr(other).split()[1]
    assert len(list(NAMESPACES_FOLDER.glob(f"{name}-*"))) == 3
    other.close()
    other.close()
    assert not list(NAMESPACES_FOLDER.glob(f"{name}-*"))
    assert list(NAMESPACES_FOLDER.glob(f"{prefix}-*"))
