"""What a result was measured on: the machine and the versions, as plain values."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = ("dualpath", "grpcio", "protobuf", "lmdb", "numpy", "xxhash")


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


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2] for line in text.splitlines() if line.startswith("model name"))
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
