"""`dualpath bench soak`: kill -9, power losses, flipped bytes and long mixed load, with a verdict.

Prints its seed, what each part found, and one JSON object if asked; exit code 1 if anything that
must never happen has happened. What went wrong stays in the work directory.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from dualpath.bench.progress import Progress
from dualpath.bench.soak.children import Nursery
from dualpath.bench.soak.deafness import Deafness
from dualpath.bench.soak.endurance import endure
from dualpath.bench.soak.flip_rounds import FlipRounds
from dualpath.bench.soak.kill_rounds import KillRounds
from dualpath.bench.soak.power_rounds import PowerRounds
from dualpath.bench.soak.recording import build_recorder
from dualpath.transfer.errors import InvalidRequest, Unavailable

PARTS = ("kill", "power", "flip", "load")
_DEAF_ROUNDS_MAX = 200
"""Rounds within which a store that does not sync must have been caught."""
_EXAMPLE = """example:
  dualpath bench soak                                   # 500 + 500 rounds, 10,000 flips, 30 minutes
  dualpath bench soak --rounds 20 --flips 200 --minutes 0.2
  dualpath bench soak --only power --rounds 100 --seed 7 --json out.json"""


@dataclass(slots=True)
class Part:
    """What one part came to."""

    name: str
    rounds: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)
    skipped: str = ""
    elapsed_s: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


class SoakProgram:
    """See the module docstring."""

    name = "soak"
    help = "crashes, power losses, flipped bytes and long load against the store"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """How much of each part."""
        parser.epilog = _EXAMPLE
        parser.add_argument("--rounds", type=int, default=500, help="kills, and power losses")
        parser.add_argument("--flips", type=int, default=10_000, help="flipped bytes")
        parser.add_argument("--minutes", type=float, default=30.0, help="of mixed load")
        parser.add_argument("--seed", type=int, default=0, help="0: draw one")
        parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
        parser.add_argument("--dir", default="", help="work directory (default: a temporary one)")
        parser.add_argument("--json", default="", metavar="FILE", help="write the results there")

    def run(self, args: argparse.Namespace) -> int:
        """Run the parts in their order."""
        wanted = tuple(args.only.split(","))
        unknown = set(wanted) - set(PARTS)
        if unknown or min(args.rounds, args.flips, args.minutes, args.seed) < 0:
            raise InvalidRequest(f"--only takes {','.join(PARTS)}; numbers must not be negative")
        seed = args.seed or secrets.randbits(31)
        folder = Path(args.dir or tempfile.mkdtemp(prefix="dualpath-soak-")).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        print(f"seed {seed}, work directory {folder}", flush=True)
        soak = _Soak(folder, seed)
        parts = [part for name in PARTS if name in wanted for part in soak.part(name, args)]
        bad = [part for part in parts if part.bad]
        if args.json:
            report = {"seed": seed, "ok": not bad, "parts": {p.name: asdict(p) for p in parts}}
            Path(args.json).write_text(json.dumps(report, default=_plain, indent=1))
        if bad:
            print(f"FAILED: {', '.join(part.name for part in bad)}; left in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            print("passed")
        return 1 if bad else 0


class _Soak:
    """The parts, on one work directory."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._no_recorder = ""
        recorder = None
        try:
            recorder = build_recorder()
        except Unavailable as error:
            self._no_recorder = str(error)
        self._nursery = Nursery(recorder, folder / "said")

    def part(self, name: str, args: argparse.Namespace) -> Iterator[Part]:
        """Run one; power losses begin with a proof that the soak is not blind."""
        if name == "kill":
            yield self._kill(args.rounds)
        elif name == "power":
            if args.rounds:
                yield from self._deaf()
            yield self._power(args.rounds)
        elif name == "flip":
            yield self._flip(args.flips)
        else:
            yield self._load(60 * args.minutes)

    def _kill(self, count: int) -> Part:
        part = Part("kill")
        counting = _Counting(part, "kill -9", count)
        facts: Counter[str] = Counter()
        for done in KillRounds(self._nursery, self._folder / "kill", self._seed).rounds(count):
            facts[f"victim_{done.victim.value}"] += 1
            facts["durable_blocks_checked"] += done.durable
            facts["acknowledged_blocks"] += done.acknowledged
            facts["unfinished_blocks"] += done.unfinished
            facts["unfinished_blocks_max"] = max(facts["unfinished_blocks_max"], done.unfinished)
            facts["index_rebuilt"] += done.rebuilt
            facts["killed_at_a_change"] += bool(done.cut)
            counting.count(done, done.bad)
        return counting.end(facts)

    def _power(self, count: int) -> Part:
        part = Part("power")
        counting = _Counting(part, "power loss", count)
        if self._no_recorder:
            part.skipped = self._no_recorder
            return counting.end({})
        facts: Counter[str] = Counter()
        for done in PowerRounds(self._nursery, self._folder / "power", self._seed).rounds(count):
            facts[f"device_{done.device.value}"] += 1
            facts[f"mood_{done.mood.value}"] += 1
            facts["after_kills"] += bool(done.kills)
            facts["after_faults"] += done.faulty
            facts["index_lost"] += done.index_lost
            facts["durable_blocks_checked"] += done.durable
            facts["invalidated_blocks_checked"] += done.invalidated
            facts["unfinished_blocks"] += done.unfinished
            facts["unfinished_blocks_max"] = max(facts["unfinished_blocks_max"], done.unfinished)
            facts["index_rebuilt"] += done.rebuilt
            counting.count(done, done.bad)
        return counting.end(facts)

    def _deaf(self) -> Iterator[Part]:
        """Stores that do not sync must be caught."""
        for deaf in Deafness:
            part = Part(f"blindness_{deaf.value}")
            counting = _Counting(part, f"without syncs of {deaf.value}", _DEAF_ROUNDS_MAX)
            if self._no_recorder:
                part.skipped = self._no_recorder
                yield counting.end({})
                continue
            folder = self._folder / f"deaf-{deaf.value}"
            rounds = PowerRounds(self._nursery, folder, self._seed, deaf).rounds(_DEAF_ROUNDS_MAX)
            caught = ""
            for done in rounds:
                part.rounds += 1
                counting.at(part.rounds)
                if done.bad:
                    caught = done.bad
                    break
            if not caught:
                part.bad.append({"bad": f"nobody noticed that {deaf.value} is not synced"})
            else:
                shutil.rmtree(folder, ignore_errors=True)
            yield counting.end({"caught_after": part.rounds, "by": caught[:200]})

    def _flip(self, count: int) -> Part:
        part = Part("flip")
        counting = _Counting(part, "flipped bytes", count)
        facts: Counter[str] = Counter()
        for done in FlipRounds(self._nursery, self._folder / "flip", self._seed).rounds(count):
            facts[f"in_{done.flip.spot.value}"] += 1
            facts["found"] += done.found
            facts["wrong_blocks_served"] += done.wrong
            facts["blocks_lost"] += done.lost
            facts["refused"] += done.refused
            facts["repaired"] += done.repaired
            counting.count(done, done.bad)
        return counting.end(facts)

    def _load(self, seconds: float) -> Part:
        part = Part("load")
        counting = _Counting(part, "mixed load, seconds", seconds)
        if seconds:
            done = endure(self._nursery, self._folder / "load", self._seed, seconds, counting.at)
            part.rounds = int(seconds)
            if done.bad:
                part.bad.append({"bad": done.bad})
            return counting.end(asdict(done))
        return counting.end({})


class _Counting:
    """A part while it runs: counts rounds, shows them, tells of bad ones, and sums up."""

    def __init__(self, part: Part, title: str, total: float) -> None:
        self._part = part
        self._title = title
        self._total = max(1.0, total)
        self._started = time.monotonic()
        self._progress = Progress()
        self._progress.stage(title)

    def at(self, done: float) -> None:
        """So far."""
        self._progress.move(done / self._total, f"{done:.0f} of {self._total:.0f}")

    def count(self, done: Any, bad: str) -> None:
        """One more round."""
        self._part.rounds += 1
        self.at(self._part.rounds)
        if bad:
            self._part.bad.append(asdict(done))
            self._progress.say(f"BAD: {json.dumps(asdict(done), default=_plain)}")

    def end(self, facts: Mapping[str, Any]) -> Part:
        """Sum up."""
        part = self._part
        part.elapsed_s = round(time.monotonic() - self._started, 1)
        part.facts = dict(facts)
        self._progress.done(part.skipped)
        verdict = f"skipped: {part.skipped}" if part.skipped else f"{len(part.bad)} bad"
        print(f"{self._title}: {part.rounds}, {verdict}, {part.elapsed_s} s", flush=True)
        for name, value in sorted(part.facts.items()):
            print(f"  {name}: {value}", flush=True)
        return part


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    return str(value)


command = SoakProgram()
