"""What a result was measured on: the machine and the versions, as plain values."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

PACKAGES = ("dualpath", "grpcio", "protobuf", "lmdb", "numpy", "xxhash")
BUSY_LOAD = 0.5
"""Load average a core beyond which a run is marked: others took part of the machine."""
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def describe_machine() -> dict[str, object]:
    """Cores that this process may use, memory, kernel, processor."""
    usable = getattr(os, "sched_getaffinity", None)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(usable(0)) if usable is not None else os.cpu_count(),
        "memory_gib": round(memory_bytes / (1 << 30), 1),
        "kernel": platform.release(),
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "load_average": os.getloadavg()[0],
    }


def busy_line(machine: Mapping[str, object]) -> str:
    """What to say of figures taken beside other work; "" if the machine was free."""
    load, cores = machine.get("load_average"), machine.get("cores")
    if isinstance(load, float) and isinstance(cores, int) and load > BUSY_LOAD * cores:
        return (
            f"the machine was busy when it began (load average {load:.1f} on {cores} cores): "
            "measure again when it is free"
        )
    return ""


def describe_storage(path: Path) -> dict[str, object]:
    """The disk and the file system under a folder, and what huge pages the kernel offers."""
    found = _mount_of(path.resolve())
    return {
        **found,
        "transparent_huge_pages": _chosen(_HUGE_PAGES / "enabled"),
        "shared_huge_pages": _chosen(_HUGE_PAGES / "shmem_enabled"),
        "reserved_huge_pages": _number(Path("/proc/sys/vm/nr_hugepages")),
    }


def _mount_of(path: Path) -> dict[str, object]:
    """From /proc/self/mountinfo: the mount with the longest prefix of `path`."""
    best: tuple[int, dict[str, object]] = (-1, {"file_system": "unknown", "disk": "unknown"})
    for line in _text(Path("/proc/self/mountinfo")).splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(), right.split()
        if len(fields) < 6 or len(tail) < 2:
            continue
        mount = Path(fields[4])
        if path.is_relative_to(mount) and len(mount.parts) >= best[0]:
            disk = f"{tail[1]} ({_disk_model(fields[2])})"
            best = (
                len(mount.parts),
                {"file_system": f"{tail[0]} {fields[5]}", "disk": disk},
            )
    return best[1]


def _disk_model(number: str) -> str:
    """Of a block device `major:minor`: its model or driver, and whether it says that it spins."""
    device = Path("/sys/dev/block") / number
    parent = device if (device / "queue").exists() else device / ".."
    model = _text(parent / "device" / "model").strip()
    spins = _text(parent / "queue" / "rotational").strip()
    scheduler = _chosen(parent / "queue" / "scheduler")
    kind = {"0": "not rotational", "1": "rotational"}.get(spins, "of unknown kind")
    return ", ".join(part for part in (model, kind, f"scheduler {scheduler}") if part)


def _chosen(path: Path) -> str:
    """The word in brackets of a sysfs choice."""
    text = _text(path)
    return text.partition("[")[2].partition("]")[0] or text.strip() or "unknown"


def _number(path: Path) -> int:
    text = _text(path).strip()
    return int(text) if text.isdigit() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _processor() -> str:
    names = (
        line.partition(":")[2]
        for line in _text(Path("/proc/cpuinfo")).splitlines()
        if line.startswith("model name")
    )
    return next(names, platform.processor()).strip()


def describe_versions() -> dict[str, str]:
    """Python and the packages that do the work."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions
