"""A cache's keys and values as blocks in memory that the agent shares.

Layer Block: keys then values, each `[kv heads, tokens, head dim]`. In memory the layers are kept
apart, `[layers, blocks, Layer Block]`, as engines with paged KV do; so a layer that has arrived can
be used while the next ones are still on their way.
"""

from __future__ import annotations

from typing import Any

import torch
from dualpath.agent.places import Places
from dualpath.bench.model import llama
from dualpath.kvstore.chain import chain_hashes
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace

BLOCK_TOKENS = 64


def layout_of(dtype: str) -> KVLayout:
    """Geometry of the model's blocks."""
    item_bytes = torch.empty((), dtype=getattr(torch, dtype)).element_size()
    return KVLayout(
        layers=llama.LAYERS,
        block_tokens=BLOCK_TOKENS,
        layer_bytes=2 * llama.KV_HEADS * BLOCK_TOKENS * llama.HEAD_DIM * item_bytes,
        dtype=dtype,
    )


def namespace_of(dtype: str, model: str) -> Namespace:
    """Who may share these blocks: users of the same checkpoint and type."""
    return Namespace(
        model=model, layout=layout_of(dtype), engine_format="transformers-dynamic-cache"
    )


def hashes_of(tokens: Any) -> list[bytes]:
    """Chain hashes of the full blocks of `[1, n]` token ids."""
    return chain_hashes(tokens[0].tolist(), BLOCK_TOKENS)


class KVMemory:
    """`blocks` blocks of KV in `view`, which holds at least their bytes."""

    def __init__(self, view: memoryview, dtype: str, blocks: int) -> None:
        self.blocks = blocks
        self._layout = layout_of(dtype)
        shape = (llama.LAYERS, blocks, 2, llama.KV_HEADS, BLOCK_TOKENS, llama.HEAD_DIM)
        flat = torch.frombuffer(view, dtype=getattr(torch, dtype))
        self._kv = flat[: torch.Size(shape).numel()].view(shape)

    @property
    def places(self) -> Places:
        """Where the agent finds each block."""
        return Places.paged(self._layout, tuple(range(self.blocks)), self.blocks)

    def write_from(self, cache: Any) -> None:
        """Take the first blocks of a cache."""
        for index, layer in enumerate(cache.layers):
            for part, tensor in enumerate((layer.keys, layer.values)):
                # [1, heads, tokens, dim] -> [blocks, heads, block tokens, dim]
                tokens = tensor[0, :, : self.blocks * BLOCK_TOKENS]
                blocks = tokens.view(llama.KV_HEADS, self.blocks, BLOCK_TOKENS, llama.HEAD_DIM)
                self._kv[index, :, part].copy_(blocks.transpose(0, 1))

    def layer(self, index: int, blocks: int) -> tuple[Any, Any]:
        """Keys and values `[1, heads, tokens, dim]` of the first `blocks` blocks, copied."""
        part = self._kv[index, :blocks].permute(1, 2, 0, 3, 4)
        keys, values = part.reshape(2, 1, llama.KV_HEADS, blocks * BLOCK_TOKENS, llama.HEAD_DIM)
        return keys, values
