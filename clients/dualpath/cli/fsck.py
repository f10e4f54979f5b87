"""`dualpath fsck`: check a data directory that nobody uses, and repair it if asked to.

Exit codes: 0 clean, or repaired; 1 problems found, or left after a repair; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

from dualpath.cli.sizes import format_bytes
from dualpath.kvstore.fsck import Fsck
from dualpath.kvstore.fsck_repair import FsckRepair
from dualpath.kvstore.fsck_report import FsckReport
from dualpath.transfer.errors import Unavailable

_SHOWN_MAX = 100
_BAR_CHARS = 40
_REDRAWN_S = 0.2
_EXAMPLE = """example:
  dualpath fsck DIR                 # look, change nothing
  dualpath fsck DIR --repair        # what is replaced is kept in DIR/damaged
  dualpath fsck DIR --raw-device /dev/nvme1n1 --json

Notes (padding, headers of free slots, an unclean stop) are no problems.
exit codes: 0 clean or repaired, 1 problems, 2 wrong usage"""


class FsckCommand:
    """See the module docstring."""

    name = "fsck"
    help = "check a data directory, and repair it"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Directory, --repair, --json."""
        parser.epilog = _EXAMPLE
        parser.add_argument("directory", metavar="DIR", help="data directory; its store is stopped")
        parser.add_argument(
            "--repair", action="store_true", help="repair what can be; nothing is deleted"
        )
        parser.add_argument(
            "--raw-device", default="", metavar="PATH", help="where the segments are, if not in DIR"
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object")

    def run(self, args: argparse.Namespace) -> int:
        """Check, repair, print."""
        progress = _bar() if sys.stderr.isatty() and not args.json else _silent
        try:
            with Fsck(args.directory, raw_device=args.raw_device, on_progress=progress) as fsck:
                found = fsck.check()
                left = FsckRepair(fsck).run() if args.repair else found
        except OSError as error:
            raise Unavailable(f"{args.directory}: {error}; nothing was lost") from error
        if args.json:
            print(json.dumps(_as_json(found, left)))
        else:
            _print(found, left)
        return 1 if left.problems else 0


def _silent(done: int, total: int) -> None:
    """No progress."""


def _bar() -> Callable[[int, int], None]:
    drawn = 0.0

    def draw(done: int, total: int) -> None:
        nonlocal drawn
        now = time.monotonic()
        if now - drawn < _REDRAWN_S and done < total:
            return
        drawn = now
        filled = _BAR_CHARS * done // max(1, total)
        bar = "#" * filled + "." * (_BAR_CHARS - filled)
        end = "\n" if done >= total else ""
        text = f"\r{bar} {format_bytes(done)} of {format_bytes(total)}"
        print(text, end=end, file=sys.stderr, flush=True)

    return draw


def _as_json(found: FsckReport, left: FsckReport) -> dict[str, object]:
    return {
        "clean": not found.problems,
        "blocks": found.blocks,
        "bad_blocks": found.bad_blocks,
        "segments": found.segments,
        "namespaces": found.namespaces,
        "read_bytes": found.read_bytes,
        "problems": found.problems,
        "notes": found.notes,
        "counts": {code.value: count for code, count in sorted(found.counts.items(), key=str)},
        "findings": [
            {"code": item.code.value, "where": item.where, "detail": item.detail}
            for item in found.findings
        ],
        "repairs": left.repairs,
        "problems_left": left.problems,
    }


def _print(found: FsckReport, left: FsckReport) -> None:
    for shown, item in enumerate(found.findings):
        if shown == _SHOWN_MAX:
            print(f"... and {sum(found.counts.values()) - shown} more; --json shows them")
            break
        kind = "problem" if item.code.is_problem else "note"
        print(f"{kind}: {item.code.value}: {item.where}: {item.detail}")
    for text in left.repairs:
        print(f"repaired: {text}")
    print(
        f"{found.blocks} blocks in {found.segments} segments, {found.namespaces} namespaces, "
        f"{format_bytes(found.read_bytes)} of blocks read: "
        + (f"{found.problems} problems" if found.problems else "clean")
        + (f", {found.notes} notes" if found.notes else "")
    )
    if left is not found:
        print(f"after the repair: {left.problems} problems")


command = FsckCommand()
