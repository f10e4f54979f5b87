"""Names, addresses and kernel commands of a demo's cluster, as values."""

import os

import pytest
from dualpath.bench.cluster.fault import link_names
from dualpath.bench.cluster.limits import limit_bytes_per_s
from dualpath.bench.testbed.ownership import is_stale, owner_tag
from dualpath.bench.testbed.shaping import (
    LinkRates,
    create_commands,
    destroy_commands,
    shape_commands,
)
from dualpath.bench.testbed.topology import NODES_MAX, Topology
from dualpath.transfer.errors import InvalidRequest


def test_every_node_has_its_own_addresses_on_both_networks() -> None:
    topology = Topology.of(NODES_MAX, NODES_MAX)
    storage = [node.storage_address for node in topology.nodes]
    compute = [node.compute_address for node in topology.nodes if node.compute_address]
    assert len(set(storage)) == len(storage) == 2 * NODES_MAX + 1
    assert len(set(compute)) == len(compute) == 2 * NODES_MAX
    assert not set(storage) & set(compute)
    assert Topology.of(2, 1).label == "2P1D"


@pytest.mark.parametrize(("prefill", "decode"), [(0, 1), (NODES_MAX + 1, 0), (1, -1)])
def test_impossible_numbers_of_nodes_are_named(prefill: int, decode: int) -> None:
    with pytest.raises(InvalidRequest, match=str(prefill if prefill != 1 else decode)):
        Topology.of(prefill, decode)


def test_all_devices_live_in_namespaces_of_the_prefix() -> None:
    topology = Topology.of(1, 2)
    commands = create_commands("p", topology) + shape_commands(
        "p", topology, LinkRates(50e6, 400e6)
    )
    for command in commands:
        assert command[0] in {"ip", "tc"}
        inside = command[1] == "-n" and command[2].startswith("p-")
        assert inside or (command[1:3] == ("netns", "add") and command[3].startswith("p-"))


def test_every_created_namespace_is_destroyed() -> None:
    topology = Topology.of(2, 3)
    made = {command[3] for command in create_commands("p", topology) if command[1] == "netns"}
    assert {command[3] for command in destroy_commands("p", topology)} == made


def test_each_link_is_limited_in_both_directions_and_the_storage_node_is_not() -> None:
    commands = shape_commands("p", Topology.of(1, 1), LinkRates(50e6, 400e6))
    rates = {
        (command[2], command[command.index("dev") + 1]): command[command.index("rate") + 1]
        for command in commands
        if "rate" in command
    }
    storage, compute = "400000000bit", "3200000000bit"
    assert rates == {
        ("p-switch", "s1"): storage,
        ("p-prefill-0", "snic"): storage,
        ("p-prefill-0", "cnic"): compute,
        ("p-prefill-0", "cnicin"): compute,
        ("p-switch", "s2"): storage,
        ("p-decode-0", "snic"): storage,
        ("p-decode-0", "cnic"): compute,
        ("p-decode-0", "cnicin"): compute,
    }


def test_traffic_to_the_own_compute_address_shares_the_compute_links_rate() -> None:
    commands = shape_commands("p", Topology.of(1, 0), LinkRates(50e6, 400e6))
    redirected = {
        command[command.index("dev") + 1] for command in commands if "redirect" in command
    }
    assert redirected == {"lo", "cnic"}
    on_lo = next(c for c in commands if "redirect" in c and c[c.index("dev") + 1] == "lo")
    assert "10.77.2.10/32" in on_lo


def test_every_shaped_queue_is_bounded_and_every_class_has_a_quantum() -> None:
    commands = shape_commands("p", Topology.of(2, 2), LinkRates(1e9, 8e9))
    classes = [command for command in commands if "class" in command]
    queues = [command for command in commands if "bfifo" in command]
    assert len(classes) == len(queues) == 16
    assert all("quantum" in command for command in classes)
    assert all(0 < int(command[command.index("limit") + 1]) <= 4 << 20 for command in queues)


@pytest.mark.parametrize(
    ("name", "stale"),
    [
        (f"dualpath-{owner_tag()}-switch", False),
        ("dualpath-4194305-1f-00ff-switch", True),
        ("dualpath-4194305-1f-00ff", True),
        (f"dualpath-{os.getpid()}-1-00ff-prefill-0", True),
        ("customer-net", False),
        ("dualpath-4194305-customer", False),
        ("dualpath-kept-4194305-1f-00ff", False),
    ],
    ids=("ours", "gone", "gone-no-node", "another-of-our-number", "foreign", "alike", "kept"),
)
def test_only_what_a_process_that_is_gone_has_made_is_stale(name: str, *, stale: bool) -> None:
    assert is_stale(name, "dualpath-") is stale


def test_further_storage_links_have_networks_rates_and_words_of_their_own() -> None:
    topology = Topology.of(1, 1, snics=2)
    assert topology.snics == 2
    assert topology.with_one_snic == Topology.of(1, 1)
    addresses = [each for node in topology.nodes for each in node.further_storage]
    assert len(set(addresses)) == len(topology.nodes)
    assert {each.rpartition(".")[0] for each in addresses} == {"10.77.201"}
    made = [" ".join(command) for command in create_commands("dp-1", topology)]
    assert sum("link add snic1 " in command for command in made) == len(topology.nodes)
    rates = LinkRates(8e6, 64e6, (4e6,))
    assert rates.node_storage_bytes_per_s == 12e6
    shaped = [" ".join(command) for command in shape_commands("dp-1", topology, rates)]
    assert any("dev snic1 " in command and "rate 32000000bit" in command for command in shaped)
    assert link_names(topology) == ("snic", "snic1", "cnic")
    assert limit_bytes_per_s(topology, rates) == 24e6
    assert limit_bytes_per_s(topology, rates, relays=False) == 12e6
