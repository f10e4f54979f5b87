"""The published results of arXiv 2602.21548 beside simulated ones.

Owns which runs each result needs and how a figure is made of them. The inputs are those committed
in `calibration.toml`, `catalogue.toml` and `engine_details.py`; no figure has inputs of its own.
What the paper leaves open (how many agents a run has) is declared here: `AGENTS`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dualpath.bench.progress import Progress
from dualpath.bench.simulate.request import SimulationRequest
from dualpath.bench.simulate.simulation import simulate

ABLATION = ("basic", "layerwise", "dualpath-unscheduled", "dualpath", "split", "oracle")
AGENTS = (1024, 2048)
"""Of the 660B runs: the paper's ablation takes the mean of both."""
SWEEP_AGENTS = 512
"""Of the P/D sweep of the 27B model; the paper's count is not known to this project."""
SWEEP = ((1, 1), (2, 1), (1, 2))
EQUALITY = 0.03
RATIO = 0.10
ORDER = 0.01


@dataclass(frozen=True, slots=True)
class Comparison:
    """`tolerance`: the share by which it may deviate, 0 where it is reported only. `ceiling`: less
    than published is no miss."""

    name: str
    published: float
    simulated: float
    tolerance: float = 0.0
    note: str = ""
    ceiling: bool = False

    @property
    def deviation(self) -> float:
        """Simulated over published, less 1."""
        return self.simulated / self.published - 1

    @property
    def verdict(self) -> str:
        """met, missed, or reported."""
        if not self.tolerance:
            return "reported"
        deviation = self.deviation if self.ceiling else abs(self.deviation)
        return "met" if deviation <= self.tolerance else "missed"


@dataclass(slots=True)
class PaperReport:
    """Comparisons, and every run's figures by its name."""

    comparisons: list[Comparison] = field(default_factory=list)
    runs: dict[str, Mapping[str, object]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """A name of a result: published, simulated, deviation, verdict; then all runs."""
        found: dict[str, object] = {
            one.name: {
                "published": one.published,
                "simulated": round(one.simulated, 4),
                "deviation": round(one.deviation, 4),
                "tolerance": one.tolerance,
                "verdict": one.verdict,
                "note": one.note,
            }
            for one in self.comparisons
        }
        return found | {"runs": self.runs, "processor_s": self.seconds}


def reproduce(
    progress: Progress, *, seed: int = 0, calibration: str = "", agents: Sequence[int] = ()
) -> PaperReport:
    """Run everything. `agents` replaces the 660B runs' counts, and a smaller one the sweep's too:
    for a quick look, whose figures are not the paper's setting. Raises InvalidRequest."""
    return _Reproduction(progress, seed, calibration, tuple(agents) or AGENTS).run()


class _Reproduction:
    def __init__(
        self, progress: Progress, seed: int, calibration: str, agents: tuple[int, ...]
    ) -> None:
        self._progress = progress
        self._seed = seed
        self._calibration = calibration
        self._agents = agents
        self._report = PaperReport()

    def run(self) -> PaperReport:
        for agents in self._agents:
            self._simulate("ds-v3.2", 2, 4, agents, ABLATION)
        for prefill, decode in SWEEP:
            self._simulate(
                "ds-27b", prefill, decode, self._sweep_agents, ("basic", "dualpath", "split")
            )
        self._offline()
        self._ablation()
        self._sweep()
        self._balance()
        return self._report

    @property
    def _sweep_agents(self) -> int:
        return min(SWEEP_AGENTS, *self._agents)

    def _simulate(
        self, model: str, prefill: int, decode: int, agents: int, systems: Sequence[str]
    ) -> None:
        request = SimulationRequest(
            model=model,
            prefill=prefill,
            decode=decode,
            agents=agents,
            systems=systems,
            calibration=self._calibration,
            seed=self._seed,
        )
        for system, _, setup in request.setups():
            name = f"{model} {prefill}P{decode}D {agents} {system}"
            self._progress.stage(name)
            began_s = time.process_time()
            result = simulate(setup, self._progress.move)
            self._report.seconds[name] = round(time.process_time() - began_s, 1)
            self._progress.done(f"{result.jct_s:.0f} s simulated")
            self._report.runs[name] = result.to_json()

    def _figure(self, place: str, agents: int, system: str, figure: str = "jct_s") -> float:
        value = self._report.runs[f"{place} {agents} {system}"][figure]
        assert isinstance(value, float)
        return value

    def _add(
        self, name: str, published: float, simulated: float, tolerance: float = 0.0, note: str = ""
    ) -> None:
        comparison = Comparison(name, published, simulated, tolerance, note)
        self._report.comparisons.append(comparison)

    def _add_split(self, name: str, ratio: float) -> None:
        """JCT of split over dualpath: ours, the paper has none."""
        note = "ours: JCT over dualpath's, not worse than 1 %"
        self._report.comparisons.append(Comparison(name, 1.0, ratio, ORDER, note, ceiling=True))

    def _offline(self) -> None:
        place = "ds-v3.2 2P4D"
        gains = {
            agents: self._figure(place, agents, "basic") / self._figure(place, agents, "dualpath")
            for agents in self._agents
        }
        best = max(gains, key=lambda agents: gains[agents])
        self._add(
            "offline_660b_64k", 1.87, gains[best], RATIO, f"basic over dualpath, {best} agents"
        )
        oracle = self._figure(place, best, "dualpath") / self._figure(place, best, "oracle")
        self._add("offline_660b_64k_over_oracle", 1.0, oracle, note="published: about Oracle")
        split = max(
            self._figure(place, agents, "split") / self._figure(place, agents, "dualpath")
            for agents in self._agents
        )
        self._add_split("split_over_dualpath_660b", split)

    def _ablation(self) -> None:
        for system, published in (
            ("layerwise", 0.172),
            ("dualpath-unscheduled", 0.382),
            ("dualpath", 0.456),
        ):
            cuts = [
                1
                - self._figure("ds-v3.2 2P4D", agents, system)
                / self._figure("ds-v3.2 2P4D", agents, "basic")
                for agents in self._agents
            ]
            self._add(
                f"ablation_{system}",
                published,
                sum(cuts) / len(cuts),
                note="JCT below basic; mean over " + " and ".join(map(str, self._agents)),
            )

    def _sweep(self) -> None:
        agents = self._sweep_agents

        def jct(prefill: int, decode: int, system: str) -> float:
            return self._figure(f"ds-27b {prefill}P{decode}D", agents, system)

        gains = [jct(p, d, "basic") / jct(p, d, "dualpath") for p, d in SWEEP]
        self._add("pd_sweep_27b_mean", 1.64, sum(gains) / len(gains), RATIO)
        self._add("pd_sweep_27b_best", 2.46, max(gains), RATIO)
        for name, one, other in (
            ("equality_basic_1p1d_basic_1p2d", (1, 1, "basic"), (1, 2, "basic")),
            ("equality_dualpath_1p1d_basic_2p1d", (1, 1, "dualpath"), (2, 1, "basic")),
            ("equality_dualpath_2p1d_dualpath_1p2d", (2, 1, "dualpath"), (1, 2, "dualpath")),
        ):
            self._add(name, 1.0, jct(*one) / jct(*other), EQUALITY)
        for prefill, decode in SWEEP:
            ratio = jct(prefill, decode, "split") / jct(prefill, decode, "dualpath")
            self._add_split(f"split_over_dualpath_27b_{prefill}p{decode}d", ratio)

    def _balance(self) -> None:
        place, agents = "ds-v3.2 2P4D", max(self._agents)
        for system, published in (("dualpath-unscheduled", 1.53), ("dualpath", 1.18)):
            value = self._figure(place, agents, system, "snic_max_over_mean")
            self._add(f"snic_max_over_mean_{system}", published, value, note="windows of 1 s")
        value = self._figure(place, agents, "dualpath", "attention_max_over_mean")
        self._add("attention_max_over_mean", 1.06, value, note="engines of a step")
