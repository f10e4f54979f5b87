"""What was invalidated, for whoever has only headers to go by: cuts, each up to a generation.

Headers stay behind when their blocks leave. While there is an index they mean nothing; should it be
lost, they must not bring back what was invalidated, before or after it had left. So each
invalidation is noted here before it is answered: blocks of its scope up to the generation of that
moment are not taken from headers. A damaged list stands for everything. Durable in `INVALIDATED`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from dualpath.kvstore import directory_format
from dualpath.kvstore.directory_format import ASIDE_MAX, INVALIDATED_NAME, Cut
from dualpath.kvstore.namespace import NAMESPACE_ID_BYTES
from dualpath.kvstore.record import BlockRecord, recorded_writer
from dualpath.kvstore.store_api import InvalidationScope
from dualpath.transfer.errors import Corrupt

CUTS_MAX = 1024
_GENERATION_MAX = (1 << 64) - 1
_log = logging.getLogger(__name__)

_Scope = tuple[bytes, str, bytes]
"""Namespace id (b"": all), writer ("": any), hash of the block where a chain is cut (b"": none)."""


class InvalidationCuts:
    """See the module docstring. For one thread at a time."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._cuts: dict[_Scope, int] = {}
        self.damage = ""
        """Why nothing can be taken from headers; "" if all is well."""
        try:
            for cut in directory_format.read_cuts(root):
                self._note((cut.namespace_id, cut.writer, cut.hash), cut.generation)
        except Corrupt as error:
            self.damage = str(error)
            self._cuts = {(b"", "", b""): _GENERATION_MAX}

    def add(self, scopes: Iterable[InvalidationScope], generation: int) -> None:
        """Blocks of these up to a generation are gone. Durable on return. Raises OSError."""
        for scope in scopes:
            self._note((scope.namespace_id, recorded_writer(scope.writer), scope.hash), generation)
        if len(self._cuts) > CUTS_MAX:
            self._coarsen()
        self._save()

    def replace_damaged(self, generation: int) -> None:
        """After an opening: what is there now is all there is up to this generation. Raises
        OSError."""
        if self.damage:
            directory_format.set_aside(self._root, self._root / INVALIDATED_NAME, keep=ASIDE_MAX)
            self._cuts = {(b"", "", b""): generation}
            self._save()

    def left(self, records: Mapping[bytes, BlockRecord]) -> dict[bytes, BlockRecord]:
        """Those that were not invalidated. `records` are by key."""
        cut = {key for key, record in records.items() if record.generation <= self._until(record)}
        children: dict[bytes, list[bytes]] = {}
        if any(block_hash for _, _, block_hash in self._cuts):
            for key, record in records.items():
                children.setdefault(record.namespace_id + record.parent, []).append(key)
        for (namespace_id, _, block_hash), generation in self._cuts.items():
            if block_hash:
                for key in _below(namespace_id + block_hash, children):
                    if records[key].generation <= generation:
                        cut.add(key)
        if cut:
            _log.warning("%d blocks had been invalidated and are not taken from headers", len(cut))
        return {key: record for key, record in records.items() if key not in cut}

    def _until(self, record: BlockRecord) -> int:
        namespace_id, writer = record.namespace_id[:NAMESPACE_ID_BYTES], record.writer
        scopes: tuple[_Scope, ...] = (
            (b"", "", b""),
            (namespace_id, "", b""),
            (namespace_id, "", record.hash),
            (namespace_id, writer, b""),
            (b"", writer, b""),
        )
        return max(self._cuts.get(scope, -1) for scope in scopes)

    def _note(self, scope: _Scope, generation: int) -> None:
        self._cuts[scope] = max(generation, self._cuts.get(scope, -1))

    def _coarsen(self) -> None:
        """Fewer cuts, that cut more: at worst blocks are not found that were there."""
        fine, self._cuts = self._cuts, {}
        for (namespace_id, _, _), generation in fine.items():
            self._note((namespace_id, "", b""), generation)
        if len(self._cuts) > CUTS_MAX:
            self._cuts = {(b"", "", b""): max(self._cuts.values())}

    def _save(self) -> None:
        cuts = [Cut(*scope, generation) for scope, generation in self._cuts.items()]
        directory_format.write_cuts(self._root, cuts)


def _below(top: bytes, children: Mapping[bytes, list[bytes]]) -> set[bytes]:
    """All that hangs below a key. What left long ago may even hang in circles."""
    found: set[bytes] = set()
    left = [top]
    while left:
        fresh = set(children.get(left.pop(), ())) - found
        found |= fresh
        left += fresh
    return found
