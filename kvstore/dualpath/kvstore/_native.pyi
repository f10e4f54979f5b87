# The native extension module (kvstore/native/). Optional: import it only inside try/except
# ImportError, in the module that also holds, or chooses, the Python twin.
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
