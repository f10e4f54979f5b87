"""Opening a store: everything it consists of, in order, tied together.

Memory and tables first, then what is stored (recovery.py), then the thread that writes. What was
opened before a failure is given back.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass

from dualpath.kvstore.block_events import BlockEvents
from dualpath.kvstore.block_table import BlockTable
from dualpath.kvstore.block_writer import BlockWriter
from dualpath.kvstore.catalog import Catalog
from dualpath.kvstore.committer import Committer
from dualpath.kvstore.data_directory import DataDirectory
from dualpath.kvstore.device import Device
from dualpath.kvstore.device_choice import open_device
from dualpath.kvstore.dram_tier import DramTier
from dualpath.kvstore.durable_index import DurableIndex
from dualpath.kvstore.expiry import Expiry
from dualpath.kvstore.invalidation_cuts import InvalidationCuts
from dualpath.kvstore.layout import ALIGN_BYTES
from dualpath.kvstore.lease_table import LeaseTable
from dualpath.kvstore.mapping_table import MappingTable
from dualpath.kvstore.media_troubles import MediaTroubles
from dualpath.kvstore.recovery import Recovered, Recovery
from dualpath.kvstore.reservation_table import ReservationTable
from dualpath.kvstore.residency import Residency
from dualpath.kvstore.retention import RetentionTable
from dualpath.kvstore.ring_device import RingDevice
from dualpath.kvstore.ssd_tier import SsdTier
from dualpath.kvstore.store_config import StoreConfig
from dualpath.kvstore.store_state import StoreState


@dataclass(frozen=True, slots=True)
class StoreParts:
    """What a store consists of. `own_device` is closed with it."""

    directory: DataDirectory
    index: DurableIndex
    state: StoreState
    writer: BlockWriter
    committer: Committer
    recovered: Recovered
    cuts: InvalidationCuts
    own_device: Device | None


def _device(directory: DataDirectory, config: StoreConfig) -> Device:
    return open_device(
        directory.segments_path,
        io=config.io,
        depth=config.io_depth,
        direct=config.direct,
        raw=config.raw_device,
        owner=directory.store_id,
    )


def open_parts(
    directory: DataDirectory,
    config: StoreConfig,
    device: Device | None,
    clock: Callable[[], float],
) -> StoreParts:
    """`device` replaces that of the configuration. Raises as `BlockStore.open` does."""
    if device is not None:
        return _open_on(device, None, directory, config, clock)
    device = _device(directory, config)
    try:
        return _open_on(device, device, directory, config, clock)
    except BaseException:
        device.close()
        raise


def _open_on(
    device: Device,
    own_device: Device | None,
    directory: DataDirectory,
    config: StoreConfig,
    clock: Callable[[], float],
) -> StoreParts:
    table = BlockTable(rows_max=config.disk_bytes // ALIGN_BYTES)
    catalog = Catalog(table, config.namespaces_max, config.removals_remembered_max)
    ssd = SsdTier(device, config.disk_bytes, config.segment_bytes)
    dram = DramTier.of(config)
    if isinstance(device, RingDevice) and dram.memory.huge_bytes >= dram.region.nbytes:
        # On small pages the kernel would keep a list as long as the arena, a ring.
        device.register(dram.region.view)
    events = BlockEvents(config.events_remembered_max)
    committers: list[Committer] = []

    def on_delete(key: bytes, generation: int, place: tuple[int, int]) -> None:
        # Tied late: the committer needs the writer, which needs the residency.
        committers[0].delete(key, generation, place)

    rows = (table, catalog, dram, ssd)
    residency = Residency(
        *rows, on_delete, events, policy=config.eviction, tenants=config.tenants, clock=clock
    )
    retention = RetentionTable(
        directory.path, table, catalog, residency, config.retained_bytes_limit, config.disk_bytes
    )
    owner_bytes_max, bytes_max = config.mapped_limits
    lock = threading.Lock()
    state = StoreState(
        config=config,
        clock=clock,
        table=table,
        catalog=catalog,
        dram=dram,
        ssd=ssd,
        residency=residency,
        expiry=Expiry(table, catalog, residency, config.ttl_s, config.tenants),
        retention=retention,
        leases=LeaseTable(config.leases_max, first_id=secrets.randbits(48) + 1),
        mappings=MappingTable(dram.guards, owner_bytes_max=owner_bytes_max, bytes_max=bytes_max),
        reservations=ReservationTable(config.reservations_max, first_id=secrets.randbits(48) + 1),
        events=events,
        lock=lock,
        room=threading.Condition(lock),
    )
    recovery = Recovery(directory, device, catalog)
    try:
        recovered = recovery.recover(ssd, residency)
        directory.remove_namespaces(catalog.forget_excess())
        directory.bring_up_to_date()
        retention.load()
    except BaseException:
        recovery.close()
        dram.close()
        raise
    state.generation = recovered.generation
    troubles = MediaTroubles(state, recovered.troubles)
    state.read_failed, state.rotten = troubles.read_failed, troubles.rotten
    writer = BlockWriter(state, troubles)
    committer = Committer(writer, troubles, ssd, recovery.index, directory, state.io, dram.region)
    committers.append(committer)
    writer.attach(committer)
    committer.start()
    return StoreParts(
        directory, recovery.index, state, writer, committer, recovered, recovery.cuts, own_device
    )
