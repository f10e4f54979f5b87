"""`dualpath invalidate`: blocks that must not be used any more leave a daemon, for good."""

from __future__ import annotations

import argparse
import json

from dualpath.cli.daemon_stub import (
    add_daemon_arguments,
    configs_of,
    daemon_stub,
    hash_of,
    namespace_id_of,
)
from dualpath.cli.sizes import format_bytes
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import InvalidRequest

_EXAMPLE = """example:
  dualpath invalidate --namespace 0f..9a --dry-run          # how much would go
  dualpath invalidate --namespace 0f..9a                    # all of a namespace
  dualpath invalidate --namespace 0f..9a --hash 5c..11      # a block and what builds on it
  dualpath invalidate --writer token:prefill-3              # what this principal has stored

`dualpath lookup --json` shows namespace ids and hashes, `dualpath top` namespaces and principals.
Lookups miss the blocks at once (reason `invalidated`), and they do not come back after a crash.
Whoever reads one already keeps its bytes until he releases them. Needs the right `admin`."""


class InvalidateCommand:
    """See the module docstring."""

    name = "invalidate"
    help = "remove blocks by namespace, prefix or writer"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """What is to go."""
        parser.epilog = _EXAMPLE
        add_daemon_arguments(parser)
        parser.add_argument("--namespace", metavar="HEX", help="a namespace id")
        parser.add_argument("--hash", metavar="HEX", help="a block of it, with its descendants")
        parser.add_argument("--writer", metavar="PRINCIPAL", help="what this principal has stored")
        parser.add_argument("--dry-run", action="store_true", help="only count")
        parser.add_argument(
            "--deadline-s", type=float, default=600.0, help="longest wait (default 600)"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Ask, and print how much went."""
        if not (args.namespace or args.writer):
            raise InvalidRequest("give --namespace or --writer: all of a store never leaves")
        request = store_pb2.InvalidateRequest(
            namespace_id=namespace_id_of(args.namespace),
            hash=hash_of(args.hash),
            writer=args.writer or "",
            dry_run=args.dry_run,
        )
        (config,) = configs_of(args)
        with daemon_stub(config) as daemon:
            answer = daemon.stub.Invalidate(
                request, timeout=args.deadline_s, metadata=daemon.metadata
            )
        if args.json:
            print(
                json.dumps(
                    {
                        "dry_run": args.dry_run,
                        "blocks": answer.blocks,
                        "bytes": answer.bytes,
                        "leased_blocks": answer.leased_blocks,
                    }
                )
            )
        else:
            verb = "would leave" if args.dry_run else "left"
            print(
                f"{answer.blocks} blocks ({format_bytes(answer.bytes)}) {verb}, "
                f"{answer.leased_blocks} of them in use"
            )
        return 0


command = InvalidateCommand()
