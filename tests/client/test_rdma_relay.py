"""An agent relays over RDMA where that is its compute transport (simulated devices)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from dualpath.agent.config import AgentConfig
from dualpath.agent.places import Places
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    embedded_agent,
    stored,
    wrong_blocks,
)
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.lane import Lane
from dualpath.transfer.rdma.simulated_device import SimulatedDevice, SimulatedVerbs
from dualpath.transfer.rdma.simulated_fabric import SimulatedFabric

BLOCKS = 24
BYTES = BLOCKS * LAYOUT.block_bytes
PLACES = Places.contiguous(LAYOUT, BLOCKS)
RDMA: dict[str, Any] = {"compute_transport": "rdma"}


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedFabric]:
    """Each agent has a device of its own on it."""
    numbers = itertools.count()
    with SimulatedFabric() as fabric:

        def library(name: str) -> SimulatedVerbs:
            assert name == "auto"
            return SimulatedVerbs(SimulatedDevice(fabric, f"sim{next(numbers)}"))

        monkeypatch.setattr("dualpath.agent.compute_transport.open_verbs", library)
        yield fabric


@pytest.mark.parametrize("paths", [("relay:decode-1",), ()], ids=["relay", "split"])
def test_a_load_comes_by_a_relay_over_rdma(
    run_cluster: Callable[..., None], fabric: SimulatedFabric, paths: tuple[str, ...]
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler", **RDMA)
        _, hashes = await stored(filler, BLOCKS)
        await cluster.relay("decode-1", **RDMA)
        client = await cluster.embedded(**RDMA)
        agent = embedded_agent(client)
        assert agent.compute.transport.name == "rdma"
        namespace_id = await client.open_namespace(Namespace("model", LAYOUT))
        memory = await client.allocate(BYTES)
        load = await client.load(
            namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S, paths=paths
        )
        result = await load.result()
        assert result.blocks == BLOCKS
        assert wrong_blocks(memory, PLACES, hashes) == []
        # A busy machine may look like a slow path.
        assert set(result.events) <= {"overtaken", "stalled"}, result
        if paths:
            assert dict(result.shares) == {"relay:decode-1": BYTES}
            assert agent.compute.received_bytes == BYTES

    run_cluster(body)


@pytest.mark.parametrize(
    "settings",
    [
        {"compute_transport": "ucx"},
        {"rdma_service_level": 16},
        {"rdma_lane_service_level": ("save=16",)},
        {"rdma_lane_service_level": ("model=1",)},
        {"compute_transport": "rdma", "rdma_library": "ofi"},
        {"compute_transport": "rdma", "compute_limit_bytes_per_s": 1e6},
    ],
)
def test_settings_that_do_not_go_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=r"compute_|service|rdma_library"):
        AgentConfig(name="a", daemons=(), **settings)  # type: ignore[arg-type]


def test_an_agent_marks_each_lane_as_it_is_told() -> None:
    def agent(**settings: object) -> AgentConfig:
        return AgentConfig(name="a", daemons=(), **settings)  # type: ignore[arg-type]

    assert agent().service_levels == (0,) * len(Lane)
    assert agent(rdma_service_level=4).service_levels == (4,) * len(Lane)
    apart = agent(rdma_service_level=4, rdma_lane_service_level=("load-prefill=5", "save=0"))
    assert [apart.service_levels[list(Lane).index(lane)] for lane in Lane] == [
        {Lane.LOAD_PREFILL: 5, Lane.SAVE: 0}.get(lane, 4) for lane in Lane
    ]
