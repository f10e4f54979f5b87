"""Network namespaces of one run: made, shaped, entered, and removed whatever happens.

Owns the namespaces whose names start with this process's prefix
`dualpath-<owner tag>`. `close` removes them; it also runs at interpreter exit. What a killed run
left behind is removed by `sweep_stale` of the next one. Nothing else of the host is changed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from dualpath.bench.testbed import shaping
from dualpath.bench.testbed.ownership import is_stale, owner_tag
from dualpath.bench.testbed.shaping import Command, LinkRates
from dualpath.bench.testbed.topology import Topology
from dualpath.transfer.errors import Unavailable

NAMESPACES_FOLDER = Path("/run/netns")
COMMAND_S_MAX = 10.0
NAME_PREFIX = "dualpath-"


def _run(command: Command) -> None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"`{' '.join(command)}` did not run: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Unavailable(
            f"`{' '.join(command)}` failed ({done.returncode}): {said[0] if said else 'no output'}"
        )


def sweep_stale() -> int:
    """Remove namespaces of runs that were killed; return how many."""
    removed = 0
    for path in NAMESPACES_FOLDER.glob(f"{NAME_PREFIX}*"):
        if not is_stale(path.name, NAME_PREFIX):
            continue
        with contextlib.suppress(Unavailable):
            _run(("ip", "netns", "delete", path.name))
            removed += 1
    return removed


def why_not_kernel() -> str:
    """ "" if the kernel can shape links for us, else the reason, for people."""
    if os.name != "posix" or not Path("/proc/self/ns/net").exists():
        return "this kernel has no network namespaces"
    if os.geteuid() != 0:
        return "not root (network namespaces and HTB need it)"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed (Debian, Ubuntu: apt install iproute2)"
    sweep_stale()
    prefix = NAME_PREFIX + owner_tag()
    try:
        for command in shaping.probe_commands(prefix):
            _run(command)
    except Unavailable as error:
        return str(error)
    finally:
        _remove(prefix, Topology.of(1, 0))
    return ""


def _remove(prefix: str, topology: Topology) -> None:
    for command in shaping.destroy_commands(prefix, topology):
        if (NAMESPACES_FOLDER / command[-1]).exists():
            with contextlib.suppress(Unavailable):
                _run(command)


class Namespaces:
    """The namespaces of one topology. Raises Unavailable, naming the command that failed."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._prefix = NAME_PREFIX + owner_tag()
        self._owner = os.getpid()
        self._closed = False
        atexit.register(self.close)
        try:
            for command in shaping.create_commands(self._prefix, topology):
                _run(command)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Namespaces {self._prefix} {self._topology.label} {state}>"

    def shape(self, rates: LinkRates) -> None:
        """Limit the links; once only."""
        for command in shaping.shape_commands(self._prefix, self._topology, rates):
            _run(command)

    def limit_storage(self, node: str, rate_bytes_per_s: float, snic: int = 0) -> None:
        """Another limit for a SNIC of a node, once links are shaped."""
        index = self._index(node)
        each = self._topology.nodes[index]
        for command in shaping.limit_storage_commands(
            self._prefix, index, each, rate_bytes_per_s, snic
        ):
            _run(command)

    def limit_compute(self, node: str, rail: int, rate_bytes_per_s: float) -> None:
        """Another limit for a CNIC of a node, once links are shaped."""
        each = self._topology.nodes[self._index(node)]
        for command in shaping.limit_compute_commands(self._prefix, each, rail, rate_bytes_per_s):
            _run(command)

    def plug_storage(self, node: str, snic: int = 0, *, up: bool) -> None:
        """Pull the plug of a node's SNIC at the switch, or put it in again."""
        port = shaping.storage_port(self._index(node), snic)
        _run(shaping.port_command(self._prefix, port, up=up))

    def plug_compute(self, node: str, rail: int, *, up: bool) -> None:
        """The same for a CNIC."""
        port = shaping.compute_port(self._index(node), rail)
        _run(shaping.port_command(self._prefix, port, up=up))

    def _index(self, node: str) -> int:
        return [each.name for each in self._topology.nodes].index(node)

    def enter(self, node: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` on `node`."""
        return ["ip", "netns", "exec", shaping.namespace_name(self._prefix, node), *argv]

    def close(self) -> None:
        """Remove everything. Idempotent; does nothing in a forked child."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        _remove(self._prefix, self._topology)
        atexit.unregister(self.close)
