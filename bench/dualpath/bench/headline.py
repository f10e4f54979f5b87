"""The program `dualpath bench headline`: what a reader looks for first, into a document.

Made from the JSON of `bench store` and `bench peers`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from dualpath.bench.document import put_figures
from dualpath.bench.machine import busy_line
from dualpath.bench.table import Row, markdown_table
from dualpath.transfer.errors import InvalidRequest

MARK = "store"
BLOCKS = "1M"
_OURS = "dualpath"
_HEADINGS = ("what", "DualPath", "limit", "ratio", "fastest peer here")

Json = Mapping[str, object]

_LOCAL = "dualpath-local"
_LINES = (
    ("cold read, 1 MiB, verified", "cold_read_1m", "fio_gibs", "fio", "dualpath-disk"),
    ("cold read, 256 KiB, verified", "cold_read_256k", "fio_gibs", "fio", ""),
    ("DRAM hit, copied, verified", "dram_copy.embedded_1m", "memcpy_gibs", "memcpy", "dualpath"),
    ("the same over the local socket", "dram_copy.socket_1m", "memcpy_gibs", "memcpy", _LOCAL),
    ("TCP, verified", "tcp", "hashing_copy_gibs", "hashing socket copy", "dualpath-tcp"),
    ("durable write", "write", "fio_gibs", "fio", ""),
)
"""Title, section, its limit and what that is, our entry among the peers."""


class Headline:
    """See the module docstring."""

    name = "headline"
    help = "put the headline figures of bench store and bench peers into a document"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        parser.add_argument("--store", required=True, metavar="FILE", help="JSON of bench store")
        parser.add_argument("--peers", required=True, metavar="FILE", help="JSON of bench peers")
        parser.add_argument("--into", default="", metavar="FILE", help="the document; default: -")

    def run(self, args: argparse.Namespace) -> int:
        """Write it; 0, or 1 if a file cannot be read or written."""
        try:
            store, peers = (
                json.loads(Path(path).read_text(encoding="utf-8"))
                for path in (args.store, args.peers)
            )
            text = headline(store, peers)
            if args.into:
                put_figures(Path(args.into), text, MARK)
            else:
                print(text)
        except (OSError, ValueError, InvalidRequest) as error:
            print(f"dualpath bench headline: {error}", file=sys.stderr)
            return 1
        return 0


def headline(store: Json, peers: Json) -> str:
    """The table, and what it was measured on."""
    machine = _mapping(store.get("machine"))
    return "\n\n".join(
        [
            f"{machine.get('cores')} cores of {machine.get('processor')}, {machine.get('system')} "
            f"{machine.get('kernel')}, {store.get('date')}; GiB/s, medians of "
            f"{store.get('rounds')} interleaved rounds; peers by gets of {BLOCKS} blocks on "
            f"{peers.get('date')}, ours in the same run in brackets.",
            markdown_table(_HEADINGS, list(_rows(store, peers))),
            *(text[0].upper() + text[1:] + "." for text in (busy_line(machine),) if text),
        ]
    )


def _rows(store: Json, peers: Json) -> Iterator[Row]:
    for title, section, limit_key, limit_name, entry in _LINES:
        figures = store
        for name in section.split("."):
            figures = _mapping(figures.get(name))
        ours = figures.get("ours_gibs", figures.get("verified_gibs"))
        limit = figures.get(limit_key)
        ratio = figures.get("ratio", figures.get("ratio_to_memcpy"))
        yield (
            title,
            _shown(ours),
            f"{_shown(limit)} ({limit_name})",
            _shown(ratio),
            _fastest(peers, entry) if entry else "",
        )


def _fastest(peers: Json, entry: str) -> str:
    mine = _rate(peers, entry)
    entries = _mapping(peers.get("entries"))
    reach = _mapping(entries.get(entry)).get("reach")
    theirs = {
        name: _rate(peers, name)
        for name in entries
        if not name.startswith(_OURS) and _mapping(entries[name]).get("reach") == reach
    }
    found = {name: rate for name, rate in theirs.items() if rate is not None}
    if not found:
        return "not run"
    name = max(found, key=lambda each: found[each])
    title = _mapping(entries[name]).get("title", name)
    return f"{title}: {_shown(found[name])} (ours {_shown(mine)})"


def _rate(peers: Json, name: str) -> float | None:
    entry = _mapping(_mapping(peers.get("entries")).get(name))
    rate = _mapping(_mapping(entry.get("blocks")).get(BLOCKS)).get("get_gibs")
    return rate if isinstance(rate, float) else None


def _mapping(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _shown(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "-"


command = Headline()
