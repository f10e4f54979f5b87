# The native extension module (transfer/native/). Optional: import it only inside try/except
# ImportError, in the module that also holds, or chooses, the Python twin.
from array import array
from collections.abc import Sequence

Buffer = bytes | bytearray | memoryview

HASHED_BYTES_MIN: int

def receive(
    fd: int,
    parts: Sequence[memoryview],
    inside: int,
    nbytes: int,
    behind: memoryview,
    interrupt: Buffer,
    wait_ms: int,
    hashed: bool,
    /,
) -> tuple[int, int, bool, list[int]]: ...
def send(fd: int, parts: Sequence[Buffer], interrupt: Buffer, wait_ms: int, /) -> int: ...
def copy_parts(
    sizes: array[int],
    target: Buffer,
    target_at: tuple[int, int, array[int], array[int]],
    source: Buffer,
    source_at: tuple[int, int, array[int], array[int]],
    interrupt: Buffer,
    hashed: bool,
    /,
) -> list[int]: ...
def extent_of(
    stride: int,
    count: int,
    length: int,
    bases: array[int],
    skips: array[int],
    sizes: array[int],
    /,
) -> tuple[int, int, int, int, int]: ...
def rows_of(
    sizes: array[int],
    source_at: tuple[int, int, array[int], array[int]],
    target_at: tuple[int, int, array[int], array[int]],
    offset: int,
    end: int,
    skip: bytes,
    source: tuple[int, int],
    target: tuple[int, int],
    pieces_max: int,
    most: int,
    immediate: int,
    /,
) -> tuple[bytearray, int, int, int]: ...
