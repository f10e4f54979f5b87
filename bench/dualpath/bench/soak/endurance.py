"""Mixed load on a daemon at capacity, for minutes: nothing may grow, and p99 must stay.

Owns one daemon and the engines of two tenants beside it. Samples the daemon's memory, descriptors,
threads, leases and reservations every second, and the times of the engines' calls. What the first
third shows is compared with what the last third shows.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dualpath.bench.soak.children import Child, ChildLost, Nursery
from dualpath.bench.soak.daemon import Sample, daemon_config, sampled_daemon
from dualpath.bench.soak.engine import EnginePlan, run_engines
from dualpath.bench.soak.place import DeviceKind, data_of
from dualpath.bench.soak.workload import WRONG_BLOCK

T = TypeVar("T")

_WAIT_S_MAX = 60.0
_PACE_S = 0.002
_WARM_SHARE = 0.2
"""Of the time: caches and tables fill, nothing is judged."""
MEMORY_GROWTH_MAX = 16 << 20
"""Bytes; what an allocator keeps or gives back by itself."""
P99_RATIO_MAX = 2.0
JUDGED_S_MIN = 120.0
"""Shorter runs are judged by wrong blocks and deaths only."""


@dataclass(slots=True)
class Endurance:
    """What a run showed."""

    seconds: float
    calls: dict[str, int] = field(default_factory=dict)
    p50_ms: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By call: in the first third, in the last."""
    p99_ms: dict[str, tuple[float, float]] = field(default_factory=dict)
    memory_bytes: tuple[float, float] = (0.0, 0.0)
    descriptors: tuple[float, float] = (0.0, 0.0)
    threads: tuple[float, float] = (0.0, 0.0)
    leases: tuple[float, float] = (0.0, 0.0)
    reservations: tuple[float, float] = (0.0, 0.0)
    evicted_blocks: int = 0
    bad: str = ""


def endure(
    nursery: Nursery, folder: Path, seed: int, seconds: float, on_tick: Callable[[float], None]
) -> Endurance:
    """Run for `seconds`."""
    folder.mkdir(parents=True)
    socket, diary = folder / "socket", folder / "diary"
    config = daemon_config(data_of(folder), socket, DeviceKind.RING)
    daemon = nursery.start(sampled_daemon, config)
    engines: Child | None = None
    samples: list[Sample] = []
    done = Endurance(seconds)
    started = time.monotonic()
    try:
        daemon.hear(_WAIT_S_MAX)
        plan = EnginePlan(f"unix:{socket}", diary, seed, _PACE_S)
        engines = nursery.start(run_engines, plan)
        engines.hear(_WAIT_S_MAX)
        while (now := time.monotonic() - started) < seconds:
            samples.append(daemon.hear(_WAIT_S_MAX))
            on_tick(now)
            status = engines.wait(0)
            if status is not None:
                wrong = status == WRONG_BLOCK
                done.bad = "a wrong block was loaded" if wrong else f"the engines: {status}"
                return done
    except ChildLost as error:
        done.bad = f"the daemon or the engines: {error}"
        return done
    finally:
        for child in (engines, daemon):
            if child is not None:
                child.kill()
    _compare(done, samples, diary)
    return done


def _compare(done: Endurance, samples: Sequence[Sample], diary: Path) -> None:
    judged = samples[int(len(samples) * _WARM_SHARE) :]
    first, last = _thirds(judged)

    def medians(of: Callable[[Sample], float]) -> tuple[float, float]:
        return statistics.median(map(of, first)), statistics.median(map(of, last))

    done.memory_bytes = medians(lambda sample: sample.memory_bytes)
    done.descriptors = medians(lambda sample: sample.descriptors)
    done.threads = medians(lambda sample: sample.threads)
    done.leases = medians(lambda sample: sample.leases)
    done.reservations = medians(lambda sample: sample.reservations)
    done.evicted_blocks = samples[-1].evicted_blocks
    times: dict[str, list[float]] = {}
    for line in diary.read_bytes().splitlines():
        entry = json.loads(line)
        if "call" in entry:
            times.setdefault(entry["call"], []).append(entry["ms"])
    for call, ms in sorted(times.items()):
        done.calls[call] = len(ms)
        parts = _thirds(ms[int(len(ms) * _WARM_SHARE) :])
        done.p50_ms[call] = (_percentile(parts[0], 0.5), _percentile(parts[1], 0.5))
        done.p99_ms[call] = (_percentile(parts[0], 0.99), _percentile(parts[1], 0.99))
    if done.seconds >= JUDGED_S_MIN:
        done.bad = "; ".join(_complaints(done))


def _thirds(values: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    size = max(1, len(values) // 3)
    return values[:size], values[-size:]


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def _complaints(done: Endurance) -> list[str]:
    found = []
    if done.memory_bytes[1] - done.memory_bytes[0] > MEMORY_GROWTH_MAX:
        found.append(f"memory grew from {done.memory_bytes[0]:.0f} to {done.memory_bytes[1]:.0f}")
    for name in ("descriptors", "threads", "leases", "reservations"):
        before, after = getattr(done, name)
        if after > 1.5 * before + 4:
            found.append(f"{name} grew from {before:.0f} to {after:.0f}")
    for call, (before, after) in done.p99_ms.items():
        if after > P99_RATIO_MAX * before + 5:
            found.append(f"p99 of {call} went from {before:.1f} to {after:.1f} ms")
    if not done.evicted_blocks:
        found.append("nothing was evicted: the store was not at capacity")
    return found
