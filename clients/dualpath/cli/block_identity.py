"""Which blocks a command means: the namespace, and the chain hashes of token ids or of a key.

Owns the table `layout` of a layout file and its flags. A stored file is framed (`FileFrame`) and
kept apart from engines' KV by its engine format; with --raw the bytes are KV blocks as they are.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from dualpath.cli.config_file import add_config_arguments, given_flags, read_config
from dualpath.cli.file_frame import FRAMED_FORMAT
from dualpath.cli.token_list import parse_tokens, tokens_of_key
from dualpath.kvstore.chain import chain_hashes
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import BATCH_BLOCKS_MAX
from dualpath.transfer.errors import InvalidRequest

TABLE = "layout"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutSettings:
    """The namespace of the blocks. Whatever differs here differs in identity: nothing is shared."""

    model: str = "files"
    """Weights and revision, or any name of your own."""
    layers: int = 1
    """Layers of a block."""
    block_tokens: int = 16
    """Tokens of a block."""
    layer_bytes: int = 1 << 20
    """Bytes of one layer of a block."""
    dtype: str = "uint8"
    """The engine's word for the element type."""
    attention: str = "gqa"
    """The engine's word for the kind of attention."""
    scales: str = ""
    """The engine's word for quantisation scales."""
    lora: str = ""
    """Digest of the LoRA adapter."""
    shard: str = ""
    """Logical shard."""
    engine_format: str = ""
    """The engine's cache format, with --raw."""
    hash_root: str = ""
    """Root of the hash chain."""
    tenant: str = ""
    """Tenant."""
    salt: str = ""
    """Parts users of one tenant."""


@dataclass(frozen=True, slots=True)
class BlockIdentity:
    """What the flags name. `tokens` is empty for a key."""

    namespace: Namespace
    raw: bool
    key: str
    tokens: Sequence[int]

    @property
    def layout(self) -> KVLayout:
        """Geometry of a block."""
        return self.namespace.layout

    @property
    def blocks_max(self) -> int:
        """How many blocks the tokens can name."""
        if self.key:
            return BATCH_BLOCKS_MAX
        return min(len(self.tokens) // self.layout.block_tokens, BATCH_BLOCKS_MAX)

    def hashes(self, blocks: int) -> list[bytes]:
        """Chain hashes of the first `blocks` blocks. Raises InvalidRequest beyond `blocks_max`."""
        if not 1 <= blocks <= self.blocks_max:
            raise InvalidRequest(self._too_few(blocks))
        count = blocks * self.layout.block_tokens
        tokens = tokens_of_key(self.key, count) if self.key else self.tokens[:count]
        return chain_hashes(tokens, self.layout.block_tokens, root=self.namespace.hash_root)

    def _too_few(self, blocks: int) -> str:
        layout = self.layout
        if blocks > BATCH_BLOCKS_MAX:
            return (
                f"{blocks} blocks of {layout.block_bytes} bytes are more than {BATCH_BLOCKS_MAX}; "
                "use larger blocks (--layer-bytes)"
            )
        return (
            f"{blocks} blocks need {blocks * layout.block_tokens} tokens "
            f"({layout.block_tokens} a block), {len(self.tokens)} were given: give more tokens, "
            "larger blocks (--layer-bytes), or --key"
        )


def add_identity_arguments(parser: argparse.ArgumentParser) -> None:
    """--key or --tokens, --raw, and the flags of the layout."""
    named = parser.add_mutually_exclusive_group(required=True)
    named.add_argument("--key", metavar="TEXT", help="name the blocks by a text")
    named.add_argument(
        "--tokens", metavar="LIST", help="name them by token ids: 1,2,3 or 0..4095 or FILE or -"
    )
    parser.add_argument(
        "--raw", action="store_true", help="the bytes are KV blocks as they are, without a frame"
    )
    add_config_arguments(parser, LayoutSettings, config_flag="--layout")


def identity_of(args: argparse.Namespace) -> BlockIdentity:
    """From the layout file's [layout], DUALPATH_LAYOUT_* and flags. Raises InvalidRequest."""
    given = read_config(
        LayoutSettings,
        TABLE,
        file=args.layout,
        environment=os.environ,
        flags=given_flags(args, LayoutSettings),
    )
    if given.engine_format and not args.raw:
        raise InvalidRequest("--engine-format names KV of an engine: give --raw with it")
    layout = KVLayout(
        layers=given.layers,
        block_tokens=given.block_tokens,
        layer_bytes=given.layer_bytes,
        dtype=given.dtype,
        attention=given.attention,
        scales=given.scales,
    )
    namespace = Namespace(
        model=given.model,
        layout=layout,
        lora=given.lora,
        shard=given.shard,
        engine_format=given.engine_format if args.raw else FRAMED_FORMAT,
        hash_root=given.hash_root,
        tenant=given.tenant,
        salt=given.salt,
    )
    tokens = parse_tokens(args.tokens) if args.tokens is not None else ()
    if args.tokens is None and not args.key:
        raise InvalidRequest("--key is empty")
    try:
        (args.key or "").encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"--key {args.key!r} is no UTF-8: name the blocks otherwise"
        ) from error
    return BlockIdentity(namespace, args.raw, args.key or "", tokens)
