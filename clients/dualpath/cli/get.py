"""`dualpath get`: bring a stored file back, verified, to a file or to stdout.

A file appears under its name only when it is complete; what was written to stdout, a device or a
FIFO is followed by exit code 1 if it turned out not to be.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
import time
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
from dualpath.cli.file_frame import FileFrame
from dualpath.cli.output_file import STDOUT, OutputFile, is_stdout, open_output
from dualpath.cli.sizes import format_bytes, format_rate
from dualpath.transfer.errors import Corrupt, DualPathError, InvalidRequest

_EXAMPLE = """example:
  dualpath get --key photo -o copy.jpg
  dualpath get --key src.tar | tar t
  dualpath get --raw --tokens prompt.json --model my-model@main --layers 8 \\
      --block-tokens 64 --layer-bytes 65536 --dtype float32 -o kv.bin

With --raw, the longest stored prefix is written; the report says how many blocks that is."""


@dataclass(frozen=True, slots=True)
class GetReport:
    """What --json prints. `bytes_by_path` counts whole blocks as the paths carried them."""

    blocks: int
    file_bytes: int
    sha256: str
    bytes_by_path: dict[str, int]
    elapsed_s: float
    bytes_per_s: float


class GetCommand:
    """See the module docstring."""

    name = "get"
    help = "bring a stored file back"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Output, identity, connection."""
        parser.epilog = _EXAMPLE
        parser.add_argument(
            "-o", "--output", metavar="FILE", default=STDOUT, help="where to; - is stdout (default)"
        )
        add_identity_arguments(parser)
        add_connection_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Fetch, verify, report (on stderr if the file goes to stdout)."""
        if is_stdout(args.output):
            if args.json:
                raise InvalidRequest("--json needs -o FILE: stdout carries the file's bytes")
            if sys.stdout is None or sys.stdout.isatty():
                what = "a terminal" if sys.stdout else "a closed stdout"
                raise InvalidRequest(f"not writing bytes to {what}: give -o FILE, or pipe it on")
        identity = identity_of(args)
        with open_output(args.output) as file:
            report = asyncio.run(_get(file, identity, connection_of(args)))
        if args.json:
            print(json.dumps(asdict(report)))
        else:
            print(
                f"loaded {format_bytes(report.file_bytes)} in {report.blocks} blocks at "
                f"{format_rate(report.bytes_per_s)}",
                file=sys.stderr,
            )
        return 0


async def _get(file: OutputFile, identity: BlockIdentity, config: ClientConfig) -> GetReport:
    client = await open_client(config)
    try:
        stream = BlockStream(client, config, identity)
        await stream.open()
        begin = time.monotonic()
        if identity.raw:
            blocks, digest, nbytes, shares = await _copy_raw(stream, file, identity)
        else:
            frame = await read_frame(stream)
            blocks = -(-frame.framed_bytes // identity.layout.block_bytes)
            digest, nbytes, shares = await _copy(
                stream, file, blocks, FileFrame.HEAD_BYTES, frame.nbytes
            )
            if nbytes != frame.nbytes or digest != frame.sha256.hex():
                raise Corrupt("the file's SHA-256 differs from the one stored with it")
        elapsed_s = time.monotonic() - begin
    finally:
        await client.close()
    return GetReport(blocks, nbytes, digest, shares, elapsed_s, nbytes / elapsed_s)


async def read_frame(stream: BlockStream) -> FileFrame:
    """The frame of a stored file. Raises DualPathError, reason of the miss, if it is absent."""
    hit, miss, detail, _ = await stream.lookup(1)
    if not hit:
        raise DualPathError(_nothing("under this name", detail), reason=miss.value)
    frame: FileFrame | None = None
    async for view, _result in stream.load(1):
        frame = FileFrame.from_head(view)
    if frame is None:
        raise Corrupt("the first block has no bytes")
    return frame


def _nothing(where: str, detail: str) -> str:
    return f"nothing is stored {where}" + (f": {detail}" if detail else "")


async def _copy_raw(
    stream: BlockStream, file: OutputFile, identity: BlockIdentity
) -> tuple[int, str, int, dict[str, int]]:
    if identity.key:
        raise InvalidRequest("get --raw needs --tokens: a key does not say how many blocks")
    if not identity.blocks_max:
        identity.hashes(1)  # raises: not even one block
    hit, miss, detail, _ = await stream.lookup(identity.blocks_max)
    if not hit:
        raise DualPathError(_nothing("for these tokens", detail), reason=miss.value)
    nbytes = hit * identity.layout.block_bytes
    return hit, *await _copy(stream, file, hit, 0, nbytes)


async def _copy(
    stream: BlockStream, file: OutputFile, blocks: int, skip: int, nbytes: int
) -> tuple[str, int, dict[str, int]]:
    """Write bytes [skip, skip + nbytes) of the blocks; (SHA-256, bytes, bytes by path)."""
    digest, left = hashlib.sha256(), nbytes
    shares: Counter[str] = Counter()
    async for view, result in stream.load(blocks):
        with view[skip : skip + left] as part:
            digest.update(part)
            file.write(part)
            left -= len(part)
        skip = 0
        shares.update(result.shares)
    return digest.hexdigest(), nbytes - left, dict(shares)


command = GetCommand()
