"""Simulates many settings, in several processes, and says how far it is.

A run is a function of its setting, so equal settings are simulated once, and neither the number of
processes nor their order changes a figure. Nothing is kept between calls.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

import numpy as np
from dualpath.bench.progress import Progress
from dualpath.bench.simulate.result import SimulationResult
from dualpath.bench.simulate.setting import Setting
from dualpath.bench.simulate.simulation import simulate
from dualpath.transfer.errors import InvalidRequest

STEADY_FROM = 0.4
"""Online, figures are of the turns that arrive after this part of the time of arrivals."""


@dataclass(slots=True)
class Runs:
    """Figures of each setting that was simulated, and the processor time of each."""

    figures: dict[Setting, Mapping[str, object]] = field(default_factory=dict)
    seconds: dict[Setting, float] = field(default_factory=dict)

    def number(self, setting: Setting, *path: str) -> float:
        """One figure of a run; KeyError for a run or figure that is not there."""
        found: object = self.figures[setting]
        for name in path:
            assert isinstance(found, Mapping), f"{setting.name}: no {path}"
            found = found[name]
        assert isinstance(found, int | float), f"{setting.name}: {path} is {found!r}"
        return float(found)

    def jct_s(self, setting: Setting) -> float:
        """Seconds until all agents are done."""
        return self.number(setting, "jct_s")

    def simulate(
        self, settings: Iterable[Setting], progress: Progress, *, jobs: int = 1, title: str = ""
    ) -> None:
        """Those that are not there yet. Raises InvalidRequest."""
        if jobs < 1:
            raise InvalidRequest(f"--jobs {jobs}: at least one process")
        wanted = [each for each in dict.fromkeys(settings) if each not in self.figures]
        if not wanted:
            return
        progress.stage(title or f"{len(wanted)} runs")
        if jobs == 1:
            for done, each in enumerate(wanted):
                self._take(each, run(each))
                progress.move((done + 1) / len(wanted), each.name)
        else:
            # Not forked: the parent may have threads.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(jobs, mp_context=context) as pool:
                # Long ones first, so that the last of them does not run alone.
                wanted.sort(key=lambda each: -each.agents * (each.duration_s * each.aps or 1))
                pending = {pool.submit(run, each): each for each in wanted}
                for done, future in enumerate(as_completed(pending)):
                    self._take(pending[future], future.result())
                    progress.move((done + 1) / len(wanted), pending[future].name)
        progress.done(f"{len(wanted)} runs")

    def _take(self, setting: Setting, found: tuple[Mapping[str, object], float]) -> None:
        self.figures[setting], self.seconds[setting] = found


def run(setting: Setting) -> tuple[Mapping[str, object], float]:
    """Figures of one run, and the processor seconds it took."""
    began_s = time.process_time()
    result = simulate(setting.setup())
    found = result.to_json()
    if setting.aps:
        found |= steady_figures(result, setting)
    return found, round(time.process_time() - began_s, 2)


def steady_figures(result: SimulationResult, setting: Setting) -> dict[str, object]:
    """Means of the turns that arrive while agents still do, after a start: TTFT, its parts, TPOT,
    and the time from a turn's arrival to its end."""
    records = result.records
    arrive_s = records.column("arrive_s")
    steady = (arrive_s >= STEADY_FROM * setting.duration_s) & (arrive_s < setting.duration_s)
    if not steady.any():
        return {"steady": {}}
    several = records.generate > 1
    decoding = steady[several]
    tpot_s = records.tpot_s()[decoding]
    times = ("arrive_s", "assigned_s", "read_begin_s", "read_end_s", "prefill_s", "first_token_s")
    columns = [records.column(name)[steady] for name in times]
    parts = ("scheduler", "read_queue", "read", "prefill_queue", "prefill")
    means = {
        name: float((after - before).mean())
        for name, before, after in zip(parts, columns, columns[1:], strict=False)
    }
    return {
        "steady": {
            "turns": int(steady.sum()),
            "ttft_s": float(records.ttft_s()[steady].mean()),
            "ttft_p90_s": float(np.percentile(records.ttft_s()[steady], 90)),
            "tpot_s": float(tpot_s.mean()) if tpot_s.size else 0.0,
            "ttft_parts_s": means,
            "turn_s": float((records.column("done_s") - arrive_s)[steady].mean()),
        }
    }
