# The native extension module (kvstore/native/). Optional: import it only inside try/except
# ImportError, in the module that also holds, or chooses, the Python twin.
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
