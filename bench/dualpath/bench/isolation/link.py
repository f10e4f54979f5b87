"""Two network namespaces with two links between them, shaped by the kernel into two classes.

Owns the commands and the namespaces, which are named after this process, removed by `close`, and
swept away by the next run if this one is killed. Both directions of both links have the same HTB:
unmarked traffic, the model's, is guaranteed all but `KV_SHARE` of the rate; packets with the KV's
DSCP are guaranteed that share and may borrow what the model leaves. The queue of each class is
bounded. (Paper, traffic isolation; its weights are 99 to 1.)
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from dualpath.bench.testbed.namespaces import COMMAND_S_MAX, NAME_PREFIX, NAMESPACES_FOLDER
from dualpath.bench.testbed.ownership import is_stale, owner_tag
from dualpath.transfer.errors import Unavailable
from dualpath.transfer.lane_marks import DSCP_KV

Command = tuple[str, ...]
KV_SHARE = 0.05
MTU_BYTES = 9000
QUANTUM_BYTES = 60_000
CEIL_BURST_BYTES = 64 << 10
"""What may pass at once above the link's rate: one segment as the kernel hands them down."""
BURST_BYTES = {"10": 256 << 10, "20": 64 << 10}
"""What a class may send out of its own guarantee after a rest, by class: an operation of the model
begins without asking what the KV has borrowed."""
QUEUE_S = 0.01
QUEUE_BYTES_MIN, QUEUE_BYTES_MAX = 128 << 10, 4 << 20
LINKS = ("compute", "other")
"""The link that the model uses, and one for the KV that is to leave the model alone."""
SIDES = ("a", "b")
_PREFIX = f"{NAME_PREFIX}iso-"


def address_of(side: str, link: str) -> str:
    """The address of a side on a link."""
    return f"10.79.{LINKS.index(link) + 1}.{SIDES.index(side) + 1}"


def create_commands(prefix: str) -> list[Command]:
    """Namespaces, veth pairs, addresses."""
    a, b = (f"{prefix}-{side}" for side in SIDES)
    commands: list[Command] = [("ip", "netns", "add", each) for each in (a, b)]
    commands += [("ip", "-n", each, "link", "set", "lo", "up") for each in (a, b)]
    for link in LINKS:
        pair = ("link", "add", link, "mtu", str(MTU_BYTES), "type", "veth", "peer", "name", link)
        commands.append(("ip", "-n", a, *pair, "mtu", str(MTU_BYTES), "netns", b))
        for side, namespace in zip(SIDES, (a, b), strict=True):
            address = f"{address_of(side, link)}/24"
            commands.append(("ip", "-n", namespace, "addr", "add", address, "dev", link))
            commands.append(("ip", "-n", namespace, "link", "set", link, "up"))
    return commands


def shape_commands(namespace: str, device: str, rate_bytes_per_s: float) -> list[Command]:
    """HTB of one direction of a link."""

    def tc(*words: str) -> Command:
        return ("tc", "-n", namespace, *words)

    def bits(share: float) -> str:
        return f"{round(rate_bytes_per_s * 8 * share)}bit"

    def burst(nbytes: int) -> Command:
        ceil = str(CEIL_BURST_BYTES)
        return ("burst", str(nbytes), "cburst", ceil, "quantum", str(QUANTUM_BYTES))

    queue = str(round(min(QUEUE_BYTES_MAX, max(QUEUE_BYTES_MIN, rate_bytes_per_s * QUEUE_S))))
    commands = [
        tc("qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "10"),
        tc("class", "add", "dev", device, "parent", "1:", "classid", "1:1", "htb",
            "rate", bits(1), "ceil", bits(1), *burst(CEIL_BURST_BYTES)),
    ]  # fmt: skip
    for number, priority, share in (("10", "0", 1 - KV_SHARE), ("20", "1", KV_SHARE)):
        commands += [
            tc("class", "add", "dev", device, "parent", "1:1", "classid", f"1:{number}", "htb",
                "rate", bits(share), "ceil", bits(1), "prio", priority,
                *burst(BURST_BYTES[number])),
            tc("qdisc", "add", "dev", device, "parent", f"1:{number}", "handle", f"{number}:",
                "bfifo", "limit", queue),
        ]  # fmt: skip
    match = ("match", "ip", "tos", hex(DSCP_KV << 2), "0xfc", "flowid", "1:20")
    commands.append(
        tc("filter", "add", "dev", device, "parent", "1:", "protocol", "ip", "u32", *match)
    )
    return commands


class SharedLink:
    """The namespaces. Raises Unavailable, naming the command that failed."""

    def __init__(self, rate_bytes_per_s: float) -> None:
        self._prefix = _PREFIX + owner_tag()
        self._owner = os.getpid()
        self._closed = False
        atexit.register(self.close)
        try:
            for command in create_commands(self._prefix):
                _run(command)
            for side in SIDES:
                for link in LINKS:
                    for command in shape_commands(f"{self._prefix}-{side}", link, rate_bytes_per_s):
                        _run(command)
        except BaseException:
            self.close()
            raise

    def enter(self, side: str) -> list[str]:
        """What to put before a command line to run it on a side."""
        return ["ip", "netns", "exec", f"{self._prefix}-{side}"]

    def close(self) -> None:
        """Remove everything. Idempotent; does nothing in a forked child."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        for side in SIDES:
            if (NAMESPACES_FOLDER / f"{self._prefix}-{side}").exists():
                with contextlib.suppress(Unavailable):
                    _run(("ip", "netns", "delete", f"{self._prefix}-{side}"))
        atexit.unregister(self.close)


def why_not() -> str:
    """ "" if this machine can have such links, else the reason, for people."""
    if not Path("/proc/self/ns/net").exists():
        return "this kernel has no network namespaces"
    if os.geteuid() != 0:
        return "not root (network namespaces and HTB need it)"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed (Debian, Ubuntu: apt install iproute2)"
    for path in NAMESPACES_FOLDER.glob(f"{_PREFIX}*"):
        if is_stale(path.name, _PREFIX):
            with contextlib.suppress(Unavailable):
                _run(("ip", "netns", "delete", path.name))
    try:
        SharedLink(50e6).close()
    except Unavailable as error:
        return str(error)
    return ""


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_S_MAX, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"`{' '.join(command)}` did not run: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Unavailable(
            f"`{' '.join(command)}` failed ({done.returncode}): {said[0] if said else 'no output'}"
        )
