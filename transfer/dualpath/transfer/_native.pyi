# The native extension module (transfer/native/). Optional: import it only inside try/except
# ImportError, in the module that also holds, or chooses, the Python twin.
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
    sizes: Sequence[int],
    target: Buffer,
    target_at: tuple[int, int, Sequence[int], Sequence[int]],
    source: Buffer,
    source_at: tuple[int, int, Sequence[int], Sequence[int]],
    interrupt: Buffer,
    hashed: bool,
    /,
) -> list[int]: ...
