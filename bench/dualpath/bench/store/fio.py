"""The disk's limit: fio with io_uring and O_DIRECT, on the same kind of pages as our arena.

fio has no option for transparent huge pages in its buffers; glibc's malloc has one
(`glibc.malloc.hugetlb=1`, glibc 2.35), which `--mem=malloc` then uses. Without it fio reads into
4 KiB pages and would flatter whoever is compared with it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dualpath.bench.rounds import GIB, Sample
from dualpath.bench.store.pages import PageKind
from dualpath.transfer.errors import Unavailable

DEPTH = 32
RUN_S_MAX = 300
_HUGE_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclass(frozen=True, slots=True)
class FioJob:
    """One run. `total_bytes` are moved, over the files in turn. `more` are further options."""

    files: Sequence[Path]
    pattern: str
    block_bytes: int
    total_bytes: int
    depth: int = DEPTH
    more: Sequence[str] = ()


class Fio:
    """The installed fio; raises Unavailable with the remedy if there is none."""

    def __init__(self, pages: PageKind) -> None:
        found = shutil.which("fio")
        if found is None:
            raise Unavailable(
                "fio is not installed, so there is no limit to compare with; "
                "install it (Debian: apt install fio) and run again"
            )
        self._program = found
        self._memory, self._environment = _memory_option(pages)
        self.version = _output([found, "--version"]).strip()

    def run(self, job: FioJob) -> Sample:
        """Run it; the seconds are of the transfer, the processor time too, without fio's start."""
        argv = [
            self._program,
            "--name=limit",
            "--filename=" + ":".join(str(path).replace(":", r"\:") for path in job.files),
            "--file_service_type=sequential",
            f"--rw={job.pattern}",
            f"--bs={job.block_bytes}",
            f"--io_size={job.total_bytes}",
            f"--iodepth={job.depth}",
            "--ioengine=io_uring",
            "--direct=1",
            "--allow_file_create=1",
            f"--mem={self._memory}",
            "--output-format=json",
            *job.more,
        ]
        report = json.loads(_output(argv, self._environment))["jobs"][0]
        if report["error"]:
            raise Unavailable(f"fio failed with error {report['error']} ({' '.join(argv)})")
        moved = [report[way] for way in ("read", "write") if report[way]["io_bytes"]]
        seconds = max(way["runtime"] for way in moved) / 1000
        # Percentages of the job's run time, so that laying out files is not counted.
        cpu_s = (report["usr_cpu"] + report["sys_cpu"]) / 100 * report["job_runtime"] / 1000
        detail = {
            f"{way}_gibs": report[way]["io_bytes"] / GIB / max(report[way]["runtime"], 1) * 1000
            for way in ("read", "write")
        }
        return Sample(sum(way["io_bytes"] for way in moved), seconds, cpu_s, detail)


def _memory_option(pages: PageKind) -> tuple[str, Mapping[str, str]]:
    if pages is PageKind.RESERVED_HUGE:
        return "mmaphuge", {}
    if pages is PageKind.SMALL:
        return "mmap", {}
    library, version = platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if library != "glibc" or numbers < (2, 35):
        raise Unavailable(
            f"fio cannot use transparent huge pages here: that takes glibc 2.35, this is "
            f"{library or 'another C library'} {version}; reserve huge pages instead "
            "(sysctl vm.nr_hugepages=64)"
        )
    return "malloc", _HUGE_MALLOC


def _output(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            argv,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=RUN_S_MAX,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{argv[0]} did not run: {error}") from error
    if done.returncode:
        raise Unavailable(
            f"{argv[0]} ended with status {done.returncode}: {done.stderr.strip()[-500:]}"
        )
    return done.stdout


def fio_version() -> str:
    """For the report; `absent` without fio."""
    try:
        return Fio(PageKind.SMALL).version
    except Unavailable:
        return "absent"
