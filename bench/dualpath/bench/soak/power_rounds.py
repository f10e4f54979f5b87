"""Rounds of power loss: a recorded store under mixed load, cut at random changes.

A run loads the store until each worker has made a number of calls. Its recording is then followed
up to a few random changes; at each of them the power goes, what may be left is written to a
directory of its own (power_loss.py), and the store there is checked by fsck, opened and verified
in another process. The next run goes on from one of these directories, so that recoveries are cut
as well. Stores in files and on a raw device take turns.

In a part of the runs the store is killed before, once or twice, and opened again: what was not
synced then is in doubt until it is. In a part, its device fails now and then (recording.py). And
at a part of the cuts its index is lost as well.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from dualpath.bench.soak.children import ChildLost, Nursery, Tell
from dualpath.bench.soak.deafness import Deafness, deafen
from dualpath.bench.soak.place import DeviceKind, data_of, make_place
from dualpath.bench.soak.power_loss import Mood, PowerLoss
from dualpath.bench.soak.recording import Change, Faults, Record, read_log, recording
from dualpath.bench.soak.verification import Expected, Verdict, verify
from dualpath.bench.soak.witness import Claims
from dualpath.bench.soak.workload import CANNOT_OPEN, WRONG_BLOCK, LoadPlan, run_load
from dualpath.kvstore.ring_device import RingDevice
from dualpath.kvstore.transfer_batch import BatchProgress, TransferBatch

CUTS_A_RUN = 5
_OPERATIONS = (2, 40)
"""Fewest and most calls of a worker in one run."""
_HASTY = (0, 2)
"""The same, where the power goes soon after an opening that had to find blocks."""
_WAIT_S_MAX = 120.0
_KILLS_CHANCES = {0: 0.5, 1: 0.35, 2: 0.15}
_KILLED_AT_MAX = 400
_KILLED_AT_SYNC_MAX = 12
_FAULTY = 0.4
"""Share of runs whose device fails."""
_FAILING_WRITES, _FAILING_SYNCS = 0.004, 0.05
_INDEX_LOST = 0.2
"""Share of cuts."""
_FILES = {"files": "segments/segment-", "raw": "run/raw"}
"""Where the blocks are."""
_EVERYTHING = "run/"


@dataclass(slots=True)
class PowerRound:
    """One loss of power, before change `change` of the `changes` of a run."""

    number: int
    seed: int
    device: DeviceKind
    mood: Mood = Mood.NOTHING
    change: int = 0
    changes: int = 0
    kills: int = 0
    """How often the store was killed before, since all of it was durable."""
    faulty: bool = False
    """Whether its device has failed now and then."""
    index_lost: bool = False
    bad: str = ""
    durable: int = 0
    """Blocks that had to be there."""
    invalidated: int = 0
    """Blocks that had to be gone."""
    unfinished: int = 0
    """Visible blocks that were not durable yet and are gone."""
    rebuilt: bool = False


@dataclass(slots=True)
class _Lineage:
    """Where the stores of one family have got to."""

    base: Path
    claims: Claims
    index_lost: bool = False
    """Whether nobody has opened it since its index was lost."""


@dataclass(frozen=True, slots=True)
class _End:
    """Killed before a change; or between a write and its sync, before sync number `sync` of the
    files that hold blocks; or (0, 0) not before the load is over."""

    change: int = 0
    sync: int = 0
    files: str = ""


@dataclass(slots=True)
class _Run:
    """`loss` has followed all lives but the last, whose changes are `records`."""

    loss: PowerLoss
    device: DeviceKind
    kills: int = 0
    faulty: bool = False
    records: list[Record] = field(default_factory=list)
    complaint: str = ""


class PowerRounds:
    """See the module docstring. `folder` is emptied; a bad round leaves its directory there.
    With `deaf` some syncs do nothing: then rounds must go bad, or the soak is blind."""

    def __init__(
        self, nursery: Nursery, folder: Path, seed: int, deaf: Deafness | None = None
    ) -> None:
        self._nursery = nursery
        self._folder = folder
        self._dice = random.Random(seed)
        self._deaf = deaf
        shutil.rmtree(folder, ignore_errors=True)
        self._lineages = {}
        for family in sorted({kind.family for kind in DeviceKind}):
            make_place(folder / f"base-{family}", family)
            self._lineages[family] = _Lineage(folder / f"base-{family}", Claims())

    def rounds(self, count: int) -> Iterator[PowerRound]:
        """Run `count` losses of power."""
        number = 0
        while number < count:
            device = self._dice.choice(list(DeviceKind))
            lineage = self._lineages[device.family]
            run = self._record(lineage, device)
            loss, records = run.loss, run.records
            changes = [at for at, record in enumerate(records) if record.kind is not Change.NOTE]
            cuts = sorted(self._dice.choices(changes or [0], k=min(CUTS_A_RUN, count - number)))
            chosen, start = self._dice.randrange(len(cuts)), 0
            following: tuple[Path, Claims] | None = None
            lost = False
            for index, cut in enumerate(cuts):
                loss.follow(records[start:cut])
                start = cut
                claims = lineage.claims.copy()
                claims.follow(loss.notes)
                done = self._draw(run, number)
                done.change, done.changes = cut, len(records)
                left = self._lose(loss, claims, done, lineage.index_lost)
                done.bad = "; ".join(filter(None, (run.complaint, *claims.broken, done.bad)))
                run.complaint = ""
                yield done
                number += 1
                if index == chosen and not done.bad:
                    following = left
                    lost = done.index_lost or (lineage.index_lost and done.rebuilt)
                elif not done.bad:
                    shutil.rmtree(left[0])
            if following is not None:
                shutil.rmtree(lineage.base)
                following[0].rename(lineage.base)
                lineage.claims, lineage.index_lost = following[1], lost

    def _draw(self, run: _Run, number: int) -> PowerRound:
        done = PowerRound(number, self._dice.getrandbits(32), run.device)
        done.kills, done.faulty = run.kills, run.faulty
        done.index_lost = self._deaf is None and self._dice.random() < _INDEX_LOST
        return done

    def _record(self, lineage: _Lineage, device: DeviceKind) -> _Run:
        """The base stays as it is."""
        where = self._folder / "run"
        shutil.rmtree(where, ignore_errors=True)
        shutil.copytree(lineage.base, where)
        run = _Run(PowerLoss(where), device)
        kills = 0
        if self._deaf is None:
            kills = self._dice.choices(list(_KILLS_CHANCES), list(_KILLS_CHANCES.values()))[0]
            run.faulty = self._dice.random() < _FAULTY
        elif self._deaf is Deafness.FOUND:
            kills = 1
        for _ in range(kills):
            self._live(run, where, _OPERATIONS, self._draw_end())
            run.loss.follow(run.records)
            run.kills += 1
            # What the killed process has started may still write to its files.
            shutil.rmtree(where)
            where.mkdir()
            run.loss.lose(0, where, Mood.NOTHING)
        hasty = kills > 0 and (self._deaf is not None or self._dice.random() < 0.5)
        self._live(run, where, _HASTY if hasty else _OPERATIONS, _End())
        return run

    def _draw_end(self) -> _End:
        if self._deaf is None and self._dice.random() < 0.5:
            return _End(change=self._dice.randint(1, _KILLED_AT_MAX))
        return _End(sync=self._dice.randint(1, _KILLED_AT_SYNC_MAX))

    def _live(self, run: _Run, where: Path, calls: tuple[int, int], end: _End) -> None:
        """From an opening to its end."""
        log = self._folder / "log"
        log.unlink(missing_ok=True)
        seed, operations = self._dice.getrandbits(32), self._dice.randint(*calls)
        faults, files = None, _FILES[run.device.family]
        if run.faulty:
            failing = _EVERYTHING if self._dice.random() < 0.3 else files
            faults = Faults(failing, _FAILING_WRITES, _FAILING_SYNCS, self._dice.getrandbits(32))
        plan = LoadPlan(where, seed, run.device, operations, faults)
        child = self._nursery.start(recorded_load, plan, log, replace(end, files=files), self._deaf)
        try:
            status = child.join()
        except ChildLost as error:
            run.complaint = run.complaint or f"the run: {error}"
        else:
            run.complaint = run.complaint or _complaint(run, status, end)
        run.records = list(read_log(log)) if log.exists() else []

    def _lose(
        self, loss: PowerLoss, claims: Claims, done: PowerRound, index_lost: bool
    ) -> tuple[Path, Claims]:
        """Let the power go; (what is left, what it must hold from now on)."""
        left, checked = self._folder / f"round-{done.number}", self._folder / "checked"
        for path in (left, checked):
            shutil.rmtree(path, ignore_errors=True)
        left.mkdir()
        done.mood = loss.lose(done.seed, left)
        if done.index_lost:
            shutil.rmtree(data_of(left) / "index", ignore_errors=True)
        done.durable, done.invalidated = len(claims.durable), len(claims.invalidated)
        expected = Expected(
            frozenset(claims.durable), frozenset(claims.invalidated), index_lost or done.index_lost
        )
        shutil.copytree(left, checked)
        try:
            verdict: Verdict = self._nursery.call(
                verify, checked, done.device, expected, True, wait_s=_WAIT_S_MAX
            )
        except ChildLost as error:
            done.bad = f"verification: {error}"
            return left, claims
        done.bad = verdict.bad
        done.rebuilt = verdict.rebuilt
        done.unfinished = len(claims.visible - verdict.served)
        after = claims.copy()
        after.restart(verdict.served)
        return left, after


def _complaint(run: _Run, status: int, end: _End) -> str:
    if status == 0 or (end != _End() and status == -signal.SIGKILL):
        return ""
    if status == WRONG_BLOCK:
        return "a wrong block was served before the power went"
    if status == CANNOT_OPEN:
        # A device that fails while it is opened may be refused.
        return "" if run.faulty else "the store did not open"
    return f"the run ended with status {status}"


def recorded_load(tell: Tell, plan: LoadPlan, log: Path, end: _End, deaf: Deafness | None) -> None:
    """What the recorded child runs."""

    def write_batch(device: RingDevice, batch: TransferBatch) -> BatchProgress:
        return device._inner.write_batch(batch)

    recorder = recording()
    recorder.begin(plan.root, log, end.change)
    if end.sync:
        recorder.end(end.files, end.sync)
    # Writes by io_uring pass the recorder by; those of the device below do not.
    RingDevice.write_batch = write_batch  # type: ignore[method-assign,assignment]
    if deaf is not None:
        deafen(deaf)
    run_load(plan, recorder.note, lambda: tell(None))
