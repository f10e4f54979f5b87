"""Network namespaces of one run: made, shaped, entered, and removed whatever happens.

Owns the namespaces whose names start with this process's prefix
`dualpath-<pid>-<start time>-<random>`; the start time tells a living owner from another process
that got its number. `close` removes them; it also runs at interpreter exit. What a killed run left
behind is removed by `sweep_stale` of the next one. Nothing else of the host is changed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from dualpath.bench.demo import shaping
from dualpath.bench.demo.shaping import Command, LinkRates
from dualpath.bench.demo.topology import Topology
from dualpath.transfer.errors import Unavailable

NAMESPACES_FOLDER = Path("/run/netns")
COMMAND_S_MAX = 10.0
_NAME = re.compile(r"dualpath-(\d+)-([0-9a-f]+)-[0-9a-f]{4}-.+")


def _start_time(pid: int) -> int | None:
    """Clock ticks after boot at which `pid` started, None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is a name in parentheses that may itself contain spaces and parentheses.
    return int(stat.rpartition(")")[2].split()[19])


def _new_prefix() -> str:
    pid = os.getpid()
    return f"dualpath-{pid}-{_start_time(pid) or 0:x}-{secrets.token_hex(2)}"


def stale_namespaces(names: Iterable[str]) -> list[str]:
    """Those of `names` that a run made whose process is gone."""
    stale = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match and _start_time(int(match[1])) != int(match[2], 16):
            stale.append(name)
    return stale


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
    names = [path.name for path in NAMESPACES_FOLDER.glob("dualpath-*")]
    removed = 0
    for name in stale_namespaces(names):
        with contextlib.suppress(Unavailable):
            _run(("ip", "netns", "delete", name))
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
    prefix = _new_prefix()
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
        self._prefix = _new_prefix()
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
