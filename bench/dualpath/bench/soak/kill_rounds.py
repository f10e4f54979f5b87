"""Rounds of kill -9: a daemon under the load of two tenants, or a store in process.

A store in process is killed before a change that was drawn, or at a moment; a daemon at a moment.
After each kill the store is checked by fsck, opened and verified in another process. What became
durable must be there unless its eviction was noted before the kill: a witness inside the killed
process notes both (witness.py). Rounds go on in the same directories; every other verification
ends as unclean as the kill itself.
"""

from __future__ import annotations

import enum
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dualpath.bench.soak.children import Child, ChildLost, Nursery, Tell
from dualpath.bench.soak.daemon import daemon_config, witnessed_daemon
from dualpath.bench.soak.engine import EnginePlan, run_engines
from dualpath.bench.soak.place import DeviceKind, data_of, make_place
from dualpath.bench.soak.recording import recording
from dualpath.bench.soak.verification import Expected, Verdict, verify
from dualpath.bench.soak.witness import Claims, read_notes, write_note
from dualpath.bench.soak.workload import WRONG_BLOCK, LoadPlan, run_load

_WAIT_S_MAX = 120.0
_OPERATIONS = 100_000
_ALIVE_S = {"daemon": (0.1, 1.2), "store": (0.02, 0.5)}
"""Shortest and longest life before the kill."""
_CUT_MAX = 400


class Victim(enum.Enum):
    """What is killed."""

    DAEMON = "daemon"
    STORE = "store"


@dataclass(slots=True)
class KillRound:
    """One kill, after `alive_s` seconds or before change `cut` (0: none was drawn)."""

    number: int
    victim: Victim
    device: DeviceKind
    alive_s: float
    cut: int = 0
    bad: str = ""
    durable: int = 0
    """Blocks that had to be there."""
    acknowledged: int = 0
    """Blocks that this life has acknowledged as durable."""
    unfinished: int = 0
    """Visible blocks that were not durable yet and are gone."""
    rebuilt: bool = False


@dataclass(slots=True)
class _Lineage:
    """The store of one family: where it lies, what it must hold, what it held before this life."""

    root: Path
    claims: Claims = field(default_factory=Claims)
    before: set[bytes] = field(default_factory=set)


class KillRounds:
    """See the module docstring. `folder` is emptied; a bad round ends the rounds, and leaves the
    directories as they are."""

    def __init__(self, nursery: Nursery, folder: Path, seed: int) -> None:
        self._nursery = nursery
        self._dice = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._lineages = {
            family: _Lineage(folder / family) for family in {kind.family for kind in DeviceKind}
        }
        for family, lineage in self._lineages.items():
            make_place(lineage.root, family)
        self._notes, self._log = folder / "notes", folder / "log"
        self._unix, self._diary = folder / "socket", folder / "diary"

    def rounds(self, count: int) -> Iterator[KillRound]:
        """Run up to `count` rounds."""
        engines: Child | None = None
        try:
            for number in range(count):
                done = self._draw(number)
                if done.victim is Victim.DAEMON and engines is None:
                    engines = self._start_engines()
                self._run(done, engines if done.victim is Victim.DAEMON else None)
                yield done
                if done.bad:
                    return
        finally:
            if engines is not None:
                engines.kill()

    def _draw(self, number: int) -> KillRound:
        victim = self._dice.choice(list(Victim))
        device = self._dice.choice(list(DeviceKind))
        if victim is Victim.DAEMON and device is DeviceKind.RAW:
            device = DeviceKind.RING
        alive_s = self._dice.uniform(*_ALIVE_S[victim.value])
        cut = self._dice.randint(1, _CUT_MAX) if self._dice.random() < 0.5 else 0
        if victim is Victim.DAEMON or not self._nursery.records:
            cut = 0
        return KillRound(number, victim, device, alive_s, cut)

    def _start_engines(self) -> Child:
        plan = EnginePlan(f"unix:{self._unix}", self._diary, self._dice.getrandbits(32))
        engines = self._nursery.start(run_engines, plan)
        engines.hear(_WAIT_S_MAX)
        return engines

    def _run(self, done: KillRound, engines: Child | None) -> None:
        lineage = self._lineages[done.device.family]
        for path in (self._notes, self._log):
            path.unlink(missing_ok=True)
        complaints = [self._live(done, lineage)]
        ended = engines.wait(0) if engines is not None else None
        if ended is not None:
            complaints.append(
                "a wrong block was loaded" if ended == WRONG_BLOCK else f"the engines: {ended}"
            )
        notes = read_notes(self._notes.read_bytes()) if self._notes.exists() else []
        lineage.claims.follow(notes)
        done.durable = len(lineage.claims.durable)
        if engines is not None:
            complaints.append(self._unkept(notes, lineage, done))
        complaints.append(self._verify(done, lineage))
        done.bad = "; ".join(filter(None, complaints))

    def _live(self, done: KillRound, lineage: _Lineage) -> str:
        """From the start to the kill; what was wrong with it."""
        child = self._start(done, lineage)
        try:
            child.hear(_WAIT_S_MAX)
        except ChildLost as error:
            child.kill()
            return "" if done.cut else f"the victim did not start: {error}"
        if done.cut:
            status = child.wait(_WAIT_S_MAX)
        else:
            time.sleep(done.alive_s)
            status = child.kill()
        if status == WRONG_BLOCK:
            return "a wrong block was served before the kill"
        if status is None or status >= 0:
            child.kill()
            return f"the victim was not killed: status {status}"
        return ""

    def _start(self, done: KillRound, lineage: _Lineage) -> Child:
        if done.victim is Victim.DAEMON:
            self._diary.write_bytes(b"")
            config = daemon_config(data_of(lineage.root), self._unix, done.device)
            return self._nursery.start(witnessed_daemon, config, self._notes)
        plan = LoadPlan(lineage.root, self._dice.getrandbits(32), done.device, _OPERATIONS)
        return self._nursery.start(noted_load, plan, self._notes, self._log, done.cut)

    def _unkept(self, notes: list[bytes], lineage: _Lineage, done: KillRound) -> str:
        """Durable to an engine and not to the store: that would be a lie."""
        known = {note[1:] for note in notes if note[:1] == b"D"} | lineage.before
        said: set[bytes] = set()
        for line in self._diary.read_bytes().splitlines():
            said |= {bytes.fromhex(key) for key in json.loads(line).get("durable", ())}
        done.acknowledged = len(said)
        lies = said - known
        return f"{len(lies)} blocks were acknowledged and never committed" if lies else ""

    def _verify(self, done: KillRound, lineage: _Lineage) -> str:
        claims, close = lineage.claims, self._dice.random() < 0.5
        expected = Expected(frozenset(claims.durable), frozenset(claims.invalidated))
        try:
            verdict: Verdict = self._nursery.call(
                verify, lineage.root, done.device, expected, close, wait_s=_WAIT_S_MAX
            )
        except ChildLost as error:
            return f"verification: {error}"
        done.unfinished = len(claims.visible - verdict.served)
        done.rebuilt = verdict.rebuilt
        claims.restart(verdict.left)
        lineage.before = set(verdict.left)
        return "; ".join(filter(None, (*claims.broken, verdict.bad)))


def noted_load(tell: Tell, plan: LoadPlan, notes: Path, log: Path, cut: int) -> None:
    """What a killed child runs; its notes survive it. With `cut` the recorder kills it."""
    fd = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    if cut:
        recording().begin(plan.root, log, cut)
    run_load(plan, partial(write_note, fd), lambda: tell(None))
