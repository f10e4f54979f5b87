"""What leaders of a testbed report, and which runs through a scheduler are refused."""

from __future__ import annotations

import pytest
from dualpath.bench.cluster.config import ClusterBenchConfig
from dualpath.bench.demo.config import DemoConfig
from dualpath.bench.testbed.engine_loads import EngineLoads
from dualpath.bench.testbed.scheduler_runs import scheduler_list, scheduler_words
from dualpath.scheduler.config import SchedulerConfig
from dualpath.scheduler.group_report import EngineReport, NodeReport
from dualpath.transfer.errors import InvalidRequest


def test_a_report_says_what_has_begun_and_what_is_still_read() -> None:
    loads = EngineLoads(("n0", "n1"))
    idle = [EngineReport("n0", 0, 0), EngineReport("n1", 0, 0)]
    assert loads.reports(9) == (idle, [NodeReport("n0", 0), NodeReport("n1", 0)], 0)
    loads.begin("a", 3, "n0", 100, 60.0)
    loads.begin("b", 5, "n0", 40, 10.4)
    engines, nodes, seen = loads.reports(9)
    assert (engines[0], nodes[0], seen) == (EngineReport("n0", 2, 140), NodeReport("n0", 70), 5)
    # The leader's own stream has not told the last one yet: the scheduler adds it.
    engines, nodes, seen = loads.reports(4)
    assert (engines[0], nodes[0], seen) == (EngineReport("n0", 1, 100), NodeReport("n0", 60), 4)
    loads.loaded("a")
    assert loads.reports(9)[1][0] == NodeReport("n0", 10)
    for _ in range(2):
        loads.end("a")
        loads.loaded("a")
    assert loads.reports(9)[0][0] == EngineReport("n0", 1, 40)


def test_the_schedulers_flags_are_those_of_the_shaped_links() -> None:
    words = scheduler_words(
        "scheduler:split", storage_bytes_per_s=1e6, token_bytes=100.0, tokens_max=500
    )
    flags = dict(zip(words[::2], words[1::2], strict=True))
    assert flags["--policy"] == "split"
    assert float(flags["--alpha-tokens"]) == 30_000
    config = SchedulerConfig(
        policy=flags["--policy"],
        alpha_tokens=float(flags["--alpha-tokens"]),
        beta_tokens=float(flags["--beta-tokens"]),
    )
    assert config.policy_settings.beta_tokens == 500
    assert scheduler_list(" paper, split,") == ("paper", "split")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"schedulers": ("best",)}, "--scheduler best"),
        ({"schedulers": ("split", "split")}, "twice"),
        ({"schedulers": ("split",), "gpus": 2}, "--gpus is 2"),
        ({"schedulers": ("split",), "lone": True}, "not with --lone"),
        ({"schedulers": ("split",), "faults": "kill:decode1@5s"}, "not with --lone or --faults"),
        ({"schedulers": ("split",), "topologies": ((1, 0),)}, "--decode is 0"),
    ],
)
def test_runs_that_no_scheduler_can_serve_are_refused(
    settings: dict[str, object], text: str
) -> None:
    with pytest.raises(InvalidRequest, match=text):
        ClusterBenchConfig(**settings)  # type: ignore[arg-type]


def test_a_demo_without_decode_nodes_has_no_scheduler() -> None:
    with pytest.raises(InvalidRequest, match="--decode is 0"):
        DemoConfig(decode=0, schedulers=("paper",))
