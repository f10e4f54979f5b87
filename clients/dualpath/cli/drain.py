"""`dualpath drain`: a daemon takes nothing new, finishes what runs, and makes everything durable.

Exit code 0 when nothing was left within the deadline, else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from dualpath.cli.daemon_stub import CALL_S_MAX, add_daemon_arguments, configs_of, daemon_stub
from dualpath.cli.sizes import parse_seconds
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import Unavailable

_EXAMPLE = """example:
  dualpath drain 10.0.0.5:7070                       # before an update; then stop the process
  dualpath drain unix:run/daemon.sock --deadline 30s --stop
  dualpath drain 10.0.0.5:7070 --resume              # serve again

While it drains the daemon is not ready (health NOT_SERVING, /readyz 503); look-ups without a lease,
renewals, deliveries and seals go on. Needs the right `admin` in all namespaces."""


class DrainCommand:
    """See the module docstring."""

    name = "drain"
    help = "let a daemon finish what runs, and take nothing new"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """How long, and what then."""
        parser.epilog = _EXAMPLE
        add_daemon_arguments(parser)
        parser.add_argument("--deadline", metavar="TIME", default="60s", help="(default 60s)")
        end = parser.add_mutually_exclusive_group()
        end.add_argument("--stop", action="store_true", help="end the process afterwards")
        end.add_argument("--resume", action="store_true", help="end an earlier drain")

    def run(self, args: argparse.Namespace) -> int:
        """Drain, and print progress on stderr and the end on stdout."""
        deadline_s = parse_seconds(args.deadline)
        request = store_pb2.DrainRequest(
            deadline_ms=max(1, round(deadline_s * 1000)), resume=args.resume, stop=args.stop
        )
        (config,) = configs_of(args)
        last: Any = None
        with daemon_stub(config) as daemon:
            # The flush at the end has a deadline of its own at the daemon.
            timeout_s = deadline_s + 60.0 + CALL_S_MAX
            for last in daemon.stub.Drain(request, timeout=timeout_s, metadata=daemon.metadata):
                if not last.done and not args.json:
                    print(f"{last.state}: {last.detail}", file=sys.stderr)
        if last is None or not last.done:
            raise Unavailable(
                f"{config.daemon} ended the stream before it was drained; does it still run?"
            )
        if args.json:
            print(json.dumps(_values(last)))
        else:
            print(f"{last.state}{': ' + last.detail if last.detail else ''}")
        return 0 if args.resume or last.state == "drained" else 1


def _values(progress: Any) -> dict[str, object]:
    return {
        name: getattr(progress, name)
        for name in (
            "state",
            "queue_bytes",
            "leases",
            "reservations",
            "streams",
            "flushed",
            "detail",
        )
    }


command = DrainCommand()
