"""The replay of traces through eviction policies, and its bound."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from dualpath.bench.eviction.chains import Chains, chains_of, in_order
from dualpath.bench.eviction.command import EvictionBench
from dualpath.bench.eviction.optimum import Optimum, next_uses
from dualpath.bench.eviction.prefix_cache import PrefixCache, TierKind
from dualpath.bench.eviction.replay import OPTIMUM, EvictionConfig, replay
from dualpath.bench.eviction.synthetic import synthetic_requests
from dualpath.bench.progress import Progress
from dualpath.bench.testbed.trace_formats import TraceRequest
from dualpath.cli.main import main
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.eviction_choice import POLICIES, new_policy
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given, settings
from hypothesis import strategies as st


def request(*blocks: int, scope: str = "", start_s: float = 0.0) -> TraceRequest:
    return TraceRequest(scope, scope, start_s, 64, blocks, 64 * len(blocks) + 7, 1)


def chains(*requests: TraceRequest) -> Chains:
    found = list(chains_of(requests))[-1]
    assert isinstance(found, Chains)
    return found


def random_requests(chance: random.Random, count: int) -> list[TraceRequest]:
    """Short chains over a small tree, so that they share prefixes."""
    return [
        request(*(chance.randint(1, 2) for _ in range(chance.randint(1, 4)))) for _ in range(count)
    ]


def hits(cache: PrefixCache | Optimum, found: Chains) -> int:
    return sum(cache.request(number, path) for number, path in enumerate(found.paths))


def test_a_block_is_named_by_all_that_precede_it() -> None:
    found = chains(request(1, 2, 3), request(1, 2, 4), request(2, 3), request(1, 2, 3, 5))
    assert [path.tolist() for path in found.paths] == [[0, 1, 2], [0, 1, 3], [4, 5], [0, 1, 2, 6]]
    assert found.parent.tolist() == [-1, 0, 1, 1, -1, 4, 2]
    assert found.depth.tolist() == [0, 1, 2, 2, 0, 1, 3]
    assert (found.nodes, found.blocks) == (7, 12)


def test_scopes_do_not_share_blocks() -> None:
    found = chains(request(1, 2, scope="a"), request(1, 2, scope="b"))
    assert [path.tolist() for path in found.paths] == [[0, 1], [2, 3]]


def test_sessions_with_clocks_of_their_own_run_so_many_at_a_time() -> None:
    requests = [
        request(1, scope=name, start_s=start) for name in "abcdef" for start in (5.0, 15.0, 25.0)
    ]
    order = in_order(requests, concurrency=2, sessions=0, seed=1)
    assert sorted(map(id, order)) == sorted(map(id, requests))
    names = [each.scope for each in order]
    for number in range(0, len(names), 6):
        assert len(set(names[number : number + 6])) == 2
    again = in_order(requests, concurrency=2, sessions=0, seed=1)
    assert [each.scope for each in again] == names
    assert len({each.scope for each in in_order(requests, concurrency=2, sessions=3, seed=1)}) == 3


def test_a_trace_with_one_scope_keeps_its_times() -> None:
    late, early = request(1, start_s=9.0), request(2, start_s=1.0)
    assert in_order([late, early], concurrency=1, sessions=0, seed=0) == [early, late]


def best_possible(found: Chains, blocks: int) -> int:
    """All prefix-closed contents after each request, exhaustively."""
    states = {frozenset[int](): 0}
    for path in found.paths:
        following: dict[frozenset[int], int] = {}
        for state, so_far in states.items():
            score = so_far + sum(node in state for node in path.tolist())
            pool = sorted(state | set(path.tolist()))
            for size in range(min(blocks, len(pool)) + 1):
                for chosen in itertools.combinations(pool, size):
                    kept = frozenset(chosen)
                    if all(found.parent[node] in (-1, *kept) for node in kept):
                        following[kept] = max(following.get(kept, 0), score)
        states = following
    return max(states.values())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_the_optimum_is_what_an_exhaustive_search_finds(seed: int, blocks: int) -> None:
    found = chains(*random_requests(random.Random(seed), 7))
    optimum = Optimum(found, next_uses(found), blocks)
    assert hits(optimum, found) == best_possible(found, blocks)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from(list(POLICIES)))
def test_no_policy_beats_the_optimum_or_breaks_a_chain(seed: int, blocks: int, name: str) -> None:
    found = chains(*random_requests(random.Random(seed), 60))
    bound = hits(Optimum(found, next_uses(found), blocks), found)
    for kind in TierKind:
        cache = PrefixCache(new_policy(name), blocks, found.parent, kind)
        assert hits(cache, found) <= bound
        here = np.flatnonzero(cache._here)
        assert len(here) <= blocks
        if kind is TierKind.SSD:
            assert all(found.parent[node] in (-1, *here) for node in here)


def test_with_room_for_all_only_first_uses_miss() -> None:
    found = chains(*random_requests(random.Random(1), 60))
    for name in POLICIES:
        cache = PrefixCache(new_policy(name), found.nodes, found.parent, TierKind.SSD)
        assert hits(cache, found) == found.blocks - found.nodes
        assert cache.evicted == 0


@pytest.mark.parametrize("name", list(POLICIES))
def test_the_replay_hits_what_the_store_itself_hits(name: str, tmp_path: Path) -> None:
    found = chains(*random_requests(random.Random(5), 250))
    config = StoreConfig(
        disk_bytes=(5 << 12) + (12 << 12),  # superblock, headers of 12 slots and the slots
        segment_bytes=1 << 20,
        dram_bytes=1 << 20,
        eviction=name,
    )
    layout = KVLayout(layers=1, block_tokens=1, layer_bytes=4096, dtype="u8")
    model = 0
    with BlockStore.open(tmp_path, config) as store:
        space = store.open_namespace(Namespace(model="m", layout=layout))
        for path in found.paths:
            names = [b"%032d" % node for node in path.tolist()]
            hit = store.lookup(space, names, owner="t", lease_s=0)
            model += hit.blocks
            rest = names[hit.blocks :]
            parents = [b"", *names][hit.blocks : len(names)]
            store.put(space, rest, parents, [bytes(4096)] * len(rest))
        stats = store.stats()
    assert any(stats.evicted_blocks.values())
    cache = PrefixCache(new_policy(name), stats.blocks, found.parent, TierKind.SSD)
    assert hits(cache, found) == model


def test_generated_sessions_are_the_same_for_a_seed() -> None:
    one, same, other = (list(synthetic_requests(seed)) for seed in (0, 0, 1))
    assert one == same
    assert one != other
    assert len(one) > 1000


@pytest.mark.slow
def test_the_report_has_each_policy_beside_the_bound() -> None:
    config = EvictionConfig(capacities=(0.01, 1500), seed=3)
    report = replay(config, Progress())
    assert len(report.rates) == 2
    for rates in report.rates.values():
        assert list(rates) == [*POLICIES, OPTIMUM]
        assert all(0 < rate.blocks <= rates[OPTIMUM].blocks for rate in rates.values())
    low, high = report.rates.values()
    assert all(low[name].blocks <= high[name].blocks + 0.01 for name in low)
    rates = next(iter(report.rates.values()))
    assert rates["s3-fifo"].blocks > rates["lru"].blocks


def test_the_command_writes_json_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {
            "timestamp": 1000 * at,
            "input_length": 512 * len(ids),
            "output_length": 1,
            "hash_ids": ids,
        }
        for at, ids in enumerate([[1, 2, 3], [4], [1, 2, 5], [4], [1, 2, 3]])
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--trace", str(trace), "--capacities", "3,0.9", "--json", str(out)]
    assert main(["bench", "eviction", *arguments, "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "trace.jsonl: 5 requests ask for 11 blocks of 512 tokens, 5 of them distinct" in printed
    figures = json.loads(out.read_text())
    assert [each["blocks"] for each in figures["capacities"]] == [3, 4]
    assert set(figures["capacities"][0]["block_hit_rate"]) == {*POLICIES, OPTIMUM}
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "/nonexistent"], "cannot be opened"),
        (["--policies", "arc"], "'arc' is not a policy"),
        (["--capacities", "x"], "--capacities 'x'"),
        (["--capacities", "-1"], "must be positive"),
        (["--concurrency", "0"], "concurrency must lie in"),
        (["--sessions", "-1"], "sessions must not be negative"),
    ],
)
def test_wrong_usage_is_told_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "eviction", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "empty.jsonl"
    trace.write_text("")
    with pytest.raises(InvalidRequest, match="no requests"):
        replay(EvictionConfig(trace=str(trace)), Progress())
    assert EvictionBench.name == "eviction"


TRACES = Path(__file__).parents[3] / "shared" / "traces"


@pytest.mark.slow
@pytest.mark.parametrize("tier", list(TierKind))
def test_s3_fifo_holds_its_own_on_a_real_trace(tier: TierKind) -> None:
    trace = TRACES / "mooncake_synthetic.jsonl.gz"
    if not trace.exists():
        pytest.skip(f"{trace} is not here")
    report = replay(EvictionConfig(trace=str(trace), tier=tier), Progress())
    rates = list(report.rates.values())
    # At the smallest capacity a request is an eighth of the cache: there they are even.
    assert all(each["s3-fifo"].blocks >= each["lru"].blocks - 0.005 for each in rates)
    assert sum(each["s3-fifo"].blocks - each["lru"].blocks for each in rates) > 0
