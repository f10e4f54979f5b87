"""Write a tiny data directory in the format of the installed version, as format-N-*.tar.xz.

Run once when the format changes, by the last version that writes the old one; commit the files:
    python tests/kvstore/formats/make_format.py
`clean` was closed; `killed` is the same store as a kill -9 leaves it, before its index was told of
any block.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
import tempfile
from pathlib import Path

from dualpath.kvstore import index_backlog
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.directory_format import STORE_FORMAT
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import ReserveStatus, SealStatus

CONFIG = StoreConfig(disk_bytes=1 << 20, dram_bytes=1 << 20, segment_bytes=128 << 10)
SPACES = (
    Namespace(
        model="format@1",
        layout=KVLayout(layers=2, block_tokens=4, layer_bytes=3000, dtype="bf16"),
        tenant="one",
    ),
    Namespace(
        model="format@2",
        layout=KVLayout(layers=3, block_tokens=4, layer_bytes=100_000, dtype="fp8"),
        salt="pepper",
    ),
)
CHAINS = ((0, 6), (100, 3), (0, 2))
"""(first token, blocks); the first two of the first namespace, the last of the second."""


def content(block_hash: bytes, nbytes: int) -> bytes:
    """Bytes that only the hash determines, and that compress."""
    pattern = hashlib.sha256(block_hash).digest()
    return (pattern * (nbytes // len(pattern) + 1))[:nbytes]


def chains() -> list[tuple[Namespace, list[bytes]]]:
    """What the directory holds: (namespace, hashes of a chain)."""
    spaces = (SPACES[0], SPACES[0], SPACES[1])
    return [
        (space, chain_hashes(range(first, first + 4 * blocks), 4))
        for space, (first, blocks) in zip(spaces, CHAINS, strict=True)
    ]


def fill(store: BlockStore) -> None:
    """Store the chains durably."""
    for namespace, hashes in chains():
        space = store.open_namespace(namespace)
        data = [content(h, namespace.layout.block_bytes) for h in hashes]
        for status in store.put(space, hashes, parents_of(hashes), data):
            assert status in (SealStatus.SEALED, ReserveStatus.EXISTS), status


def pack(directory: Path, target: Path) -> None:
    """Compress, the same bytes for the same content."""
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for path in sorted(directory.rglob("*")):
            entry = tarfile.TarInfo(str(path.relative_to(directory)))
            entry.mode = 0o700 if path.is_dir() else 0o600
            if path.is_dir():
                entry.type = tarfile.DIRTYPE
                archive.addfile(entry)
            else:
                data = path.read_bytes()
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


def main() -> None:
    """Make both archives beside this script."""
    here = Path(__file__).parent
    index_backlog.LAG_S = float("inf")
    with tempfile.TemporaryDirectory() as temporary:
        data, killed = Path(temporary) / "data", Path(temporary) / "killed"
        with BlockStore.open(data, CONFIG) as store:
            fill(store)
            shutil.copytree(data, killed)
        pack(data, here / f"format-{STORE_FORMAT}-clean.tar.xz")
        pack(killed, here / f"format-{STORE_FORMAT}-killed.tar.xz")


if __name__ == "__main__":
    main()
