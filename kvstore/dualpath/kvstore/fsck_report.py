"""What a check of a data directory found: values and their counts. Pure."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field

FINDINGS_KEPT_MAX = 10_000
"""More findings are counted, not kept."""


class FsckCode(enum.Enum):
    """Kinds of findings. The values are what `dualpath fsck --json` prints."""

    META_DAMAGED = "meta_damaged"
    CLEAN_DAMAGED = "clean_damaged"
    INDEX_LOST = "index_lost"
    INDEX_CHANGED = "index_changed"
    """Bytes of the index differ from those of the clean shutdown."""
    INDEX_UNREADABLE = "index_unreadable"
    INDEX_INCOMPLETE = "index_incomplete"
    """Records appeared or disappeared: their number or sum is not that of the last commit."""
    RECORD_DAMAGED = "record_damaged"
    RECORD_MISPLACED = "record_misplaced"
    """A record names a namespace, segment or slot that does not exist or does not fit."""
    ORPHAN = "orphan"
    """A block whose parent is not stored."""
    CLAIMED_TWICE = "claimed_twice"
    """Two blocks claim the same slot."""
    NAMESPACE_DAMAGED = "namespace_damaged"
    SUPERBLOCK_DAMAGED = "superblock_damaged"
    SEGMENT_SIZE = "segment_size"
    SEGMENT_UNREADABLE = "segment_unreadable"
    RAW_TABLE_LOST = "raw_table_lost"
    """Neither copy of a raw device's table is whole: nobody knows where its segments are."""
    HEADER_DAMAGED = "header_damaged"
    """The header of a stored block is not that of its record."""
    DATA_DAMAGED = "data_damaged"
    """The bytes of a stored block do not have its checksums."""
    SNAPSHOT_DAMAGED = "snapshot_damaged"
    RETAINED_DAMAGED = "retained_damaged"
    INVALIDATED_DAMAGED = "invalidated_damaged"
    """Nobody knows any more what was invalidated: headers alone are not trusted."""

    PADDING = "padding"
    """Bytes that must be zero and mean nothing are not zero."""
    FREE_HEADER_DAMAGED = "free_header_damaged"
    """The header of a free slot is torn, as a crash may leave it."""
    RAW_TABLE_DAMAGED = "raw_table_damaged"
    """One of the two copies, as a crash may leave it."""
    BLANK_SEGMENT = "blank_segment"
    """A segment without a superblock, as a crash may leave it; the next opening removes it."""
    NOT_CLEAN = "not_clean"
    """The last process did not shut down cleanly; the next opening reads the whole index."""
    NEWER_BLOCK = "newer_block"
    """A header that the index had not been told of when the last process ended; its data is not
    checked here."""
    SET_ASIDE = "set_aside"
    """Something damaged was kept for a look later."""
    UNKNOWN_FILE = "unknown_file"

    @property
    def is_problem(self) -> bool:
        """Whether anything that is stored is lost, at risk or refused; else it is a note."""
        return self not in _NOTES


_NOTES = frozenset(
    (
        FsckCode.PADDING,
        FsckCode.FREE_HEADER_DAMAGED,
        FsckCode.RAW_TABLE_DAMAGED,
        FsckCode.BLANK_SEGMENT,
        FsckCode.NOT_CLEAN,
        FsckCode.NEWER_BLOCK,
        FsckCode.SET_ASIDE,
        FsckCode.UNKNOWN_FILE,
    )
)


@dataclass(frozen=True, slots=True)
class FsckFinding:
    """`where` is a file, with the offset where there is one."""

    code: FsckCode
    where: str
    detail: str


@dataclass(slots=True)
class FsckReport:
    """Everything found. `blocks` are those that the index names, `bad_blocks` those of them that
    cannot be served."""

    blocks: int = 0
    bad_blocks: int = 0
    segments: int = 0
    namespaces: int = 0
    read_bytes: int = 0
    findings: list[FsckFinding] = field(default_factory=list)
    counts: Counter[FsckCode] = field(default_factory=Counter)
    repairs: list[str] = field(default_factory=list)
    """What a repair has done, in order."""

    def add(self, code: FsckCode, where: str, detail: str) -> None:
        """Note a finding."""
        self.counts[code] += 1
        if len(self.findings) < FINDINGS_KEPT_MAX:
            self.findings.append(FsckFinding(code, where, detail))

    def has(self, *codes: FsckCode) -> bool:
        """Whether any of these was found."""
        return any(self.counts[code] for code in codes)

    @property
    def problems(self) -> int:
        """How many problems were found; notes do not count."""
        return sum(count for code, count in self.counts.items() if code.is_problem)

    @property
    def notes(self) -> int:
        """How many notes."""
        return sum(self.counts.values()) - self.problems
