"""How results move with what is declared, and with other hardware and workloads.

Two groups of sweeps, one value changed at a time around the setting of the comparison:
`DECLARED`, the inputs that the paper leaves open and this project had to declare; `BEYOND`, what
the paper does not look at: how much hits, tools that take time, the NICs of the next generations,
host memory, the ratio of nodes. Nothing here is compared with a published number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dualpath.bench.progress import Progress
from dualpath.bench.simulate.comparison import PaperReport, Table
from dualpath.bench.simulate.engine_details import EngineDetails
from dualpath.bench.simulate.runs import Runs
from dualpath.bench.simulate.setting import Setting

LARGE_AGENTS, SMALL_AGENTS = 256, 128
PAYS = 1.05
"""A second path that gains less than this does not pay: its buffers and traffic have a price."""
GBIT = 0.125e9


@dataclass(frozen=True, slots=True)
class Sweep:
    """`points`: a label, and what is changed."""

    title: str
    points: Sequence[tuple[str, Mapping[str, object]]]


def _details(**changes: object) -> dict[str, object]:
    return {"details": EngineDetails(**changes)}  # type: ignore[arg-type]


DECLARED = (
    Sweep(
        "speed of prefill, times",
        [("1", {}), ("0.64", {"prefill_speed": 0.64}), ("0.4", {"prefill_speed": 0.4})],
    ),
    Sweep("KV in a prefill GPU, times", [("1", {}), ("0.25", {"prefill_hbm": 0.25})]),
    Sweep("reads at once a node", [("8", {}), ("2", _details(reads_at_once=2))]),
    Sweep("quota of attention, s", [("0.3", {}), ("1", _details(quota_s=1.0))]),
    Sweep("lockstep of prefill", [("on", {}), ("off", _details(lockstep=False))]),
    Sweep("trajectories", [("replayed", {}), ("compacted", {"length": "64k-compacted"})]),
    Sweep("agents, times", [("1", {}), ("0.5", {"agents": 0.5}), ("2", {"agents": 2.0})]),
)
BEYOND = (
    Sweep(
        "appends, times: a lower hit rate",
        [("1", {}), ("2", {"append": 2.0}), ("4", {"append": 4.0})],
    ),
    Sweep("tool latency, s", [("0", {}), ("5", {"tool_s": 5.0}), ("20", {"tool_s": 20.0})]),
    Sweep(
        "SNIC / CNIC, Gbit/s",
        [
            ("400/400", {}),
            ("800/400", {"snic": 800 * GBIT}),
            ("800/800", {"snic": 800 * GBIT, "cnic": 800 * GBIT}),
        ],
    ),
    Sweep(
        "SNIC, Gbit/s, with prefill 2.5 times as fast",
        [
            ("400", {"prefill_speed": 2.5, "cnic": 800 * GBIT}),
            ("800", {"prefill_speed": 2.5, "snic": 800 * GBIT, "cnic": 800 * GBIT}),
        ],
    ),
    Sweep("host memory for KV, GB a node", [("80", {}), ("20", {"staging": 20e9})]),
    Sweep("nodes", [("2P4D", {}), ("5P1D", {"prefill": 5, "decode": 1})]),
    Sweep("agents, times", [("1", {}), ("0.25", {"agents": 0.25}), ("0.0625", {"agents": 1 / 16})]),
)


class Sensitivity:
    """All sweeps. `factor` of the agents: a small one is for a quick look."""

    def __init__(self, base: Setting, factor: float = 1.0) -> None:
        large = max(2, round(LARGE_AGENTS * factor))
        small = max(2, round(SMALL_AGENTS * factor))
        self._large = base.replaced(agents=large)
        self._small = base.replaced(model="ds-27b", prefill=1, decode=1, agents=small)

    def report(self, progress: Progress, *, jobs: int) -> PaperReport:
        """Simulate, then tables and curves. Raises InvalidRequest."""
        runs = Runs()
        runs.simulate(self._settings(), progress, jobs=jobs, title="sensitivity")
        beyond = self._beyond(runs)
        return PaperReport(
            tables=[self._declared(runs), beyond, _not_paying(beyond)],
            curves=self._curves(runs),
            runs={each.name: figures for each, figures in runs.figures.items()},
            seconds={each.name: seconds for each, seconds in runs.seconds.items()},
        )

    def _settings(self) -> list[Setting]:
        found: list[Setting] = []
        for sweep in DECLARED:
            for _, changes in sweep.points:
                large, small = _changed(self._large, changes), _changed(self._small, changes)
                names = ("basic", "layerwise", "dualpath")
                found += [large.replaced(system=name) for name in names]
                found += [small.replaced(system=name) for name in ("basic", "dualpath")]
        for sweep in BEYOND:
            for _, changes in sweep.points:
                large = _changed(self._large, changes)
                found += [large.replaced(system=name) for name in ("basic", "dualpath", "split")]
        return found

    def _declared(self, runs: Runs) -> Table:
        rows = []
        for sweep in DECLARED:
            for label, changes in sweep.points:
                large, small = _changed(self._large, changes), _changed(self._small, changes)
                basic = runs.jct_s(large.replaced(system="basic"))
                layerwise = runs.jct_s(large.replaced(system="layerwise"))
                dualpath = runs.jct_s(large.replaced(system="dualpath"))
                gain = runs.jct_s(small.replaced(system="basic")) / runs.jct_s(small)
                rows.append(
                    (
                        f"{sweep.title}: {label}",
                        f"{basic:.0f}",
                        f"{dualpath:.0f}",
                        f"{basic / dualpath:.2f}",
                        f"{100 * (1 - layerwise / basic):.1f} %",
                        f"{gain:.2f}",
                    )
                )
        headings = ("input", "basic s", "dualpath s", "660B gain", "layer-wise", "27B 1P1D gain")
        title = (
            f"Declared inputs: 660B 2P4D {self._large.agents} agents, 27B 1P1D "
            f"{self._small.agents} agents, 64K"
        )
        return Table(title, headings, rows)

    def _beyond(self, runs: Runs) -> Table:
        rows = []
        for sweep in BEYOND:
            for label, changes in sweep.points:
                at = _changed(self._large, changes)
                basic = runs.jct_s(at.replaced(system="basic"))
                dualpath, split = runs.jct_s(at), runs.jct_s(at.replaced(system="split"))
                rows.append(
                    (
                        f"{sweep.title}: {label}",
                        f"{basic:.0f}",
                        f"{dualpath:.0f}",
                        f"{split:.0f}",
                        f"{basic / dualpath:.2f}",
                        f"{basic / split:.2f}",
                    )
                )
        headings = ("setting", "basic s", "dualpath s", "split s", "gain", "gain of split")
        title = f"Other hardware and workloads: 660B 2P4D, 64K, {self._large.agents} agents"
        return Table(title, headings, rows)

    def _curves(self, runs: Runs) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """Gains over the places of a sweep's points."""
        found: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for sweep in (*DECLARED, *BEYOND):
            lines: dict[str, list[tuple[float, float]]] = {}
            for place, (_, changes) in enumerate(sweep.points):
                at = _changed(self._large, changes)
                basic = runs.jct_s(at.replaced(system="basic"))
                gain = basic / runs.jct_s(at)
                lines.setdefault("660B dualpath", []).append((place, gain))
                if sweep in DECLARED:
                    small = _changed(self._small, changes)
                    gain = runs.jct_s(small.replaced(system="basic")) / runs.jct_s(small)
                    lines.setdefault("27B dualpath", []).append((place, gain))
            labels = ", ".join(label for label, _ in sweep.points)
            found[f"gain; {sweep.title}: {labels}"] = lines
        return found


def _changed(base: Setting, changes: Mapping[str, object]) -> Setting:
    """`agents` in a sweep is a factor."""
    factor = changes.get("agents")
    if isinstance(factor, float):
        changes = {**changes, "agents": max(2, round(base.agents * factor))}
    return base.replaced(system="dualpath").replaced(**changes)


def _not_paying(beyond: Table) -> Table:
    """Rows of a table of gains in which neither way of two paths gains enough."""
    rows = [row for row in beyond.rows if max(float(row[4]), float(row[5])) < PAYS]
    return Table(
        f"Where two paths do not pay: gains below {PAYS:g}",
        beyond.headings,
        rows or [("none",) * 6],
    )
