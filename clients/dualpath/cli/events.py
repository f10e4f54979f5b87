"""`dualpath events`: follow which blocks become present at a daemon and which leave."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from dualpath.cli.daemon_stub import (
    add_daemon_arguments,
    configs_of,
    daemon_stub,
    namespace_id_of,
)
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import InvalidRequest

_EXAMPLE = """example:
  dualpath events                                     # what comes from now on
  dualpath events --from 1 --json | head -1000        # and what the daemon still remembers
  dualpath events 10.0.0.5:7070 --namespace 0f..9a

One line an event. `lost N` (in JSON: {"lost": N}) says that N events were overwritten before they
were read: whoever follows the store must start anew. Ends with the daemon or by an interrupt."""
_KINDS = {
    store_pb2.BLOCK_EVENT_KIND_STORED: "stored",
    store_pb2.BLOCK_EVENT_KIND_REMOVED: "removed",
    store_pb2.BLOCK_EVENT_KIND_CLEARED: "cleared",
}


class EventsCommand:
    """See the module docstring."""

    name = "events"
    help = "follow which blocks come and go"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Where to begin."""
        parser.epilog = _EXAMPLE
        add_daemon_arguments(parser)
        parser.add_argument("--namespace", metavar="HEX", help="only this namespace id")
        parser.add_argument(
            "--from", dest="start", type=int, default=0, metavar="N", help="first sequence number"
        )
        parser.add_argument("--limit", type=int, default=0, help="end after so many events")

    def run(self, args: argparse.Namespace) -> int:
        """Print events as they come."""
        if args.start < 0 or args.limit < 0:
            raise InvalidRequest("--from and --limit must not be negative")
        request = store_pb2.EventsRequest(
            from_sequence=args.start, namespace_id=namespace_id_of(args.namespace)
        )
        (config,) = configs_of(args)
        shown = 0
        with daemon_stub(config) as daemon:
            call = daemon.stub.Events(request, metadata=daemon.metadata)
            for answer in call:
                if args.limit:
                    del answer.event[args.limit - shown :]
                for line in _lines(answer, as_json=args.json):
                    print(line, flush=True)
                shown += len(answer.event)
                if args.limit and shown >= args.limit:
                    call.cancel()
                    return 0
        return 0


def _lines(answer: Any, *, as_json: bool) -> Iterator[str]:
    if answer.lost:
        lost = {"lost": answer.lost, "next_sequence": answer.next_sequence}
        yield json.dumps(lost) if as_json else f"lost {answer.lost}"
    for event in answer.event:
        values = {
            "sequence": event.sequence,
            "unix_s": event.unix_s,
            "kind": _KINDS.get(event.kind, "unknown"),
            "namespace_id": event.namespace_id.hex(),
            "hash": event.hash.hex(),
            "parent": event.parent.hex(),
            "reason": _reason(event.reason),
        }
        yield json.dumps(values) if as_json else _text(values)


def _text(values: dict[str, Any]) -> str:
    reason = "" if values["reason"] == "none" else f" {values['reason']}"
    return (
        f"{values['sequence']:>10} {values['kind']:8} {values['namespace_id']} "
        f"{values['hash'] or '*'}{reason}"
    )


def _reason(number: int) -> str:
    name = store_pb2.MissReason.Name(store_pb2.MissReason.ValueType(number))
    return name.removeprefix("MISS_REASON_").lower()


command = EventsCommand()
