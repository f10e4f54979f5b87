"""Geometry of a block: layers, tokens, bytes, and the chunks it is moved and verified in.

Full Block `[layers, tokens, bytes]`: its Layer Blocks `[1, tokens, bytes]` one after another
(paper, section on block layout). A chunk is a 4 KiB-aligned extent of the Full Block; the last
one may be shorter. Layer boundaries need not be chunk boundaries.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest

ALIGN_BYTES = 4096
CHUNK_BYTES_MIN = 256 << 10
CHUNKS_PER_BLOCK_MAX = 64
BLOCK_BYTES_MAX = 64 << 20
LAYERS_MAX = 1024
WORD_CHARS_MAX = 512
CHUNK_BYTES_MAX = BLOCK_BYTES_MAX // CHUNKS_PER_BLOCK_MAX

assert CHUNK_BYTES_MIN % ALIGN_BYTES == 0
assert CHUNK_BYTES_MAX >= CHUNK_BYTES_MIN


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What one block of a model's KV looks like; part of the namespace.

    `layer_bytes` is the size of one Layer Block, all KV heads of the shard and K with V.
    `dtype`, `scales` and `attention` are opaque words of the engine that guard against reading
    bytes of another meaning.
    """

    layers: int
    block_tokens: int
    layer_bytes: int
    dtype: str
    attention: str = "gqa"
    scales: str = ""

    def __post_init__(self) -> None:
        for name in ("dtype", "attention", "scales"):
            if len(getattr(self, name)) > WORD_CHARS_MAX:
                raise InvalidRequest(f"layout.{name} is longer than {WORD_CHARS_MAX} chars")
        if not 1 <= self.layers <= LAYERS_MAX:
            raise InvalidRequest(f"layers must lie in 1..{LAYERS_MAX}, not {self.layers}")
        if self.block_tokens < 1:
            raise InvalidRequest(f"block_tokens must be positive, not {self.block_tokens}")
        if self.layer_bytes < 1 or self.block_bytes > BLOCK_BYTES_MAX:
            raise InvalidRequest(
                f"a block of {self.layers} x {self.layer_bytes} bytes is outside of "
                f"1..{BLOCK_BYTES_MAX} bytes; use fewer tokens a block"
            )

    @property
    def block_bytes(self) -> int:
        """Bytes of a Full Block."""
        return self.layers * self.layer_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot that holds a Full Block: rounded up to 4 KiB."""
        return -(-self.block_bytes // ALIGN_BYTES) * ALIGN_BYTES

    @property
    def chunk_bytes(self) -> int:
        """Bytes of each chunk but the last, a multiple of 4 KiB."""
        share = -(-self.block_bytes // CHUNKS_PER_BLOCK_MAX)
        return max(CHUNK_BYTES_MIN, -(-share // ALIGN_BYTES) * ALIGN_BYTES)

    @property
    def chunk_count(self) -> int:
        """Chunks of a block."""
        return -(-self.block_bytes // self.chunk_bytes)

    def chunk_extent(self, chunk: int) -> tuple[int, int]:
        """(offset in the Full Block, bytes) of a chunk. Raises InvalidRequest."""
        if not 0 <= chunk < self.chunk_count:
            raise InvalidRequest(f"chunk {chunk} is outside of 0..{self.chunk_count - 1}")
        offset = chunk * self.chunk_bytes
        return offset, min(self.chunk_bytes, self.block_bytes - offset)

    def layers_complete_after(self, chunk: int) -> int:
        """How many leading layers are covered by chunks 0..chunk."""
        offset, nbytes = self.chunk_extent(chunk)
        return (offset + nbytes) // self.layer_bytes
