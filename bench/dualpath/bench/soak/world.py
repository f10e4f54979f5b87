"""The small world of the soak: two tenants, their chains, and what each block must contain.

Everything follows from an index, so that any process can tell whose bytes it sees and whether
they are right. Chains of a tenant share their first blocks in pairs, so that trees are evicted,
not only lists. Pure.
"""

from __future__ import annotations

from functools import cache

from dualpath.bench.testbed.keyed_content import KeyedContent
from dualpath.kvstore.chain import chain_hashes
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_config import StoreConfig

CHAINS = 48
"""Chains of each tenant."""
CHAIN_BLOCKS = 5
SHARED_BLOCKS = 2
_BLOCK_TOKENS = 4

TENANTS = (
    Namespace(
        model="soak",
        layout=KVLayout(layers=3, block_tokens=_BLOCK_TOKENS, layer_bytes=9_000, dtype="bf16"),
        tenant="red",
    ),
    Namespace(
        model="soak",
        layout=KVLayout(layers=2, block_tokens=_BLOCK_TOKENS, layer_bytes=150_000, dtype="bf16"),
        tenant="blue",
    ),
)
"""Blocks of 27,000 bytes and of 300,000 in two chunks: neither fills its slot."""

STORE = StoreConfig(
    disk_bytes=24 << 20,
    dram_bytes=6 << 20,
    segment_bytes=2 << 20,
    read_buffers_bytes=2 << 20,
    reserve_wait_s=0.2,
    commit_wait_s=30.0,
)
"""Holds about a third of the world: it is always at capacity."""


@cache
def chain(tenant: int, number: int) -> tuple[bytes, ...]:
    """Hashes of a chain. Neighbours (2k, 2k + 1) share SHARED_BLOCKS blocks."""
    first = 1_000_000 * tenant + 1_000 * (number // 2)
    tokens = list(range(first, first + CHAIN_BLOCKS * _BLOCK_TOKENS))
    if number % 2:
        tokens[SHARED_BLOCKS * _BLOCK_TOKENS :] = [
            token + 500 for token in tokens[SHARED_BLOCKS * _BLOCK_TOKENS :]
        ]
    return tuple(chain_hashes(tokens, _BLOCK_TOKENS))


@cache
def _generator(tenant: int) -> KeyedContent:
    return KeyedContent(TENANTS[tenant].layout, seed=tenant)


def content(tenant: int, block_hash: bytes) -> bytes:
    """What the block must contain. One thread at a time."""
    layout = TENANTS[tenant].layout
    memory = bytearray(layout.block_bytes)
    _generator(tenant).fill(block_hash, memoryview(memory), 0, layout.layer_bytes)
    return bytes(memory)
