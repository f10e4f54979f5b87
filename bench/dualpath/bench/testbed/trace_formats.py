"""Reads request traces, line by line: agent sessions as runs of block ids, or hash id lists.

Owns both formats and their checks. Plain or gzip files; nothing but the current line is in memory.
A line that does not hold what its format promises raises InvalidRequest naming file, line and what
is wrong; nothing after it is read.

`runs`: {"trace", "sub", "i", "t", "in", "out", "lcp", "runs": [[first, last], ...]}, and perhaps
"think_time"; blocks of 64 tokens, ids comparable within one `trace`.
`hash_ids`: {"timestamp", "input_length", "output_length", "hash_ids": [...]}; blocks of 512 tokens,
ids comparable in the whole file.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dualpath.transfer.errors import InvalidRequest

RUNS_BLOCK_TOKENS = 64
HASH_IDS_BLOCK_TOKENS = 512
LINE_BYTES_MAX = 16 << 20
BLOCKS_MAX = 1 << 18
"""Most blocks of a request: 16 M tokens of 64-token blocks."""
ID_MAX = (1 << 63) - 1

_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: its prompt as full blocks.

    Ids are comparable between requests of the same `scope`; requests of one `session` follow each
    other. `start_s` counts from the start of the session or of the trace.
    """

    scope: str
    session: str
    start_s: float
    block_tokens: int
    block_ids: tuple[int, ...]
    input_tokens: int
    output_tokens: int
    number: int = field(default=0, compare=False)
    """Of the request in its conversation, from 1; 0: the format does not say."""
    think_s: float = field(default=0.0, compare=False)
    """Between the answer before it and this request; 0 where nothing is known."""


class _Lines(Protocol):
    """What a plain and a gzip file have in common."""

    def readline(self, size: int, /) -> bytes: ...


class _BadLine(Exception):
    """What is wrong with a line; becomes InvalidRequest with its place."""


def _integer(row: Mapping[str, object], field: str, low: int = 0) -> int:
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _BadLine(f"`{field}` must be an integer, not {_shown(value)}")
    if not low <= value <= ID_MAX:
        raise _BadLine(f"`{field}` must lie in {low}..{ID_MAX}, not {value}")
    return value


def _number(row: Mapping[str, object], field: str) -> float:
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise _BadLine(f"`{field}` must be a number of at least 0, not {_shown(value)}")
    return float(value)


def _shown(value: object) -> str:
    if value is None:
        return "absent or null"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _block_id(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= ID_MAX:
        raise _BadLine(f"{where} must be an integer in 0..{ID_MAX}, not {_shown(value)}")
    return value


def _parse_runs(row: Mapping[str, object]) -> TraceRequest:
    trace = row.get("trace")
    if not isinstance(trace, str) or not 0 < len(trace) <= 256:
        raise _BadLine(f"`trace` must be a name of 1..256 characters, not {_shown(trace)}")
    runs = row["runs"]
    if not isinstance(runs, list):
        raise _BadLine(f"`runs` must be a list, not {_shown(runs)}")
    ids: list[int] = []
    for index, run in enumerate(runs):
        if not isinstance(run, list) or len(run) != 2:
            raise _BadLine(f"`runs[{index}]` must be [first, last], not {_shown(run)}")
        first, last = (_block_id(bound, f"`runs[{index}]`") for bound in run)
        if last < first:
            raise _BadLine(f"`runs[{index}]` ends before it starts: {_shown(run)}")
        if len(ids) + last - first + 1 > BLOCKS_MAX:
            raise _BadLine(f"`runs` has more than {BLOCKS_MAX} blocks")
        ids.extend(range(first, last + 1))
    tokens = _integer(row, "in")
    if len(ids) * RUNS_BLOCK_TOKENS > tokens:
        raise _BadLine(f"`runs` has {len(ids)} blocks, more than `in` = {tokens} tokens fill")
    _integer(row, "lcp")
    return TraceRequest(
        scope=trace,
        session=f"{trace}/{_integer(row, 'sub')}",
        start_s=_number(row, "t"),
        block_tokens=RUNS_BLOCK_TOKENS,
        block_ids=tuple(ids),
        input_tokens=tokens,
        output_tokens=_integer(row, "out"),
        number=_integer(row, "i"),
        think_s=0.0 if row.get("think_time") is None else _number(row, "think_time"),
    )


def _parse_hash_ids(row: Mapping[str, object], number: int) -> TraceRequest:
    ids = row["hash_ids"]
    if not isinstance(ids, list):
        raise _BadLine(f"`hash_ids` must be a list, not {_shown(ids)}")
    if len(ids) > BLOCKS_MAX:
        raise _BadLine(f"`hash_ids` has {len(ids)} blocks, more than {BLOCKS_MAX}")
    tokens = _integer(row, "input_length")
    # The last block may be partly filled; only full blocks are ever stored.
    full = tokens // HASH_IDS_BLOCK_TOKENS
    if not full <= len(ids) <= full + 1:
        raise _BadLine(
            f"`hash_ids` has {len(ids)} blocks, `input_length` = {tokens} tokens need {full} or "
            f"{full + 1}"
        )
    blocks = tuple(_block_id(each, f"`hash_ids[{index}]`") for index, each in enumerate(ids))
    return TraceRequest(
        scope="",
        session=f"request-{number}",
        start_s=_number(row, "timestamp") / 1000,
        block_tokens=HASH_IDS_BLOCK_TOKENS,
        block_ids=blocks[:full],
        input_tokens=tokens,
        output_tokens=_integer(row, "output_length"),
    )


def parse_line(line: bytes, number: int) -> TraceRequest:
    """One line of either format; `number` counts from 1. Raises InvalidRequest."""
    try:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _BadLine(f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise _BadLine(f"not a JSON object but {_shown(row)}")
        if "runs" in row and "hash_ids" not in row:
            return _parse_runs(row)
        if "hash_ids" in row and "runs" not in row:
            return _parse_hash_ids(row, number)
        raise _BadLine("needs exactly one of `runs` and `hash_ids`")
    except _BadLine as error:
        raise InvalidRequest(str(error), reason="trace") from error


def _lines(stream: _Lines, path: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(LINE_BYTES_MAX + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise InvalidRequest(
                f"{path}, line {number}: cannot be read: {error}", reason="trace"
            ) from error
        if not line:
            return
        if len(line) > LINE_BYTES_MAX:
            raise InvalidRequest(
                f"{path}, line {number}: longer than {LINE_BYTES_MAX} bytes", reason="trace"
            )
        if line.strip():
            yield number, line


def read_trace(path: str) -> Iterator[TraceRequest]:
    """Yield the requests of a file in order. Raises InvalidRequest as said above."""
    try:
        raw = open(path, "rb")  # noqa: SIM115 - closed by the `with` below
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be opened: {error.strerror}") from error
    with raw:
        zipped = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        stream: _Lines = gzip.GzipFile(fileobj=raw) if zipped else raw
        form = 0
        for number, line in _lines(stream, path):
            where = f"{path}, line {number}"
            try:
                request = parse_line(line, number)
            except InvalidRequest as error:
                raise InvalidRequest(f"{where}: {error}", reason="trace") from error
            if form not in (0, request.block_tokens):
                raise InvalidRequest(
                    f"{where}: another format than the lines before", reason="trace"
                )
            form = request.block_tokens
            yield request
