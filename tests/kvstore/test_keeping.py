"""How long blocks stay: times to live, retention, quotas; through the store itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.directory_format import RETAINED_NAME
from dualpath.kvstore.housekeeping import Housekeeping
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.retention import PREFIXES_MAX, RETENTION_S_MAX, _End
from dualpath.kvstore.store_api import MissReason, ReserveStatus, SealStatus
from dualpath.kvstore.tenant_limits import TenantLimits
from dualpath.transfer.errors import InvalidRequest, Overloaded

SLOT = 8192
LAYOUT = KVLayout(layers=1, block_tokens=1, layer_bytes=SLOT, dtype="u8")
MIB = 1 << 20


def config(**changes: object) -> StoreConfig:
    values: dict[str, object] = {
        "disk_bytes": 1 * MIB,
        "dram_bytes": 4 * MIB,
        "segment_bytes": 256 << 10,
        "read_buffers_bytes": MIB,
        "reserve_wait_s": 0.1,
        "prefault": False,
        **changes,
    }
    return StoreConfig(**values)  # type: ignore[arg-type]


class Keeper:
    """A store with a clock of its own."""

    def __init__(self, path: Path, settings: StoreConfig) -> None:
        self.path = path
        self.settings = settings
        self.now = 1000.0
        self.open()

    def open(self) -> None:
        self.store = BlockStore.open(self.path, self.settings, clock=lambda: self.now)

    def reopen(self, settings: StoreConfig | None = None) -> None:
        self.store.close()
        self.settings = settings or self.settings
        self.open()

    def space(self, tenant: str = "") -> bytes:
        return self.store.open_namespace(Namespace(model="m", layout=LAYOUT, tenant=tenant))

    def put(self, name: int, blocks: int, tenant: str = "") -> list[bytes]:
        hashes = list(chain_hashes([name * 1000 + at for at in range(blocks)], 1))
        outcomes = self.store.put(
            self.space(tenant), hashes, parents_of(hashes), [bytes(SLOT)] * blocks
        )
        self.outcomes = set(outcomes)
        return hashes

    def has(self, hashes: list[bytes], tenant: str = "") -> int:
        """Without being a use."""
        state = self.store._state
        entry = state.catalog.entry(self.space(tenant))
        with state.lock:
            return sum(state.catalog.row_of(entry, each) >= 0 for each in hashes)

    def look(self, hashes: list[bytes], tenant: str = "") -> tuple[int, MissReason]:
        hit = self.store.lookup(self.space(tenant), hashes, owner="o", lease_s=0)
        return hit.blocks, hit.miss

    def later(self, seconds: float) -> None:
        """Time goes by, and the housekeeping is done."""
        self.now += seconds
        Housekeeping(self.store._state).run()


@pytest.fixture
def keepers(tmp_path: Path) -> Iterator[list[Keeper]]:
    made: list[Keeper] = []
    yield made
    for keeper in made:
        keeper.store.close()


@pytest.fixture
def keep(tmp_path: Path, keepers: list[Keeper]) -> type:
    def make(**changes: object) -> Keeper:
        keepers.append(Keeper(tmp_path / "data", config(**changes)))
        return keepers[-1]

    return make  # type: ignore[return-value]


# Time to live


def test_blocks_that_nobody_uses_leave_after_their_time(keep: type) -> None:
    keeper = keep(ttl_s=100)
    hashes = keeper.put(1, 5)
    keeper.later(99)
    assert keeper.has(hashes) == 5
    keeper.later(2)
    assert keeper.has(hashes) == 0
    assert keeper.look(hashes) == (0, MissReason.EXPIRED)


def test_a_use_begins_the_time_anew_for_the_whole_prefix(keep: type) -> None:
    keeper = keep(ttl_s=100)
    hashes = keeper.put(1, 5)
    keeper.later(60)
    assert keeper.look(hashes[:3])[0] == 3
    keeper.later(60)
    assert keeper.has(hashes) == 3
    assert keeper.look(hashes) == (3, MissReason.EXPIRED)


def test_a_lookup_never_finds_what_has_expired_at_its_end(keep: type) -> None:
    keeper = keep(ttl_s=100)
    hashes = keeper.put(1, 5)
    keeper.now += 101  # nobody has kept house meanwhile
    assert keeper.look(hashes) == (0, MissReason.EXPIRED)


def test_a_block_lives_as_long_as_one_below_it(keep: type) -> None:
    keeper = keep(ttl_s=100)
    hashes = keeper.put(1, 2)
    keeper.later(60)
    keeper.put(1, 3)
    keeper.later(60)
    # The put found two stored and stored one: all three were in use then.
    assert keeper.has(hashes) == 2
    keeper.later(60)
    assert keeper.has(hashes) == 0


def test_a_leased_block_does_not_expire(keep: type) -> None:
    keeper = keep(ttl_s=100)
    hashes = keeper.put(1, 3)
    hit = keeper.store.lookup(keeper.space(), hashes, owner="o", lease_s=500)
    keeper.later(200)
    assert keeper.has(hashes) == 3
    keeper.store.release(hit.lease_id, owner="o")
    keeper.later(50)
    assert keeper.has(hashes) == 3
    keeper.later(100)
    assert keeper.has(hashes) == 0


def test_a_tenant_may_have_a_time_of_its_own(keep: type) -> None:
    keeper = keep(ttl_s=100, tenants=(TenantLimits(tenant="a", ttl_s=10),))
    short, long = keeper.put(1, 2, "a"), keeper.put(2, 2)
    keeper.later(50)
    assert (keeper.has(short, "a"), keeper.has(long)) == (0, 2)


def test_opening_counts_as_a_use(keep: type) -> None:
    keeper = keep(ttl_s=100)
    hashes = keeper.put(1, 3)
    keeper.now += 90
    keeper.reopen()
    keeper.later(90)
    assert keeper.has(hashes) == 3
    keeper.later(20)
    assert keeper.has(hashes) == 0


def test_expired_blocks_do_not_come_back(keep: type) -> None:
    keeper = keep(ttl_s=100)
    hashes = keeper.put(1, 3)
    keeper.later(200)
    keeper.reopen()
    assert keeper.has(hashes) == 0


# Retention


def test_a_retained_prefix_outlives_any_number_of_others(keep: type) -> None:
    keeper = keep()
    hashes = keeper.put(1, 10)
    assert keeper.store.retain(keeper.space(), hashes, retain_s=1000) == 10
    for name in range(2, 60):
        keeper.put(name, 10)
    assert keeper.has(hashes) == 10


def test_without_retention_the_same_prefix_makes_way(keep: type) -> None:
    keeper = keep()
    hashes = keeper.put(1, 10)
    for name in range(2, 60):
        keeper.put(name, 10)
    assert keeper.has(hashes) == 0


def test_a_retention_ends(keep: type) -> None:
    keeper = keep()
    hashes = keeper.put(1, 10)
    keeper.store.retain(keeper.space(), hashes, retain_s=1000)
    for name in range(2, 60):
        keeper.put(name, 10)
    keeper.later(1001)
    for name in range(60, 120):
        keeper.put(name, 10)
    assert keeper.has(hashes) == 0


def test_a_retention_may_be_ended_but_for_what_another_holds(keep: type) -> None:
    keeper = keep()
    hashes = keeper.put(1, 10)
    keeper.store.retain(keeper.space(), hashes, retain_s=1000)
    keeper.store.retain(keeper.space(), hashes[:4], retain_s=1000)
    assert keeper.store.retain(keeper.space(), hashes, retain_s=0) == 0
    for name in range(2, 60):
        keeper.put(name, 10)
    assert keeper.has(hashes) == 4


def test_what_exceeds_the_budget_is_not_retained_and_said_so(keep: type) -> None:
    keeper = keep(retain_bytes=6 * SLOT)
    hashes = keeper.put(1, 10)
    assert keeper.store.retain(keeper.space(), hashes, retain_s=1000) == 6
    other = keeper.put(2, 3)
    assert keeper.store.retain(keeper.space(), other, retain_s=1000) == 0
    # Asking again for what is retained already costs nothing.
    assert keeper.store.retain(keeper.space(), hashes, retain_s=2000) == 6
    keeper.later(2001)
    assert keeper.store.retain(keeper.space(), other, retain_s=1000) == 3


def test_a_tenant_has_his_part_of_the_budget(keep: type) -> None:
    keeper = keep(retain_bytes=40 * SLOT, tenants=(TenantLimits(tenant="a", disk_bytes=MIB // 4),))
    assert keeper.store.retain(keeper.space("a"), keeper.put(1, 20, "a"), retain_s=9) == 10
    assert keeper.store.retain(keeper.space(), keeper.put(2, 40), retain_s=9) == 30


def test_retained_blocks_make_way_when_nothing_else_may(keep: type) -> None:
    keeper = keep(retain_bytes=MIB)
    names = range(1, 13)
    for name in names:
        hashes = keeper.put(name, 10)
        keeper.store.retain(keeper.space(), hashes, retain_s=1000)
    held = keeper.store.stats().blocks
    latest = keeper.put(99, 10)
    assert keeper.outcomes == {SealStatus.SEALED}
    assert keeper.has(latest) == 10
    assert keeper.store.stats().blocks <= held + 10


def test_a_retention_survives_a_restart(keep: type) -> None:
    keeper = keep()
    hashes = keeper.put(1, 10)
    keeper.store.retain(keeper.space(), hashes, retain_s=100_000)
    keeper.later(2)
    keeper.reopen()
    for name in range(2, 60):
        keeper.put(name, 10)
    assert keeper.has(hashes) == 10


def test_a_damaged_list_of_retentions_is_no_obstacle(keep: type) -> None:
    keeper = keep()
    hashes = keeper.put(1, 10)
    keeper.store.retain(keeper.space(), hashes, retain_s=100_000)
    keeper.later(2)
    keeper.store.close()
    path = keeper.path / RETAINED_NAME
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    keeper.open()
    assert keeper.has(hashes) == 10
    assert keeper.store._state.retention.retained_bytes == 0


def test_bad_retentions_are_refused(keep: type) -> None:
    keeper = keep()
    hashes = keeper.put(1, 2)
    for retain_s in (-1.0, RETENTION_S_MAX + 1, float("nan")):
        with pytest.raises(InvalidRequest, match="retain_s must lie in"):
            keeper.store.retain(keeper.space(), hashes, retain_s=retain_s)
    assert keeper.store.retain(keeper.space(), [b"x" * 32], retain_s=5) == 0


def test_the_number_of_retained_prefixes_is_bounded(keep: type) -> None:
    keeper = keep()
    hashes = keeper.put(1, 2)
    state = keeper.store._state
    for at in range(PREFIXES_MAX):
        state.retention._prefixes[b"n", b"%d" % at] = _End(10**9, 1e12)
    with pytest.raises(Overloaded, match="let some go first"):
        keeper.store.retain(keeper.space(), hashes, retain_s=5)
    state.retention._prefixes.clear()


def test_a_wall_clock_that_is_set_back_keeps_no_retention_alive(keep: type) -> None:
    keeper = keep()
    hashes = keeper.put(1, 2)
    retention = keeper.store._state.retention
    retention._wall_clock = lambda: 2e9
    assert keeper.store.retain(keeper.space(), hashes, retain_s=100) == 2
    retention._wall_clock = lambda: 2e9 - 86400
    keeper.later(101)
    with keeper.store._state.lock:
        retention.expire()
    assert not retention._prefixes
    assert retention.retained_bytes == 0


# Quotas


def test_a_tenant_at_its_quota_evicts_its_own_blocks_first(keep: type) -> None:
    keeper = keep(tenants=(TenantLimits(tenant="a", disk_bytes=20 * SLOT),))
    others = keeper.put(1, 20)
    first = keeper.put(2, 15, "a")
    for name in range(3, 9):
        latest = keeper.put(name, 15, "a")
    assert keeper.has(latest, "a") == 15
    assert keeper.has(others) == 20
    assert keeper.look(first, "a") == (0, MissReason.QUOTA)
    used = keeper.store._state.residency.ssd.shares.used_bytes
    assert used[1] <= 20 * SLOT


def test_others_cannot_push_a_tenant_below_its_share(keep: type) -> None:
    keeper = keep(tenants=(TenantLimits(tenant="a", disk_bytes=40 * SLOT),))
    mine = keeper.put(1, 40, "a")
    for name in range(2, 60):
        keeper.put(name, 10)
    assert keeper.has(mine, "a") == 40


def test_a_tenant_whose_blocks_are_all_in_use_is_told_quota(keep: type) -> None:
    keeper = keep(tenants=(TenantLimits(tenant="a", disk_bytes=10 * SLOT),))
    hashes = keeper.put(1, 10, "a")
    hit = keeper.store.lookup(keeper.space("a"), hashes, owner="o", lease_s=60)
    keeper.put(2, 1, "a")
    assert keeper.outcomes == {ReserveStatus.QUOTA}
    keeper.store.release(hit.lease_id, owner="o")
    keeper.put(2, 1, "a")
    assert keeper.outcomes == {SealStatus.SEALED}


def test_a_quota_in_dram_bounds_the_copies_and_nothing_else(keep: type) -> None:
    keeper = keep(tenants=(TenantLimits(tenant="a", dram_bytes=5 * SLOT),))
    hashes = keeper.put(1, 30, "a")
    assert keeper.has(hashes, "a") == 30
    assert keeper.store._state.residency.dram.shares.used_bytes[1] <= 5 * SLOT
    assert len(keeper.store.get(keeper.space("a"), hashes)) == 30
    assert keeper.store._state.residency.dram.shares.used_bytes[1] <= 5 * SLOT


def test_quotas_count_what_was_there_at_opening(keep: type) -> None:
    keeper = keep()
    keeper.put(1, 30, "a")
    keeper.reopen(config(tenants=(TenantLimits(tenant="a", disk_bytes=10 * SLOT),)))
    assert keeper.store._state.residency.ssd.shares.used_bytes[1] == 30 * SLOT
    keeper.put(2, 1, "a")
    assert keeper.store._state.residency.ssd.shares.used_bytes[1] <= 10 * SLOT


def test_bad_quotas_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="has no name"):
        TenantLimits(tenant="")
    with pytest.raises(InvalidRequest, match="disk_bytes of 'a' must not be negative, not -1"):
        TenantLimits(tenant="a", disk_bytes=-1)
    with pytest.raises(InvalidRequest, match="'a' is named 2 times"):
        config(tenants=(TenantLimits(tenant="a"), TenantLimits(tenant="a")))
    with pytest.raises(InvalidRequest, match="retain_bytes must lie in"):
        config(retain_bytes=1 << 40)
    with pytest.raises(InvalidRequest, match="ttl_s must not be negative"):
        config(ttl_s=-1)
    with pytest.raises(InvalidRequest, match="'mru' is not a policy"):
        config(eviction="mru")


# Size classes, admission


def test_a_large_block_finds_room_among_small_ones_without_emptying_the_store(
    keep: type,
) -> None:
    keeper = keep()
    for name in range(1, 20):
        keeper.put(name, 10)
    before = keeper.store.stats().blocks
    layout = KVLayout(layers=1, block_tokens=1, layer_bytes=100_000, dtype="u8")
    space = keeper.store.open_namespace(Namespace(model="large", layout=layout))
    outcome = keeper.store.put(space, [b"L" * 32], [b""], [bytes(100_000)])
    assert outcome == (SealStatus.SEALED,)
    # A segment's blocks, and what hangs below them.
    lost = before - (keeper.store.stats().blocks - 1)
    assert 0 < lost <= before // 2


def test_what_was_stored_once_is_hit_by_the_second_request(keep: type) -> None:
    keeper = keep()
    for name in range(1, 30):
        hashes = keeper.put(name, 10)
        assert keeper.look(hashes) == (10, MissReason.NONE)
