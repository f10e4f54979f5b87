"""Chain hashes: names of blocks that name the whole prefix.

Owns H(parent, tokens, extra) and its encoding. The same tokens give the same hashes in every
process, host and language. `sha256` and `blake3` resist forged collisions and are the only ones
to use across trust domains; `xxh3_128` is for one trust domain. A checksum is something else.

Encoding: H0 = H("dualpath-chain-1\\0" + block_tokens as u32 + root length as u32 + root + extra);
Hi = H(H(i-1) + tokens of block i as little-endian u64 + extra). Only full blocks have a hash.
"""

from __future__ import annotations

import hashlib
import importlib
import struct
from collections.abc import Callable, Sequence

import numpy as np
import xxhash
from dualpath.transfer.errors import InvalidRequest

_SEED = b"dualpath-chain-1\0"
_HEAD = struct.Struct("<II")

Digest = Callable[[bytes], bytes]


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _xxh3_128(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)


def _blake3() -> Digest | None:
    try:
        module = importlib.import_module("blake3")
    except ImportError:
        return None
    digest: Digest = lambda data: module.blake3(data).digest()  # noqa: E731
    return digest


def algorithms() -> dict[str, Digest]:
    """The algorithms that this process offers, by name; `blake3` only where it is installed."""
    found: dict[str, Digest] = {"sha256": _sha256, "xxh3_128": _xxh3_128}
    blake3 = _blake3()
    if blake3 is not None:
        found["blake3"] = blake3
    return found


def _packed(tokens: Sequence[int]) -> bytes:
    """Little-endian u64 each. Raises InvalidRequest on anything that would be rounded."""
    found = np.asarray(tokens)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise InvalidRequest(f"token ids must be a flat list of integers, not {found.dtype}")
    if found.size and found.min() < 0:
        raise InvalidRequest(f"token ids must not be negative: {found.min()}")
    return found.astype("<u8").tobytes()


def chain_hashes(
    tokens: Sequence[int],
    block_tokens: int,
    *,
    algorithm: str = "sha256",
    root: str = "",
    extra: bytes = b"",
) -> list[bytes]:
    """Hashes of the full blocks of `tokens`, each over everything before it.

    `root` parts chains that must never meet (it belongs in the namespace); `extra` joins every
    block (a multimodal digest, say). Raises InvalidRequest.
    """
    if block_tokens < 1:
        raise InvalidRequest(f"block_tokens must be positive, not {block_tokens}")
    known = algorithms()
    if algorithm not in known:
        raise InvalidRequest(
            f"unknown hash algorithm {algorithm!r}; this installation has {', '.join(known)}"
            + ("; pip install blake3" if algorithm == "blake3" else "")
        )
    digest = known[algorithm]
    packed = _packed(tokens)
    word = root.encode()
    parent = digest(_SEED + _HEAD.pack(block_tokens, len(word)) + word + extra)
    hashes = []
    step = block_tokens * 8
    for start in range(0, len(packed) - step + 1, step):
        parent = digest(parent + packed[start : start + step] + extra)
        hashes.append(parent)
    return hashes


def parents_of(hashes: Sequence[bytes]) -> list[bytes]:
    """The parent of each block of a chain that starts at its root: b"" first."""
    return [b"", *hashes[:-1]] if hashes else []
