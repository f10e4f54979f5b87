"""`dualpath retain`: a stored prefix stays for a while, as long as anything else may make way."""

from __future__ import annotations

import argparse
import asyncio
import json

from dualpath.cli.block_identity import BlockIdentity, add_identity_arguments, identity_of
from dualpath.cli.block_stream import BlockStream
from dualpath.cli.connection import (
    ClientConfig,
    add_connection_arguments,
    connection_of,
    open_client,
)
from dualpath.cli.daemon_stub import CALL_S_MAX, daemon_stub
from dualpath.cli.get import read_frame
from dualpath.cli.sizes import parse_seconds
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import InvalidRequest

_EXAMPLE = """example:
  dualpath retain --key system-prompt --for 1d
  dualpath retain --key system-prompt --for 0          # not any longer
  dualpath retain --raw --tokens 0..4095 --model my-model@main --layers 8 \\
      --block-tokens 64 --layer-bytes 65536 --dtype float32 --for 12h --json

Retained blocks make way only when nothing else may. How much may be retained is bounded by the
daemon (`retain_bytes`): what does not fit is not retained. Asks the daemon itself (--daemon), and
needs the right `write`. Exit code 0 also when fewer blocks are retained than asked for."""


class RetainCommand:
    """See the module docstring."""

    name = "retain"
    help = "keep a stored prefix for a while"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Identity, time, connection."""
        parser.epilog = _EXAMPLE
        parser.add_argument(
            "--for", dest="time", required=True, metavar="TIME", help="such as 1d, 12h, 30min; 0"
        )
        add_identity_arguments(parser)
        add_connection_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Ask and report."""
        config, identity = connection_of(args), identity_of(args)
        retain_s = parse_seconds(args.time)
        if config.agent:
            raise InvalidRequest("retain asks the daemon itself: give --daemon, not --agent")
        namespace_id, blocks = asyncio.run(_stored(identity, config))
        hashes = identity.hashes(blocks) if blocks else []
        retained = _retain(config, namespace_id, hashes, retain_s)
        if args.json:
            print(json.dumps({"blocks": blocks, "retained_blocks": retained}))
        elif retain_s:
            print(f"{retained} of {blocks} stored blocks are retained for {args.time}")
        else:
            print(f"{blocks} stored blocks are not retained any longer")
        return 0


async def _stored(identity: BlockIdentity, config: ClientConfig) -> tuple[bytes, int]:
    """The namespace, and how many leading blocks are stored."""
    client = await open_client(config)
    try:
        stream = BlockStream(client, config, identity)
        namespace_id = await stream.open()
        hit, _, _, _ = await stream.lookup(1 if identity.key else max(identity.blocks_max, 1))
        if identity.key and hit and not identity.raw:
            frame = await read_frame(stream)
            hit, _, _, _ = await stream.lookup(
                -(-frame.framed_bytes // identity.layout.block_bytes)
            )
    finally:
        await client.close()
    return namespace_id, hit


def _retain(config: ClientConfig, namespace_id: bytes, hashes: list[bytes], retain_s: float) -> int:
    if not hashes:
        return 0
    request = store_pb2.RetainRequest(
        namespace_id=namespace_id,
        hashes=b"".join(hashes),
        hash_bytes=len(hashes[0]),
        retain_ms=round(retain_s * 1000),
    )
    with daemon_stub(config) as daemon:
        answer = daemon.stub.Retain(request, timeout=CALL_S_MAX, metadata=daemon.metadata)
    return int(answer.blocks)


command = RetainCommand()
