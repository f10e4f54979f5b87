"""What leaders of a testbed report, and which runs through a scheduler are refused."""

from __future__ import annotations

import pytest
from dualpath.bench.cluster.config import ClusterBenchConfig
from dualpath.bench.demo.config import DemoConfig
from dualpath.bench.testbed.engine_loads import EngineLoads, in_tokens
from dualpath.bench.testbed.scheduler_runs import scheduler_list, scheduler_words
from dualpath.scheduler.config import SchedulerConfig
from dualpath.scheduler.group_report import EngineReport, NodeReport
from dualpath.transfer.errors import InvalidRequest


def test_a_report_says_what_its_agents_knew_when_they_were_asked() -> None:
    loads = EngineLoads(("e0", "e1"), ("n0",))
    assert loads.reports(9) == (
        [EngineReport("e0", 0, 0), EngineReport("e1", 0, 0)],
        [NodeReport("n0", 0)],
        0,
    )
    loads.begin("a", 3, "e0", 100)
    asked = loads.began
    loads.begin("b", 5, "e0", 40)
    loads.polled({"n0": 70}, asked)
    engines, nodes, seen = loads.reports(9)
    assert (engines[0], nodes, seen) == (EngineReport("e0", 1, 100), [NodeReport("n0", 70)], 3)
    loads.polled({"n0": 0}, loads.began)
    assert loads.reports(9)[0][0] == EngineReport("e0", 2, 140)
    # The leader's own stream has not told the last one yet.
    assert loads.reports(4)[0][0] == EngineReport("e0", 1, 100)
    loads.end("a")
    loads.end("a")
    assert loads.reports(9)[0][0] == EngineReport("e0", 1, 40)


def test_queues_are_reported_in_tokens() -> None:
    assert in_tokens([("n0", 1000), ("n1", 0)], 4.0) == {"n0": 250, "n1": 0}


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
