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
from dualpath.bench.testbed.process import die_with_parent
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

    def run(self, *jobs: FioJob) -> Sample:
        """Run them at once; the seconds are of the transfers, the processor time too, without
        fio's start. `detail` has `read_gibs` and `write_gibs`."""
        # Threads, not children: who ends the program ends its jobs.
        argv = [self._program, "--output-format=json", "--thread"]
        for number, job in enumerate(jobs):
            argv += self._options(f"limit-{number}", job)
        reports = json.loads(_output(argv, self._environment))["jobs"]
        nbytes, seconds, cpu_s = 0, 0.0, 0.0
        detail = {"read_gibs": 0.0, "write_gibs": 0.0}
        for report in reports:
            if report["error"]:
                raise Unavailable(f"fio failed with error {report['error']} ({' '.join(argv)})")
            # Percentages of the job's run time, so that laying out files is not counted.
            share = (report["usr_cpu"] + report["sys_cpu"]) / 100
            cpu_s += share * report["job_runtime"] / 1000
            for way in ("read", "write"):
                moved, way_s = report[way]["io_bytes"], report[way]["runtime"] / 1000
                nbytes += moved
                seconds = max(seconds, way_s)
                detail[f"{way}_gibs"] += moved / GIB / way_s if moved else 0.0
        return Sample(nbytes, seconds, cpu_s, detail)

    def _options(self, name: str, job: FioJob) -> list[str]:
        return [
            f"--name={name}",
            "--filename=" + ":".join(str(path).replace(":", r"\:") for path in job.files),
            f"--rw={job.pattern}",
            f"--bs={job.block_bytes}",
            f"--io_size={job.total_bytes}",
            f"--iodepth={job.depth}",
            "--ioengine=io_uring",
            "--direct=1",
            f"--mem={self._memory}",
            *job.more,
        ]


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
            preexec_fn=die_with_parent(),
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
