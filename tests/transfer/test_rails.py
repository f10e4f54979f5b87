"""Several links of a node: which make a path, and how chunks are spread over them."""

from __future__ import annotations

import socket
import struct
from itertools import pairwise

import pytest
from dualpath.transfer.dispatch_config import DispatchConfig
from dualpath.transfer.dispatcher import Dispatcher
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.nics import below, device_of, on_link
from dualpath.transfer.placement import (
    POLICY_NAMES,
    LoadView,
    PathKind,
    PathView,
    direct_path,
    policy_named,
    relay_of,
    relay_path,
)
from dualpath.transfer.rails import LocalEnd, Rail, check_hosts, further_rails
from dualpath.transfer.rates import RateEstimate
from dualpath.transfer.tcp_transport import bind_locally

CHUNK = 256 << 10
HOSTS = ("10.0.0.1", "10.0.1.1")


def end(host: str, device: str, reaches: str = "", lower: str = "") -> LocalEnd:
    return LocalEnd(host, device, frozenset({lower or device}), frozenset(filter(None, [reaches])))


# Which pairs of addresses are used.


def test_each_further_device_gets_the_address_in_its_own_network() -> None:
    ends = [end("10.0.0.7", "eth0", HOSTS[0]), end("10.0.1.7", "eth1", HOSTS[1])]
    found = further_rails(frozenset({"eth0"}), ends, HOSTS)
    assert found == (Rail("eth1", "10.0.1.7", "eth1", frozenset({"eth1"}), 1),)


@pytest.mark.parametrize(
    "ends",
    [
        [end("10.0.1.7", "eth0", HOSTS[1])],  # another address of the first device
        [end("10.0.1.7", "eth0.7", HOSTS[1], lower="eth0")],  # a VLAN over it
        [end("192.168.0.7", "eth1")],  # another network: the one of a model, say
    ],
)
def test_what_shares_a_device_or_leads_elsewhere_is_no_rail(ends: list[LocalEnd]) -> None:
    assert further_rails(frozenset({"eth0"}), ends, HOSTS) == ()


def test_two_addresses_of_one_further_device_are_one_rail() -> None:
    ends = [end("10.0.1.7", "eth1", HOSTS[1]), end("10.0.1.8", "eth1", HOSTS[1])]
    assert [rail.host for rail in further_rails(frozenset(), ends, HOSTS)] == ["10.0.1.7"]


def test_addresses_that_were_asked_for_are_spread_over_those_of_the_other_side() -> None:
    ends = [LocalEnd(f"127.0.0.{index}", "", frozenset(), frozenset()) for index in (2, 3, 4)]
    assert further_rails(frozenset(), ends, HOSTS) == ()
    found = further_rails(frozenset(), ends, HOSTS, asked=True)
    assert [(rail.name, rail.remote) for rail in found] == [
        ("127.0.0.2", 1),
        ("127.0.0.3", 0),
        ("127.0.0.4", 1),
    ]


def test_devices_are_found_by_the_networks_that_they_are_in() -> None:
    def line(device: str, network: str, mask: str, flags: int) -> str:
        words = [
            f"{struct.unpack('=I', socket.inet_aton(each))[0]:08X}" for each in (network, mask)
        ]
        return f"{device}\t{words[0]}\t00000000\t{flags:04X}\t0\t0\t0\t{words[1]}\t0\t0\t0"

    table = "\n".join(
        [
            "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT",
            line("eth0", "0.0.0.0", "0.0.0.0", 3),  # the default route, by a gateway
            line("eth1", "10.0.1.0", "255.255.255.0", 1),
            line("eth2", "10.0.1.0", "255.255.255.0", 1),
            line("eth3", "10.0.0.0", "255.255.0.0", 3),
        ]
    )
    assert on_link("10.0.1.9", table) == {"eth1", "eth2"}
    assert on_link("10.0.2.9", table) == frozenset()
    assert on_link("store.example", table) == frozenset()


def test_loopback_is_no_device() -> None:
    assert device_of("127.0.0.1") == ""
    assert below("no-such-device") == {"no-such-device"}


@pytest.mark.parametrize("hosts", [("10.0.0.1", "10.0.0.1"), ("10.0.0.1:70",), ("eth0",)])
def test_addresses_that_are_none_are_refused_by_name(hosts: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match="storage_addresses"):
        check_hosts(hosts, "storage_addresses")


def test_a_connection_leaves_from_the_address_it_is_bound_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as sock:
        bind_locally(sock, "127.0.0.5", "")
        sock.connect(server.getsockname())
        caller, address = server.accept()
        caller.close()
    assert address[0] == "127.0.0.5"


# What policies make of several links of one node.


def view(name: str, *, up: bool = True, queue: int = 0, spare: bool = False) -> PathView:
    kind = PathKind.RELAY if relay_of(name) else PathKind.DIRECT
    return PathView(name, kind, up, queue, 0, 0.0, spare=spare)


TWO_EACH = [
    view("direct", queue=5),
    view(direct_path("eth1"), queue=5),
    view(relay_path("d0"), queue=2),
    view(relay_path("d0", 1), queue=3),
]


def chosen(policy: str, paths: list[PathView], turn: int = 0, peer: str = "") -> tuple[str, ...]:
    return policy_named(policy).paths_for(LoadView("load", CHUNK, peer, turn), paths)


def test_a_policy_names_all_links_of_the_nodes_that_it_chooses() -> None:
    own, relay = ("direct", "direct:eth1"), ("relay:d0", "relay:d0:1")
    assert chosen("direct", TWO_EACH) == own
    assert chosen("split", TWO_EACH) == (*own, *relay)
    assert [chosen("round-robin", TWO_EACH, turn) for turn in range(3)] == [own, relay, own]
    assert chosen("shorter-queue", TWO_EACH, peer="d0") == relay


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_link_whose_device_another_uses_stands_by_for_it(policy: str) -> None:
    beside = [view("direct"), view("direct:eth1", spare=True)]
    assert chosen(policy, beside) == ("direct",)
    assert chosen(policy, [view("direct", up=False), beside[1]]) == ("direct:eth1",)


# How chunks are spread.


class Links:
    """Links of given rates, each serving its chunks one after another, in virtual time."""

    def __init__(self, **rates: float) -> None:
        self.rates = {direct_path(name.strip("_")): rate for name, rate in rates.items()}
        self.config = DispatchConfig()
        self.dispatcher = Dispatcher(self.config)
        for name in self.rates:
            self.dispatcher.add_path(name, PathKind.DIRECT, 0.0)
        self.now = 0.0
        self.landed: list[tuple[float, str]] = []
        self.losses: list[float] = []
        self.dead: set[str] = set()
        self._queues: dict[str, list[int]] = {name: [] for name in self.rates}
        self._due: dict[str, float] = {}
        self._copies: dict[str, float] = {}
        """When the copy that a link on trial carries comes."""

    def load(self, chunks: int) -> None:
        self.dispatcher.add_load("load", [CHUNK] * chunks, policy_named("split"), self.now)

    def run(self, until_s: float) -> None:
        while self.now < until_s and not self.dispatcher.is_done("load"):
            self._decide()
            event_s = self.now + max(1e-6, self.dispatcher.next_event_s(self.now))
            self.now = min(until_s, event_s, *self._due.values(), *self._copies.values())
            for name, due_s in tuple(self._due.items()):
                if due_s <= self.now:
                    self._land(name)
            for name, due_s in tuple(self._copies.items()):
                if due_s <= self.now:
                    del self._copies[name]
                    self.dispatcher.tried(name, self.now)

    def share(self, path: str, since_s: float, until_s: float) -> float:
        part = [name for at, name in self.landed if since_s <= at < until_s]
        return part.count(path) / len(part)

    def _decide(self) -> None:
        for name in self.dispatcher.stalled(self.now):
            self._lose(name)
        for grant in self.dispatcher.overtaken(self.now):
            for chunk in grant.chunks:
                self.dispatcher.failed("load", chunk, grant.path, "overtaken", self.now)
                self._queues[grant.path].remove(chunk)
            self._due.pop(grant.path, None)
            self._begin(grant.path)
        for grant in self.dispatcher.grants(self.now):
            self._queues[grant.path] += grant.chunks
            if grant.path not in self._due:
                self._begin(grant.path)
        for grant in self.dispatcher.trials(self.now):
            if grant.path not in self.dead:
                self._copies[grant.path] = self.now + CHUNK / self.rates[grant.path]

    def _lose(self, name: str) -> None:
        self.losses.append(self.now)
        self.dispatcher.path_lost(name, "stalled", self.now)
        self._queues[name].clear()
        self._due.pop(name, None)
        self._copies.pop(name, None)

    def _begin(self, name: str) -> None:
        if self._queues[name] and name not in self.dead:
            self._due[name] = self.now + CHUNK / self.rates[name]

    def _land(self, name: str) -> None:
        del self._due[name]
        self.dispatcher.verified("load", [self._queues[name].pop(0)], name, self.now)
        self.landed.append((self.now, name))
        self._begin(name)


def test_links_carry_in_proportion_to_their_rates() -> None:
    links = Links(_=80e6, eth1=20e6)
    links.load(4000)
    links.run(5.0)
    assert links.share("direct:eth1", 1.0, 5.0) == pytest.approx(0.2, rel=0.1)
    assert len(links.landed) * CHUNK >= 0.97 * 5.0 * 100e6


def test_weights_follow_within_a_second_of_a_change() -> None:
    links = Links(_=50e6, eth1=50e6)
    links.load(8000)
    links.run(3.0)
    links.rates["direct:eth1"] /= 4
    links.run(6.0)
    assert links.share("direct:eth1", 1.0, 3.0) == pytest.approx(0.5, rel=0.1)
    assert links.share("direct:eth1", 4.0, 6.0) == pytest.approx(0.2, rel=0.1)
    views = {view.name: view.rate_bytes_per_s for view in links.dispatcher.views(6.0)}
    assert views["direct:eth1"] == pytest.approx(12.5e6, rel=0.1)
    links.rates["direct:eth1"] *= 4
    links.run(9.0)
    assert links.share("direct:eth1", 7.0, 9.0) == pytest.approx(0.5, rel=0.1)


def test_a_link_that_carries_nothing_is_left_and_tried_with_copies_that_nobody_waits_for() -> None:
    links = Links(_=50e6, eth1=50e6)
    links.load(16000)
    links.run(1.0)
    links.dead.add("direct:eth1")
    links.run(30.0)
    gaps = [after - before for before, after in pairwise(links.losses)]
    patience_s = links.dispatcher.patience_s("direct:eth1")
    assert len(gaps) >= 8, links.losses
    assert max(gaps) <= patience_s + links.config.trial_pause_s_max + 0.1, gaps
    # Meanwhile the other loses nothing.
    assert links.share("direct", 3.0, 30.0) == 1.0
    through = sum(1 for at, _ in links.landed if at >= 3.0) * CHUNK
    assert through >= 0.97 * 27.0 * 50e6
    links.dead.clear()
    links.run(40.0)
    assert links.share("direct:eth1", 34.0, 40.0) == pytest.approx(0.5, rel=0.1)


def test_a_link_that_flaps_costs_the_other_nothing() -> None:
    links = Links(_=50e6, eth1=50e6)
    links.load(16000)
    for second in range(1, 40):
        links.run(float(second))
        if links.dead:
            links.dead.clear()
        else:
            links.dead.add("direct:eth1")
    steady = sum(1 for _, name in links.landed if name == "direct") * CHUNK
    assert steady >= 0.97 * links.now * 50e6


def test_an_estimate_is_of_what_a_link_just_did() -> None:
    estimate = RateEstimate()
    now = 0.0
    for rate in (50e6, 12.5e6):
        estimate.begin(now)
        end_s = now + 1.0
        while now < end_s:
            now += CHUNK / rate
            estimate.landed(CHUNK, now)
        assert estimate.bytes_per_s(now) == pytest.approx(rate, rel=0.1)
