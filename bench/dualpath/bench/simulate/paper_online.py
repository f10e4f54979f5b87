"""The paper's online results: agents arrive at a rate, under a promise on TTFT and TPOT (7.4, 8.2).

Capacity is the highest rate whose steady TTFT (mean, as the paper plots it) and TPOT keep the
promise, found by halving an interval; and none above what the storage NICs in use can read, where a
backlog grows without end though a short run does not show it: agents wait for their own turns.
Declared: how long agents arrive (`DURATION_S`) and from when on turns count (`runs.STEADY_FROM`);
the paper runs until TTFT is steady or breaks the promise.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualpath.bench.models.catalogue import find_model
from dualpath.bench.progress import Progress
from dualpath.bench.simulate.comparison import Comparison, Table
from dualpath.bench.simulate.runs import Runs
from dualpath.bench.simulate.setting import Setting
from dualpath.bench.testbed.workload import PAPER_TABLE, Context

TTFT_S, TPOT_S = 4.0, 0.05
DURATION_S = 900.0
ROUNDS = 4
SYSTEMS = ("basic", "dualpath", "split")
CLUSTERS = (("ds-v3.2", 2, 4, "660b", 2.25), ("ds-27b", 1, 1, "27b", 1.67))
MEAN = 1.96
GRID = (0.5, 1.0)
"""Rates of the tables, as shares of what dualpath can take."""
PARTS = ("scheduler", "read_queue", "read", "prefill_queue", "prefill")


@dataclass(slots=True)
class _Search:
    """Where the capacity of one system lies: kept at `low`, broken at `high`. `most`: agents a
    second whose bytes its storage NICs can read."""

    base: Setting
    most: float
    low: float
    high: float

    def at(self, aps: float) -> Setting:
        return self.base.replaced(aps=aps)

    @property
    def middle(self) -> float:
        return round((self.low + self.high) / 2, 4)

    @property
    def can_be_read(self) -> bool:
        """Of the rate in the middle."""
        return self.middle <= self.most


class OnlineFigures:
    """`duration_s` of arrivals: a short one is for a quick look."""

    def __init__(self, base: Setting, duration_s: float = DURATION_S, rounds: int = ROUNDS) -> None:
        self._base = base.replaced(duration_s=duration_s)
        self._rounds = rounds
        self.capacity: dict[tuple[str, str], float] = {}

    def simulate(self, runs: Runs, progress: Progress, jobs: int) -> None:
        """All runs, a round of the search at a time for all systems together."""
        searches = {
            (short, system): self._search(model, p, d, system)
            for model, p, d, short, _ in CLUSTERS
            for system in SYSTEMS
        }
        for number in range(self._rounds):
            title = f"online capacity, round {number + 1} of {self._rounds}"
            asked = [each.at(each.middle) for each in searches.values() if each.can_be_read]
            runs.simulate(asked, progress, jobs=jobs, title=title)
            for each in searches.values():
                aps = each.middle
                if each.can_be_read and kept(runs, each.at(aps)):
                    each.low = aps
                else:
                    each.high = aps
        self.capacity = {key: each.low for key, each in searches.items()}
        runs.simulate(self._grid(), progress, jobs=jobs, title="online rates")

    def comparisons(self, runs: Runs) -> list[Comparison]:
        """Capacities, and the points that the paper gives."""
        gains = {
            short: self.capacity[short, "dualpath"] / self.capacity[short, "basic"]
            for *_, short, _ in CLUSTERS
        }
        found = [
            Comparison(
                f"online_capacity_{short}",
                published,
                gains[short],
                note=f"{self.capacity[short, 'basic']:.3f} to "
                f"{self.capacity[short, 'dualpath']:.3f} agents/s",
            )
            for *_, short, published in CLUSTERS
        ]
        found.append(Comparison("online_capacity_mean", MEAN, sum(gains.values()) / len(gains)))
        for *_, short, _ in CLUSTERS:
            ratio = self.capacity[short, "split"] / self.capacity[short, "dualpath"]
            note = "ours: capacity of split over dualpath's"
            found.append(Comparison(f"online_split_{short}", 1.0, ratio, note=note))
        point = self._base.replaced(aps=0.4)
        for figure, published in (("ttft_s", 1.739), ("tpot_s", 0.039)):
            value = runs.number(point, "steady", figure)
            name = f"online_660b_0.4_aps_{figure}"
            found.append(Comparison(name, published, value, note="2P4D"))
        for aps, published in ((0.1, 69.0), (0.45, 681.0)):
            value = self.working_set_gb(runs, self._base.replaced(aps=aps))
            name = f"working_set_660b_{aps:g}_aps_gb"
            found.append(Comparison(name, published, value, note="rate x JCT x total / 2"))
        return found

    def tables(self, runs: Runs) -> list[Table]:
        """TTFT with its parts, and TPOT, over the rate."""
        rows = []
        for setting in self._grid():
            parts = [runs.number(setting, "steady", "ttft_parts_s", name) for name in PARTS]
            rows.append(
                (
                    f"{setting.model} {setting.prefill}P{setting.decode}D",
                    f"{setting.aps:.3f}",
                    setting.system,
                    f"{runs.number(setting, 'steady', 'ttft_s'):.2f}",
                    *(f"{part:.2f}" for part in parts),
                    f"{1e3 * runs.number(setting, 'steady', 'tpot_s'):.1f}",
                    f"{self.working_set_gb(runs, setting):.0f}",
                )
            )
        rows.sort(key=lambda row: (row[0], row[2], float(row[1])))
        headings = ("cluster", "agents/s", "system", "TTFT s", *(f"{name} s" for name in PARTS))
        title = "Online: TTFT and its parts, TPOT, working set"
        return [Table(title, (*headings, "TPOT ms", "working set GB"), rows)]

    def curves(self, runs: Runs) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """Steady TTFT over the rate, a picture a model; runs of the search are points too."""
        found: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for setting in runs.figures:
            if "steady" in runs.figures[setting]:
                lines = found.setdefault(f"{setting.model}: TTFT s over agents/s", {})
                value = min(8.0, runs.number(setting, "steady", "ttft_s"))
                lines.setdefault(setting.system, []).append((setting.aps, value))
        for lines in found.values():
            for points in lines.values():
                points.sort()
        return found

    def working_set_gb(self, runs: Runs, setting: Setting) -> float:
        """Rate x mean time of an agent x mean total tokens / 2, as KV: the paper's section 8.2. An
        agent's time is that of its turns: nothing passes between them."""
        row = PAPER_TABLE[Context(setting.length)]
        jct_s = runs.number(setting, "steady", "turn_s") * row.turns
        kv_bytes = find_model(setting.model).kv_bytes_per_token
        return setting.aps * jct_s * row.total / 2 * kv_bytes / 1e9

    def _search(self, model: str, prefill: int, decode: int, system: str) -> _Search:
        """Between a tenth and all of what the storage NICs in use can read."""
        base = self._base.replaced(model=model, prefill=prefill, decode=decode, system=system)
        row = PAPER_TABLE[Context(base.length)]
        agent_bytes = row.turns * row.context_mean * find_model(model).kv_bytes_per_token
        nodes = prefill if system == "basic" else prefill + decode
        most = nodes * base.snic / agent_bytes
        return _Search(base, most, 0.1 * most, 1.1 * most)

    def _grid(self) -> list[Setting]:
        found = []
        for model, prefill, decode, short, _ in CLUSTERS:
            most = self.capacity[short, "dualpath"]
            base = self._base.replaced(model=model, prefill=prefill, decode=decode)
            found += [
                base.replaced(aps=round(share * most, 4), system=system)
                for share in GRID
                for system in ("basic", "dualpath")
            ]
        found += [self._base.replaced(aps=aps) for aps in (0.1, 0.4, 0.45)]
        return found


def kept(runs: Runs, setting: Setting) -> bool:
    """Whether a run keeps the promise."""
    ttft_s = runs.number(setting, "steady", "ttft_s")
    return ttft_s <= TTFT_S and runs.number(setting, "steady", "tpot_s") <= TPOT_S
