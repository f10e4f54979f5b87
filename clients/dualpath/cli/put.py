"""`dualpath put`: store a file's bytes as blocks, named by token ids or by a key.

The bytes go over the data plane, as an engine's would. The file is framed (`FileFrame`) unless
--raw says that it is KV as it is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, cast

from dualpath.cli.block_identity import BlockIdentity, add_identity_arguments, identity_of
from dualpath.cli.block_stream import BlockStream
from dualpath.cli.connection import (
    ClientConfig,
    add_connection_arguments,
    connection_of,
    open_client,
)
from dualpath.cli.daemon_stub import CALL_S_MAX, daemon_stub
from dualpath.cli.file_frame import FileFrame
from dualpath.cli.sizes import format_bytes, format_rate
from dualpath.kvstore.store_api import ReserveStatus
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import DualPathError, InvalidRequest

_SPOOL_BYTES = 64 << 20
_EXAMPLE = """example:
  dualpath put photo.jpg --key photo                     # dualpath get --key photo -o copy.jpg
  tar c src | dualpath put - --key src.tar
  dualpath put kv.bin --raw --tokens prompt.json --model my-model@main --layers 8 \\
      --block-tokens 64 --layer-bytes 65536 --dtype float32

With --raw the file must be a whole number of blocks of layers x layer-bytes; the prompt's token
ids name them, and get or an engine finds them by the same token ids and the same namespace.
A name's blocks never change: other bytes under the same name are refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PutReport:
    """What --json prints. `last_hash` is the chain hash of the last block."""

    namespace_id: str
    blocks: int
    new_blocks: int
    block_bytes: int
    file_bytes: int
    sha256: str
    last_hash: str
    elapsed_s: float
    bytes_per_s: float


class PutCommand:
    """See the module docstring."""

    name = "put"
    help = "store a file as blocks"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """File, identity, connection."""
        parser.epilog = _EXAMPLE
        parser.add_argument("file", metavar="FILE", help="the file; - for stdin")
        parser.add_argument(
            "--durable",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="return only after the blocks would survive a loss of power (the default)",
        )
        add_identity_arguments(parser)
        add_connection_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Store the file and report."""
        if args.file == "-" and args.tokens == "-":
            raise InvalidRequest("the file and the tokens cannot both come from stdin")
        identity = identity_of(args)
        config = connection_of(args)
        with _opened(args.file) as file:
            try:
                report = asyncio.run(_put(file, identity, config, durable=args.durable))
            except DualPathError as error:
                if error.reason == ReserveStatus.FULL.value:
                    raise DualPathError(f"{error}; {_room(config)}", reason=error.reason) from error
                raise
        if args.json:
            print(json.dumps(asdict(report)))
        else:
            print(
                f"stored {format_bytes(report.file_bytes)} in {report.blocks} blocks, "
                f"{report.new_blocks} of them new, at {format_rate(report.bytes_per_s)}"
            )
        return 0


async def _put(
    file: BinaryIO, identity: BlockIdentity, config: ClientConfig, *, durable: bool
) -> PutReport:
    frame = FileFrame.of(file)
    blocks = _blocks_of(frame, identity)
    identity.hashes(blocks)  # refuse too few tokens before anything is moved
    pending = b"" if identity.raw else frame.head()
    file.seek(0)

    def fill(buffer: memoryview) -> int:
        nonlocal pending
        filled = len(pending)
        buffer[:filled] = pending
        pending = b""
        while filled < len(buffer):
            data = file.read(len(buffer) - filled)
            if not data:
                break
            buffer[filled : filled + len(data)] = data
            filled += len(data)
        return filled

    client = await open_client(config)
    try:
        stream = BlockStream(client, config, identity)
        namespace_id = await stream.open()
        begin = time.monotonic()
        saved = await stream.save(blocks, fill, durable=durable)
        elapsed_s = time.monotonic() - begin
    finally:
        await client.close()
    return PutReport(
        namespace_id=namespace_id.hex(),
        blocks=saved.blocks,
        new_blocks=saved.new_blocks,
        block_bytes=identity.layout.block_bytes,
        file_bytes=frame.nbytes,
        sha256=frame.sha256.hex(),
        last_hash=identity.hashes(blocks)[-1].hex(),
        elapsed_s=elapsed_s,
        bytes_per_s=frame.nbytes / elapsed_s,
    )


def _blocks_of(frame: FileFrame, identity: BlockIdentity) -> int:
    block_bytes = identity.layout.block_bytes
    if not identity.raw:
        return -(-frame.framed_bytes // block_bytes)
    if frame.nbytes == 0 or frame.nbytes % block_bytes:
        raise InvalidRequest(
            f"--raw: the file has {frame.nbytes} bytes, which is not a whole number of blocks of "
            f"{identity.layout.layers} x {identity.layout.layer_bytes} = {block_bytes} bytes"
        )
    return frame.nbytes // block_bytes


def _room(config: ClientConfig) -> str:
    """How large the store is, as far as it can be asked, and what makes it larger."""
    settings = (
        "disk_bytes and dram_bytes of the daemon set its size (`dualpath serve --help`); "
        "what was stored stays until others need the room"
    )
    if config.agent:
        return settings  # its daemons are not known here
    try:
        with daemon_stub(config) as daemon:
            stats = daemon.stub.Stats(
                store_pb2.StatsRequest(), timeout=CALL_S_MAX, metadata=daemon.metadata
            )
    except DualPathError:
        return settings
    tiers = ", ".join(f"{tier.tier} {format_bytes(tier.capacity_bytes)}" for tier in stats.tier)
    return f"it holds {tiers}: {settings}"


@contextlib.contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    """The file, or a seekable copy of stdin: its length and digest go in front of it."""
    if name == "-":
        with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES) as spool:
            while data := sys.stdin.buffer.read(1 << 20):
                spool.write(data)
            yield cast(BinaryIO, spool)
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(Path(name).open("rb"))
        except OSError as error:
            raise InvalidRequest(f"cannot read {name}: {error.strerror}") from error
        if not file.seekable():
            raise InvalidRequest(f"{name} cannot be read twice; pipe it in and give -")
        yield file


command = PutCommand()
