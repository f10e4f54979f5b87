"""RDMA devices, GPUs, and whether links can be shaped for the demo."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from dualpath.cli.finding import Finding, Status
from dualpath.transfer.errors import Unavailable
from dualpath.transfer.rdma.library import open_verbs
from dualpath.transfer.rdma.native_device import REMEDY, NativeVerbs
from dualpath.transfer.rdma.port_choice import choose_port
from dualpath.transfer.rdma.verbs import Verbs

_TIMEOUT_S = 10.0
# All of it happens in a network namespace that ends with the child.
_SHAPE = (
    "ip link add dpdoc0 type veth peer name dpdoc1 && "
    "tc qdisc add dev dpdoc0 root handle 1: htb default 1"
)


def network_findings() -> list[Finding]:
    """RDMA, GPU, shaping."""
    return [_rdma(), _gpu(), _shaping()]


def _rdma() -> Finding:
    try:
        verbs = open_verbs()
        found = [_rdma_port(verbs, name) for name in verbs.devices()]
    except Unavailable as error:
        try:
            names = sorted(path.name for path in Path("/sys/class/infiniband").iterdir())
        except OSError:
            names = []
        where = f"{', '.join(names)} in" if names else "none in"
        return Finding(
            name="RDMA devices",
            status=Status.ABSENT,
            detail=f"{where} /sys/class/infiniband; {str(error).partition(';')[0]}",
            cost="`compute-transport = rdma`: agents move blocks over TCP and shared memory",
            remedy=REMEDY,
        )
    return Finding(name="RDMA devices", status=Status.OK, detail=_how(verbs) + "; ".join(found))


def _how(verbs: Verbs) -> str:
    return "" if isinstance(verbs, NativeVerbs) else "by pyverbs, an object a request: "


def _rdma_port(verbs: Verbs, name: str) -> str:
    """A device, and the port and GID that an agent would use."""
    try:
        device = verbs.open(name)
        try:
            chosen = choose_port(device.info)
            windows = "" if device.info.memory_windows else ", no memory windows of type 2B"
        finally:
            device.close()
    except Unavailable as error:
        return f"{name}: {error}"
    kind = f"LID {chosen.port.lid}" if chosen.port.lid else f"{chosen.gid.kind} GID"
    return f"{name}: port {chosen.port.number}, {kind}, index {chosen.gid.row}{windows}"


def _gpu() -> Finding:
    try:
        devices = sorted(path.name for path in Path("/proc/driver/nvidia/gpus").iterdir())
    except OSError:
        devices = []
    if devices:
        return Finding(
            name="GPU", status=Status.OK, detail=f"{len(devices)} NVIDIA: {', '.join(devices)}"
        )
    return Finding(
        name="GPU",
        status=Status.ABSENT,
        detail="no NVIDIA driver or device",
        cost="nothing in this version, which loads into host memory",
        remedy="an NVIDIA GPU with its driver",
    )


def _shaping() -> Finding:
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    cost = "`dualpath demo` paces links in user space instead of shaping them in the kernel"
    if missing:
        return Finding(
            name="link shaping",
            status=Status.ABSENT,
            detail=f"not installed: {', '.join(missing)}",
            cost=cost,
            remedy="apt install iproute2 util-linux",
        )
    refused = _refused(["unshare", "--net", "sh", "-c", _SHAPE])
    if not refused:
        return Finding(
            name="link shaping", status=Status.OK, detail="network namespaces, veth and HTB work"
        )
    who = "root" if os.geteuid() == 0 else "not root"
    return Finding(
        name="link shaping",
        status=Status.ABSENT,
        detail=f"{who}: {refused}",
        cost=cost,
        remedy="run as root, with CAP_NET_ADMIN and CAP_SYS_ADMIN and the sch_htb module",
    )


def _refused(command: list[str]) -> str:
    """Empty, or why the command failed."""
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if ran.returncode == 0:
        return ""
    return ran.stderr.strip().splitlines()[-1] if ran.stderr.strip() else f"exit {ran.returncode}"
