"""A chain of hashes as one run of bytes: how look-ups carry thousands of keys.

Owns the packing and the limits on it. All hashes of one chain have the same size, since they come
from one algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dualpath.kvstore.checksum import Buffer
from dualpath.kvstore.store_api import BATCH_BLOCKS_MAX, HASH_BYTES_MAX, HASH_BYTES_MIN
from dualpath.transfer.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class PackedHashes:
    """Hashes of `hash_bytes` each, one after another in `data`. Make it with `of` or `checked`."""

    data: Buffer
    hash_bytes: int

    @classmethod
    def of(cls, hashes: Sequence[bytes]) -> PackedHashes:
        """Pack. Raises InvalidRequest on a batch or a hash of a wrong size."""
        if len(hashes) > BATCH_BLOCKS_MAX:
            raise InvalidRequest(
                f"{len(hashes)} blocks in one batch; the most is {BATCH_BLOCKS_MAX}: split it"
            )
        sizes = set(map(len, hashes))
        if len(sizes) > 1:
            raise InvalidRequest(
                f"hashes of one chain have one size, not {sorted(sizes)} bytes: they come from one "
                "algorithm"
            )
        return cls.checked(b"".join(hashes), sizes.pop() if sizes else HASH_BYTES_MAX)

    @classmethod
    def checked(cls, data: Buffer, hash_bytes: int) -> PackedHashes:
        """Of bytes that came packed. Raises InvalidRequest."""
        nbytes = memoryview(data).nbytes
        if not HASH_BYTES_MIN <= hash_bytes <= HASH_BYTES_MAX:
            raise InvalidRequest(
                f"hash_bytes: {hash_bytes}; {HASH_BYTES_MIN}..{HASH_BYTES_MAX} are valid"
            )
        if nbytes % hash_bytes:
            raise InvalidRequest(
                f"hashes: {nbytes} bytes are no whole number of {hash_bytes}-byte hashes"
            )
        if nbytes // hash_bytes > BATCH_BLOCKS_MAX:
            raise InvalidRequest(
                f"{nbytes // hash_bytes} blocks in one batch; the most is {BATCH_BLOCKS_MAX}: "
                "split it"
            )
        return cls(data, hash_bytes)

    def part(self, start: int, end: int) -> PackedHashes:
        """Hashes [start, end), without a copy."""
        view = memoryview(self.data)[start * self.hash_bytes : end * self.hash_bytes]
        return PackedHashes(view, self.hash_bytes)

    def __len__(self) -> int:
        return memoryview(self.data).nbytes // self.hash_bytes

    def __iter__(self) -> Iterator[bytes]:
        for index in range(len(self)):
            yield self[index]

    def __getitem__(self, index: int) -> bytes:
        """Hash `index` as bytes of its own."""
        start = index * self.hash_bytes
        return bytes(self.data[start : start + self.hash_bytes])
