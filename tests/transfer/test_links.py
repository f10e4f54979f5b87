"""The link graph: binding devices, convergence, expected rates."""

from __future__ import annotations

import math

import pytest
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.links import Link, LinkGraph, LinkKind, Path
from hypothesis import given
from hypothesis import strategies as st


def cluster(snic: float = 50.0, cnic: float = 400.0, egress: float = 0.0) -> LinkGraph:
    """One prefill and one decode node, storage and compute networks apart."""
    return LinkGraph(
        [
            Link("daemon", LinkKind.DAEMON_EGRESS, egress),
            Link("p.snic", LinkKind.SNIC, snic),
            Link("d.snic", LinkKind.SNIC, snic),
            Link("d.cnic", LinkKind.CNIC_OUT, cnic),
            Link("p.cnic", LinkKind.CNIC_IN, cnic),
        ],
        [
            Path("direct", ("daemon", "p.snic")),
            Path("relay", ("daemon", "d.snic", "d.cnic", "p.cnic")),
        ],
    )


def test_two_storage_links_add_up() -> None:
    graph = cluster()
    assert graph.binding_link("direct").name == "p.snic"
    assert graph.binding_link("relay").name == "d.snic"
    assert not graph.shares_binding_device("direct", "relay")
    assert graph.relay_helps("direct", "relay")
    assert graph.expected_bytes_per_s(["direct", "relay"]) == pytest.approx(100)


def test_a_relay_cannot_help_where_both_paths_meet_at_one_nic() -> None:
    graph = LinkGraph(
        [Link("p.nic", LinkKind.SNIC, 50), Link("d.nic", LinkKind.SNIC, 50)],
        [Path("direct", ("p.nic",)), Path("relay", ("d.nic", "p.nic"))],
    )
    assert graph.shares_binding_device("direct", "relay")
    assert not graph.relay_helps("direct", "relay")
    assert graph.expected_bytes_per_s(["direct", "relay"]) == pytest.approx(50)


def test_a_lone_gpu_behind_a_narrow_compute_link_gains_nothing() -> None:
    graph = cluster(snic=50, cnic=50)
    graph.add_path(Path("local", ("daemon", "p.snic", "p.cnic")))
    assert graph.expected_bytes_per_s(["local", "relay"]) == pytest.approx(50)
    assert not graph.relay_helps("local", "relay")


def test_the_daemons_egress_bounds_the_sum() -> None:
    graph = cluster(egress=75)
    assert graph.expected_bytes_per_s(["direct", "relay"]) == pytest.approx(75)
    assert graph.relay_helps("direct", "relay")


def test_a_measured_rate_replaces_a_higher_limit() -> None:
    graph = cluster()
    graph.measured("d.snic", 10)
    assert graph.expected_bytes_per_s(["direct", "relay"]) == pytest.approx(60)
    graph.measured("d.snic", 0)
    assert graph.expected_bytes_per_s(["direct", "relay"]) == pytest.approx(100)


def test_a_link_crossed_twice_counts_twice() -> None:
    graph = LinkGraph([Link("nic", LinkKind.SNIC, 60)], [Path("loop", ("nic", "nic"))])
    assert graph.expected_bytes_per_s(["loop"]) == pytest.approx(30)


def test_without_any_limit_the_rate_is_unbounded_and_no_relay_is_needed() -> None:
    graph = cluster(snic=0, cnic=0)
    assert math.isinf(graph.expected_bytes_per_s(["direct"]))
    assert not graph.relay_helps("direct", "relay")


@given(
    st.lists(st.floats(1, 1e6), min_size=1, max_size=6),
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=5),
)
def test_fair_rates_fill_a_link_of_every_path_and_overfill_none(
    limits: list[float], routes: list[list[int]]
) -> None:
    links = [Link(f"l{index}", LinkKind.SNIC, limit) for index, limit in enumerate(limits)]
    paths = [
        Path(f"p{index}", tuple(f"l{hop % len(limits)}" for hop in route))
        for index, route in enumerate(routes)
    ]
    graph = LinkGraph(links, paths)
    rates = graph.fair_bytes_per_s([path.name for path in paths])
    used = {
        link.name: sum(rates[path.name] * path.links.count(link.name) for path in paths)
        for link in links
    }
    for link in links:
        assert used[link.name] <= link.limit_bytes_per_s * (1 + 1e-6)
    for path in paths:
        assert rates[path.name] > 0
        assert any(
            used[name] >= graph.capacity_bytes_per_s(name) * (1 - 1e-6) for name in path.links
        )
        alone = graph.expected_bytes_per_s([path.name])
        assert rates[path.name] <= alone * (1 + 1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda graph: graph.add_link(Link("daemon", LinkKind.SNIC)), "already"),
        (lambda graph: graph.add_path(Path("direct", ("daemon",))), "already"),
        (lambda graph: graph.add_path(Path("other", ("moon",))), "unknown link 'moon'"),
        (lambda graph: graph.add_path(Path("other", ())), "crosses no link"),
        (lambda graph: graph.binding_link("other"), "unknown path 'other'"),
        (lambda graph: graph.measured("moon", 1), "unknown link 'moon'"),
        (lambda graph: Link("x", LinkKind.SNIC, -1), "limit of -1"),
        (lambda graph: Link("", LinkKind.SNIC, 1), "needs a name"),
    ],
)
def test_a_wrong_graph_is_refused_by_name(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(InvalidRequest, match=words):
        make(cluster())
