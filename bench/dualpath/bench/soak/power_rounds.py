"""Rounds of power loss: a recorded store under mixed load, cut at random changes.

A run loads the store until each worker has made a number of calls. Its recording is then followed
up to a few random changes; at each of them the power goes, what may be left is written to a
directory of its own (power_loss.py), and the store there is checked by fsck, opened and verified
in another process. The next run goes on from one of these directories, so that recoveries are cut
as well. Stores in files and on a raw device take turns.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dualpath.bench.soak.children import ChildLost, Nursery, Tell
from dualpath.bench.soak.deafness import Deafness, deafen
from dualpath.bench.soak.place import DeviceKind, make_place
from dualpath.bench.soak.power_loss import Mood, PowerLoss
from dualpath.bench.soak.recording import Change, Record, read_log, recording
from dualpath.bench.soak.verification import Verdict, verify
from dualpath.bench.soak.witness import Claims
from dualpath.bench.soak.workload import CANNOT_OPEN, WRONG_BLOCK, LoadPlan, run_load
from dualpath.kvstore.ring_device import RingDevice
from dualpath.kvstore.transfer_batch import BatchProgress, TransferBatch

CUTS_A_RUN = 5
_OPERATIONS = (2, 40)
"""Fewest and most calls of a worker in one run."""
_WAIT_S_MAX = 120.0


@dataclass(slots=True)
class PowerRound:
    """One loss of power, before change `change` of the `changes` of a run."""

    number: int
    seed: int
    device: DeviceKind
    mood: Mood = Mood.NOTHING
    change: int = 0
    changes: int = 0
    bad: str = ""
    durable: int = 0
    """Blocks that had to be there."""
    unfinished: int = 0
    """Visible blocks that were not durable yet and are gone."""
    rebuilt: bool = False


@dataclass(slots=True)
class _Lineage:
    """Where the stores of one family have got to."""

    base: Path
    claims: Claims


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
            loss, records, complaint = self._record(lineage, device)
            changes = [at for at, record in enumerate(records) if record.kind is not Change.NOTE]
            cuts = sorted(self._dice.choices(changes, k=min(CUTS_A_RUN, count - number)))
            chosen, start = self._dice.randrange(len(cuts)), 0
            following: tuple[Path, Claims] | None = None
            for index, cut in enumerate(cuts):
                loss.follow(records[start:cut])
                start = cut
                claims = lineage.claims.copy()
                claims.follow(loss.notes)
                done = PowerRound(number, self._dice.getrandbits(32), device)
                done.change, done.changes = cut, len(records)
                left = self._lose(loss, claims, done)
                done.bad = "; ".join(filter(None, (complaint, done.bad)))
                complaint = ""
                yield done
                number += 1
                if index == chosen and not done.bad:
                    following = left
                elif not done.bad:
                    shutil.rmtree(left[0])
            if following is not None:
                shutil.rmtree(lineage.base)
                following[0].rename(lineage.base)
                lineage.claims = following[1]

    def _record(self, lineage: _Lineage, device: DeviceKind) -> tuple[PowerLoss, list[Record], str]:
        """(where a run began, what it did, what was wrong with it). The base stays as it is."""
        log, run = self._folder / "log", self._folder / "run"
        log.unlink(missing_ok=True)
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(lineage.base, run)
        operations = self._dice.randint(*_OPERATIONS)
        plan = LoadPlan(run, self._dice.getrandbits(32), device, operations)
        loss = PowerLoss(run)
        child = self._nursery.start(recorded_load, plan, log, self._deaf)
        try:
            status = child.join()
        except ChildLost as error:
            return loss, list(read_log(log)), f"the run: {error}"
        complaint = {
            0: "",
            WRONG_BLOCK: "a wrong block was served before the power went",
            CANNOT_OPEN: "the store did not open",
        }.get(status, f"the run ended with status {status}")
        return loss, list(read_log(log)), complaint

    def _lose(self, loss: PowerLoss, claims: Claims, done: PowerRound) -> tuple[Path, Claims]:
        """Let the power go; (what is left, what it must hold from now on)."""
        left, checked = self._folder / f"round-{done.number}", self._folder / "checked"
        for path in (left, checked):
            shutil.rmtree(path, ignore_errors=True)
        left.mkdir()
        done.mood = loss.lose(done.seed, left)
        done.durable = len(claims.durable)
        shutil.copytree(left, checked)
        try:
            verdict: Verdict = self._nursery.call(
                verify, checked, done.device, frozenset(claims.durable), True, wait_s=_WAIT_S_MAX
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


def recorded_load(tell: Tell, plan: LoadPlan, log: Path, deaf: Deafness | None) -> None:
    """What the recorded child runs."""

    def write_batch(device: RingDevice, batch: TransferBatch) -> BatchProgress:
        return device._inner.write_batch(batch)

    recorder = recording()
    recorder.begin(plan.root, log)
    # Writes by io_uring pass the recorder by; those of the device below do not.
    RingDevice.write_batch = write_batch  # type: ignore[method-assign,assignment]
    if deaf is not None:
        deafen(deaf)
    run_load(plan, recorder.note, lambda: tell(None))
