"""Settings name their runs and make what they say; runs do not depend on processes."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from dualpath.bench.progress import Progress
from dualpath.bench.simulate.engine_details import EngineDetails
from dualpath.bench.simulate.paper_online import PARTS, OnlineFigures, kept
from dualpath.bench.simulate.runs import Runs, run
from dualpath.bench.simulate.sensitivity import BEYOND, DECLARED, Sensitivity
from dualpath.bench.simulate.setting import ScaledPrefill, Setting
from dualpath.transfer.errors import InvalidRequest

FEW = Setting(model="ds-27b", prefill=1, decode=1, length="32k", agents=2)


def test_a_name_tells_all_that_is_not_as_usual() -> None:
    assert Setting().name == "ds-v3.2 2P4D 64k 1024 dualpath"
    changed = Setting(append=2.0, details=EngineDetails(reads_at_once=2), system="basic")
    assert changed.name == "ds-v3.2 2P4D 64k 1024 basic append=2 reads_at_once=2"
    assert Setting(aps=0.4, duration_s=9.0).name == "ds-v3.2 2P4D 64k 0.4/s dualpath"


def test_a_setup_is_what_the_setting_says() -> None:
    usual = FEW.setup()
    slow = FEW.replaced(prefill_speed=0.5, prefill_hbm=0.25, staging=40e9, system="basic").setup()
    assert isinstance(slow.model.compute, ScaledPrefill)
    for prompts in ([(1000, 100)], [(0, 4000), (9000, 1)]):
        once, twice = usual.model.compute, slow.model.compute
        assert twice.prefill_s(prompts) == pytest.approx(2 * once.prefill_s(prompts))
        assert twice.attention_s(prompts) == pytest.approx(2 * once.attention_s(prompts))
    assert slow.model.compute.decode_step_s(9, 9000) == usual.model.compute.decode_step_s(9, 9000)
    assert slow.model.prefill_hbm_tokens == usual.model.prefill_hbm_tokens / 4
    assert slow.cluster.staging_bytes == 40e9
    assert (slow.system.name, slow.arrivals) == ("basic", usual.arrivals)
    with pytest.raises(InvalidRequest, match="prefill -1 times"):
        FEW.replaced(prefill_speed=-1).setup()


def test_equal_settings_are_simulated_once_and_processes_change_nothing() -> None:
    settings = [FEW, FEW.replaced(system="oracle"), FEW.replaced()]
    one, two = Runs(), Runs()
    one.simulate(settings, Progress(), jobs=1)
    two.simulate(settings, Progress(), jobs=2)
    assert len(one.figures) == 2
    assert one.figures == two.figures
    assert one.jct_s(FEW) > one.jct_s(settings[1])
    with pytest.raises(InvalidRequest, match="--jobs 0"):
        one.simulate(settings, Progress(), jobs=0)


def test_steady_figures_are_of_turns_that_arrive_while_agents_do() -> None:
    online = FEW.replaced(aps=0.2, duration_s=60.0)
    found, _ = run(online)
    steady = found["steady"]
    assert isinstance(steady, dict)
    turns = found["turns"]
    assert isinstance(turns, int)
    assert 0 < steady["turns"] < turns
    assert sum(steady["ttft_parts_s"].values()) == pytest.approx(steady["ttft_s"])
    assert steady["turn_s"] > steady["ttft_s"]
    runs = Runs()
    runs.simulate([online], Progress())
    assert kept(runs, online)


class KnownCapacity(Runs):
    """Runs that break the promise above a rate which is known for each system."""

    def simulate(
        self, settings: Iterable[Setting], progress: Progress, *, jobs: int = 1, title: str = ""
    ) -> None:
        """Figures without a simulation."""
        for each in settings:
            most = {"basic": 0.25, "dualpath": 0.5, "split": 0.51}[each.system]
            ttft_s = 9.0 if each.aps > most else 1.0
            parts = dict.fromkeys(PARTS, ttft_s / 5)
            steady = {"ttft_s": ttft_s, "tpot_s": 0.01, "ttft_parts_s": parts, "turn_s": 2.0}
            self.figures[each] = {"steady": steady}


def test_the_search_comes_near_the_rate_above_which_the_promise_is_broken() -> None:
    figures, runs = OnlineFigures(Setting(), rounds=7), KnownCapacity()
    figures.simulate(runs, Progress(), 1)
    for (_, system), found in figures.capacity.items():
        known = {"basic": 0.25, "dualpath": 0.5, "split": 0.51}[system]
        assert known - 0.02 < found <= known
    (gain,) = [one for one in figures.comparisons(runs) if one.name == "online_capacity_660b"]
    assert gain.simulated == pytest.approx(2.0, rel=0.1)


def test_every_sweep_begins_with_a_point_and_all_rows_are_there() -> None:
    report = Sensitivity(Setting(length="32k"), 0.004).report(Progress(), jobs=1)
    declared, beyond, idle = report.tables
    assert len(declared.rows) == sum(len(sweep.points) for sweep in DECLARED)
    assert len(beyond.rows) == sum(len(sweep.points) for sweep in BEYOND)
    # Two agents fill no link.
    assert len(idle.rows) > 1
    assert len(report.curves) == len(DECLARED) + len(BEYOND)
