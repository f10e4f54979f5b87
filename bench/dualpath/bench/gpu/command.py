"""The program `dualpath bench gpu`: correct first, then fast, one table and a JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dualpath.bench.gpu.paged_copies import PagedCopies
from dualpath.bench.machine import describe_machine, describe_versions
from dualpath.transfer.errors import Unavailable


class GpuCommand:
    """See Command (cli/command.py)."""

    name = "gpu"
    help = """copies between host memory and paged GPU memory, checked and timed

example:
  dualpath bench gpu --json out.json"""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Flags."""
        parser.add_argument("--json", type=Path, help="write the results here")
        parser.add_argument("--rounds", type=int, default=7, help="rounds of each figure")

    def run(self, args: argparse.Namespace) -> int:
        """0, also where there is no GPU (says so); 1 if a byte is wrong."""
        if args.rounds < 1:
            print(f"error: --rounds must be positive, not {args.rounds}", file=sys.stderr)
            return 2
        try:
            copies = PagedCopies()
        except Unavailable as error:
            print(f"skipped: {error}")
            return 0
        try:
            compared = copies.check()
            print(f"{copies.description}: {compared >> 20} MiB compared with NumPy, all equal")
            table = copies.measure(args.rounds, _progress)
            slow_down = copies.slow_down(args.rounds, _progress)
        finally:
            copies.close()
        print(f"{'copy':24} {'GiB/s':>8} {'of peak':>8}")
        for name, figures in table.items():
            assert isinstance(figures, dict)
            print(f"{name:24} {figures['gibs']:8.1f} {figures['ratio_to_peak']:8.2f}")
        for name, ratio in slow_down.items():
            print(f"matrix products, {name:7} x{ratio:.3f} of their time alone")
        if args.json is not None:
            result = {
                "device": copies.description,
                "machine": describe_machine(),
                "versions": describe_versions(),
                "rounds": args.rounds,
                "compared_bytes": compared,
                "copies": table,
                "slow_down": slow_down,
            }
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return 0


def _progress(line: str) -> None:
    print(line, file=sys.stderr)


command = GpuCommand()
