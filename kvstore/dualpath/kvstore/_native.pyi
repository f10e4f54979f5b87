# The native extension module (kvstore/native/). Optional: import it only inside try/except
# ImportError, in the module that also holds, or chooses, the Python twin.
from typing import Any

import numpy as np
from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview

HASHED_BYTES_MIN: int

def copy_blocks(
    target: Buffer,
    target_at: Buffer,
    source: Buffer,
    source_at: Buffer,
    nbytes: int,
    chunk_bytes: int,
    checksums: Buffer | None,
    /,
) -> None: ...
def gather_blocks(
    target: Buffer,
    target_at: Buffer,
    sources: tuple[Buffer, ...],
    nbytes: int,
    chunk_bytes: int,
    checksums: Buffer | None,
    /,
) -> None: ...
def hash_extents(
    memory: Buffer, at: NDArray[np.int64], nbytes: NDArray[np.int64], sums: NDArray[np.uint64], /
) -> None: ...
def populate(buffer: Buffer, /) -> None: ...
def bind_node(buffer: Buffer, node: int, /) -> None: ...

class KeyIndex:
    def __new__(cls, seed: bytes, /) -> KeyIndex: ...
    def bind(
        self,
        namespaces: NDArray[np.int32],
        hashes: NDArray[np.uint8],
        lengths: NDArray[np.uint8],
        parents: NDArray[np.int32],
        /,
        *soon: NDArray[Any],
    ) -> None: ...
    def put(self, row: int, /) -> None: ...
    def put_first(self, count: int, /) -> None: ...
    def remove(self, row: int, /) -> None: ...
    def get(self, namespace: int, key: Buffer, /) -> int: ...
    def find_parents(
        self, hashes: NDArray[np.uint8], lengths: NDArray[np.uint8], out: NDArray[np.int32], /
    ) -> None: ...
    def prefix(
        self, namespace: int, keys: Buffer, key_bytes: int, out: NDArray[np.int32], /
    ) -> int: ...
    def __len__(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class Ring:
    def __init__(self, depth: int, /) -> None: ...
    @property
    def pending(self) -> int: ...
    def start(
        self,
        writing: bool,
        fds: NDArray[np.int32],
        offsets: NDArray[np.int64],
        memory: memoryview,
        at: NDArray[np.int64],
        nbytes: NDArray[np.int64],
        errors: NDArray[np.int32],
        most: int,
        paced: bool,
        /,
    ) -> None: ...
    def wait(self, told: NDArray[np.int32], least: int, timeout_s: float, /) -> int: ...
    def nudge(self) -> None: ...
    def cancel(self) -> None: ...
    def register(self, memory: memoryview, /) -> None: ...
    def close(self) -> None: ...

def gather_rows(
    rows: NDArray[np.int32],
    leases: NDArray[np.int32],
    resident: NDArray[np.bool_],
    checksum_rows: NDArray[np.int32],
    values: NDArray[np.uint64],
    tiers: NDArray[np.uint8],
    sums: NDArray[np.uint64],
    chunks: int,
    lease: bool,
    /,
) -> int: ...
