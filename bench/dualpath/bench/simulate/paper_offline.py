"""The paper's offline results: all agents at once, until the last is done (sections 7.3, 7.5, 7.6).

Owns which runs each result needs and how a figure is made of them. No figure has inputs of its
own. Declared, since the paper's text does not say: `SWEEP_AGENTS` of the P/D sweep, `QWEN_AGENTS`,
and that the run time of 2P4D with 2K agents is one at 64K.
"""

from __future__ import annotations

from collections.abc import Sequence

from dualpath.bench.models.catalogue import find_model
from dualpath.bench.simulate.comparison import Comparison, Table
from dualpath.bench.simulate.runs import Runs
from dualpath.bench.simulate.setting import Setting

ABLATION = ("basic", "layerwise", "dualpath-unscheduled", "dualpath", "split", "oracle")
COMPARED = ("basic", "dualpath", "split", "oracle")
AGENTS = (1024, 2048)
"""Of the 660B ablation: the paper takes the mean of both."""
SWEEP = ((1, 1), (2, 1), (1, 2))
SWEEP_AGENTS = 512
QWEN_AGENTS = 128
SCALES = (1.0, 3.0)
"""Factors of appends, and of answers."""
APPEND = 429
CONTEXTS = (16 << 10, 64 << 10)
CACHE_TO_COMPUTE = {
    "qwen2.5-32b": (117.0, 267.0),
    "gpt-oss-120b": (47.0, 95.0),
    "qwen3-235b": (39.0, 60.0),
    "ds-v3.2": (13.0, 36.0),
    "ds-v3": (4.8, 5.8),
}
EQUALITY, RATIO, ORDER = 0.03, 0.10, 0.01


class OfflineFigures:
    """`agents` of the 660B runs; a small number makes all runs small, for a quick look."""

    def __init__(self, base: Setting, agents: Sequence[int] = AGENTS) -> None:
        self._base = base
        self._agents = tuple(agents)
        self._small = base.replaced(model="ds-27b", agents=min(SWEEP_AGENTS, *agents))

    def settings(self) -> list[Setting]:
        """Everything that `comparisons` and `tables` look at."""
        base = self._base
        found = [base.replaced(agents=n, system=name) for n in self._agents for name in ABLATION]
        found += [self._sweep(p, d, name) for p, d in SWEEP for name in COMPARED]
        found += [self._longer(name, s, 1.0) for s in SCALES for name in COMPARED]
        found += [self._longer(name, 1.0, s) for s in SCALES for name in COMPARED]
        found += [self._balanced(name) for name in ("dualpath-unscheduled", "dualpath")]
        found += [self._qwen(name) for name in COMPARED]
        found += [self._scale(factor) for factor in (1, 2)]
        return found

    def comparisons(self, runs: Runs) -> list[Comparison]:
        """In the order of the paper."""
        return [
            *self._offline(runs),
            *self._sweep_results(runs),
            *self._append_results(runs),
            *self._ablation(runs),
            *self._balance(runs),
            *self._at_scale(runs),
        ]

    def tables(self, runs: Runs) -> list[Table]:
        """What the comparisons cannot hold."""
        return [self._longer_table(runs), self._qwen_table(runs), cache_to_compute()]

    def curves(self, runs: Runs) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """JCT over factors of appends and of answers."""
        return {
            title: {
                name: [(s, runs.jct_s(self._longer(name, *both))) for s, both in points]
                for name in COMPARED
            }
            for title, points in (
                ("append, times", [(s, (s, 1.0)) for s in SCALES]),
                ("generate, times", [(s, (1.0, s)) for s in SCALES]),
            )
        }

    def _sweep(self, prefill: int, decode: int, system: str) -> Setting:
        return self._small.replaced(prefill=prefill, decode=decode, system=system)

    def _longer(self, system: str, append: float, generate: float) -> Setting:
        few = self._agents[0]
        return self._base.replaced(agents=few, system=system, append=append, generate=generate)

    def _balanced(self, system: str) -> Setting:
        return self._base.replaced(agents=self._agents[0], length="48k", system=system)

    def _qwen(self, system: str) -> Setting:
        agents = min(QWEN_AGENTS, *self._agents)
        return self._base.replaced(
            model="qwen2.5-32b", prefill=1, decode=2, staging=320e9, agents=agents, system=system
        )

    def _scale(self, factor: int) -> Setting:
        agents = self._agents[-1] * factor
        return self._base.replaced(prefill=2 * factor, decode=4 * factor, agents=agents)

    def _offline(self, runs: Runs) -> list[Comparison]:
        def jct(agents: int, system: str) -> float:
            return runs.jct_s(self._base.replaced(agents=agents, system=system))

        gains = {n: jct(n, "basic") / jct(n, "dualpath") for n in self._agents}
        best = max(gains, key=lambda agents: gains[agents])
        split = max(jct(n, "split") / jct(n, "dualpath") for n in self._agents)
        gain = self._sweep_gain(runs, 1, 1)
        small = {name: runs.jct_s(self._sweep(1, 1, name)) for name in COMPARED}
        return [
            Comparison(
                "offline_660b_64k", 1.87, gains[best], RATIO, f"basic over dualpath, {best} agents"
            ),
            Comparison(
                "offline_660b_64k_over_oracle",
                1.0,
                jct(best, "dualpath") / jct(best, "oracle"),
                note="published: about Oracle",
            ),
            _not_worse("split_over_dualpath_660b", split),
            Comparison("offline_27b_64k", 1.78, gain, note="1P1D; published: up to"),
            Comparison(
                "offline_27b_64k_over_oracle",
                1.85,
                small["dualpath"] / small["oracle"],
                note="1P1D; published: 1.09 to 1.85",
            ),
        ]

    def _sweep_gain(self, runs: Runs, prefill: int, decode: int) -> float:
        basic = runs.jct_s(self._sweep(prefill, decode, "basic"))
        return basic / runs.jct_s(self._sweep(prefill, decode, "dualpath"))

    def _sweep_results(self, runs: Runs) -> list[Comparison]:
        gains = [self._sweep_gain(runs, p, d) for p, d in SWEEP]
        note = f"{self._small.agents} agents"
        found = [
            Comparison("pd_sweep_27b_mean", 1.64, sum(gains) / len(gains), RATIO, note),
            Comparison("pd_sweep_27b_best", 2.46, max(gains), RATIO, note),
        ]
        for name, one, other in (
            ("equality_basic_1p1d_basic_1p2d", (1, 1, "basic"), (1, 2, "basic")),
            ("equality_dualpath_1p1d_basic_2p1d", (1, 1, "dualpath"), (2, 1, "basic")),
            ("equality_dualpath_2p1d_dualpath_1p2d", (2, 1, "dualpath"), (1, 2, "dualpath")),
        ):
            ratio = runs.jct_s(self._sweep(*one)) / runs.jct_s(self._sweep(*other))
            found.append(Comparison(name, 1.0, ratio, EQUALITY))
        for prefill, decode in SWEEP:
            split = runs.jct_s(self._sweep(prefill, decode, "split"))
            ratio = split / runs.jct_s(self._sweep(prefill, decode, "dualpath"))
            found.append(_not_worse(f"split_over_dualpath_27b_{prefill}p{decode}d", ratio))
        return found

    def _append_results(self, runs: Runs) -> list[Comparison]:
        gains = [
            runs.jct_s(self._longer("basic", s, 1.0)) / runs.jct_s(self._longer("dualpath", s, 1.0))
            for s in SCALES
        ]
        note = f"{self._agents[0]} agents, appends times {SCALES[0]:g} to {SCALES[-1]:g}"
        return [
            Comparison("append_gain_least", 1.82, min(gains), note=note),
            Comparison("append_gain_most", 1.99, max(gains), note=note),
        ]

    def _ablation(self, runs: Runs) -> list[Comparison]:
        note = "JCT below basic; mean over " + " and ".join(map(str, self._agents))
        found = []
        for system, published in (
            ("layerwise", 0.1721),
            ("dualpath-unscheduled", 0.3819),
            ("dualpath", 0.4562),
        ):
            cuts = []
            for agents in self._agents:
                at = self._base.replaced(agents=agents)
                basic = runs.jct_s(at.replaced(system="basic"))
                cuts.append(1 - runs.jct_s(at.replaced(system=system)) / basic)
            cut = sum(cuts) / len(cuts)
            found.append(Comparison(f"ablation_{system}", published, cut, note=note))
        return found

    def _balance(self, runs: Runs) -> list[Comparison]:
        found = [
            Comparison(
                f"snic_max_over_mean_{system}",
                published,
                runs.number(self._balanced(system), "snic_max_over_mean"),
                note=f"48K, {self._agents[0]} agents, windows of 1 s",
            )
            for system, published in (("dualpath-unscheduled", 1.53), ("dualpath", 1.18))
        ]
        attention = runs.number(self._balanced("dualpath"), "attention_max_over_mean")
        note = f"48K, {self._agents[0]} agents, first 5 %"
        return [*found, Comparison("attention_max_over_mean", 1.06, attention, note=note)]

    def _at_scale(self, runs: Runs) -> list[Comparison]:
        one, two = self._scale(1), self._scale(2)
        ratio = runs.jct_s(two) / runs.jct_s(one)
        note = f"here 4P8D with {two.agents} agents over 2P4D with {one.agents}"
        found = [Comparison("scale_jct_ratio", 3201 / 3167, ratio, EQUALITY, note)]
        if one.agents == AGENTS[-1]:
            found.append(Comparison("jct_660b_2k_agents_s", 3167, runs.jct_s(one)))
        return found

    def _longer_table(self, runs: Runs) -> Table:
        rows = []
        for append, generate in [(s, 1.0) for s in SCALES] + [(1.0, s) for s in SCALES[1:]]:
            jct = {name: runs.jct_s(self._longer(name, append, generate)) for name in COMPARED}
            gain = jct["basic"] / jct["dualpath"]
            times = [f"{jct[name]:.0f}" for name in COMPARED]
            rows.append((f"{append:g}", f"{generate:g}", *times, f"{gain:.2f}"))
        headings = ("append x", "generate x", *(f"{name} s" for name in COMPARED), "gain")
        title = f"Longer appends and answers: 660B 2P4D, 64K, {self._agents[0]} agents"
        return Table(title, headings, rows)

    def _qwen_table(self, runs: Runs) -> Table:
        basic = runs.jct_s(self._qwen("basic"))
        rows = []
        for name in COMPARED:
            jct_s = runs.jct_s(self._qwen(name))
            ttft_s = runs.number(self._qwen(name), "ttft_s", "mean")
            rows.append((name, f"{jct_s:.0f}", f"{ttft_s:.2f}", f"{basic / jct_s:.2f}"))
        agents = self._qwen("basic").agents
        title = f"Qwen2.5-32B, 1P2D, 64K, {agents} agents, 320 GB a node"
        return Table(title, ("system", "JCT s", "TTFT s", "gain"), rows)


def cache_to_compute() -> Table:
    """GB of KV to load for each PFLOP to compute, 429 new tokens, at 16K and 64K of context."""
    rows = []
    for name, published in CACHE_TO_COMPUTE.items():
        model = find_model(name)
        counted, whole = [], []
        for context in CONTEXTS:
            pflop = model.prompt_flops(context, APPEND) / 1e15
            kv = model.layers * model.kv_bytes_per_token_layer
            counted.append(context * kv / 1e9 / pflop)
            whole.append(context * model.kv_bytes_per_token / 1e9 / pflop)
        rows.append(
            (
                name,
                f"{published[0]:g}-{published[1]:g}",
                f"{counted[0]:.3g}-{counted[1]:.3g}",
                f"{100 * (counted[0] / published[0] - 1):+.0f} %, "
                f"{100 * (counted[1] / published[1] - 1):+.0f} %",
                f"{whole[0]:.3g}-{whole[1]:.3g}",
            )
        )
    headings = ("model", "published", "counted", "deviation", "with indexer keys")
    return Table("GB of KV to load for each PFLOP, 16K-64K, 429 new tokens", headings, rows)


def _not_worse(name: str, ratio: float) -> Comparison:
    """JCT of split over dualpath: ours, the paper has none."""
    note = "ours: JCT over dualpath's, not worse than 1 %"
    return Comparison(name, 1.0, ratio, ORDER, note, ceiling=True)
