"""`dualpath lookup`: how much of a prefix is stored, where, and why not more. Moves no blocks
(for a --key, one: it holds the length)."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from dataclasses import asdict, dataclass

from dualpath.cli.block_identity import BlockIdentity, add_identity_arguments, identity_of
from dualpath.cli.block_stream import BlockStream
from dualpath.cli.connection import (
    ClientConfig,
    add_connection_arguments,
    connection_of,
    open_client,
)
from dualpath.cli.get import read_frame

_EXAMPLE = """example:
  dualpath lookup --key photo
  dualpath lookup --raw --tokens 0..4095 --model my-model@main --layers 8 \\
      --block-tokens 64 --layer-bytes 65536 --dtype float32 --json

Exit code 0 also when nothing is stored: a miss is an answer, with its reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupReport:
    """What --json prints. `blocks` were asked for; `tiers` counts blocks by tier."""

    namespace_id: str
    blocks: int
    hit_blocks: int
    hit_tokens: int
    hit_bytes: int
    tiers: dict[str, int]
    miss: str
    detail: str


class LookupCommand:
    """See the module docstring."""

    name = "lookup"
    help = "show how much of a prefix is stored"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Identity, connection."""
        parser.epilog = _EXAMPLE
        add_identity_arguments(parser)
        add_connection_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Ask and report."""
        report = asyncio.run(_lookup(identity_of(args), connection_of(args)))
        if args.json:
            print(json.dumps(asdict(report)))
            return 0
        tiers = ", ".join(f"{count} in {tier}" for tier, count in report.tiers.items())
        print(f"{report.hit_blocks} of {report.blocks} blocks" + (f": {tiers}" if tiers else ""))
        if report.miss != "none":
            print(f"miss: {report.miss}" + (f": {report.detail}" if report.detail else ""))
        return 0


async def _lookup(identity: BlockIdentity, config: ClientConfig) -> LookupReport:
    client = await open_client(config)
    try:
        stream = BlockStream(client, config, identity)
        namespace_id = await stream.open()
        asked = 1 if identity.key else max(identity.blocks_max, 1)
        hit, miss, detail, tiers = await stream.lookup(asked)
        if identity.key and hit and not identity.raw:
            frame = await read_frame(stream)
            asked = -(-frame.framed_bytes // identity.layout.block_bytes)
            hit, miss, detail, tiers = await stream.lookup(asked)
    finally:
        await client.close()
    return LookupReport(
        namespace_id=namespace_id.hex(),
        blocks=asked,
        hit_blocks=hit,
        hit_tokens=hit * identity.layout.block_tokens,
        hit_bytes=hit * identity.layout.block_bytes,
        tiers=dict(Counter(tiers)),
        miss=miss.value,
        detail=detail,
    )


command = LookupCommand()
