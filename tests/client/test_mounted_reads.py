"""An agent that sees a daemon's segment files reads them itself, and is as safe as before."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from dualpath.agent.config import AgentConfig
from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.outcome import LoadResult, MissReason
from dualpath.agent.places import Places
from dualpath.agent.segment_files import SegmentFiles
from dualpath.agent.segment_mount import ChunkPlace, SegmentMount
from dualpath.client.kv_client import KVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    embedded_agent,
    stored,
    wrong_blocks,
)
from dualpath.kvstore.fault_device import FaultDevice, FaultPlan
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.ssd_tier import segment_number
from dualpath.transfer.errors import Corrupt, InvalidRequest

Run: TypeAlias = Callable[..., None]

BLOCKS = 24
BYTES = BLOCKS * LAYOUT.block_bytes
PLACES = Places.contiguous(LAYOUT, BLOCKS)
LAYERS_APART = Places(
    layer_stride_bytes=BLOCKS * LAYOUT.layer_bytes,
    base_bytes=tuple(block * LAYOUT.layer_bytes for block in range(BLOCKS)),
)


def mounted(cluster: LoopbackCluster, path: Path | None = None) -> dict[str, Any]:
    """Settings of an agent that sees the daemon's data directory, or another one."""
    return {"mounts": (f"{cluster.address}={path or cluster.daemon_config.data}",)}


def link(client: KVClient) -> DaemonLink:
    (daemon,) = embedded_agent(client).daemons.values()
    return daemon


async def load(client: KVClient, namespace: bytes, hashes: list[bytes], **how: Any) -> LoadResult:
    """Load all blocks; check that every byte which counts is right."""
    memory = await client.allocate(BYTES, behind_compute_link=how.pop("behind", False))
    places = how.pop("places", PLACES)
    running = await client.load(namespace, hashes, memory, places, deadline_s=WAIT_S, **how)
    result = await running.result()
    wrong = [b for b in wrong_blocks(memory, places, hashes) if b < result.blocks]
    assert not wrong, f"blocks {wrong} were given out with wrong bytes"
    await memory.aclose()
    return result


@pytest.mark.parametrize("behind", [False, True], ids=["host", "behind-compute-link"])
@pytest.mark.parametrize("places", [PLACES, LAYERS_APART], ids=["packed", "layers-apart"])
def test_blocks_on_a_mount_are_read_there_and_nothing_crosses_the_storage_link(
    run_cluster: Run, places: Places, behind: bool
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded(**mounted(cluster))
        namespace_id, hashes = await stored(client, BLOCKS)
        result = await load(client, namespace_id, hashes, places=places, behind=behind)
        assert (result.blocks, result.miss) == (BLOCKS, MissReason.NONE)
        daemon = link(client)
        assert daemon.mounted is not None
        assert daemon.mounted.read_bytes == BYTES
        assert embedded_agent(client).storage["tcp"].received_bytes == 0

    run_cluster(body)


def test_a_relay_reads_by_its_own_mount(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        relay = await cluster.relay("decode-1", **mounted(cluster))
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, BLOCKS)
        result = await load(client, namespace_id, hashes, paths=("relay:decode-1",))
        assert result.blocks == BLOCKS
        assert dict(result.shares) == {"relay:decode-1": BYTES}
        (daemon,) = relay.agent.daemons.values()
        assert daemon.mounted is not None
        assert daemon.mounted.read_bytes == BYTES

    run_cluster(body)


def test_both_paths_read_by_mounts_of_their_own(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1", **mounted(cluster))
        client = await cluster.remote(**mounted(cluster))
        namespace_id, hashes = await stored(client, BLOCKS)
        for policy in ("split", "round-robin", "shorter-queue", "direct"):
            result = await load(client, namespace_id, hashes, policy=policy)
            assert (result.blocks, result.miss) == (BLOCKS, MissReason.NONE), policy

    run_cluster(body)


def test_blocks_that_are_not_on_disk_yet_come_from_the_daemon(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        assert cluster.daemon is not None
        client = await cluster.embedded(**mounted(cluster))
        namespace_id, hashes = await stored(client, BLOCKS)
        daemon = link(client)
        assert daemon.mounted is not None
        answered = daemon._locate

        async def half(*args: Any) -> Any:
            answer = await answered(*args)
            for index in range(0, len(answer.segment), 2):
                answer.segment[index] = -1
            return answer

        monkeypatch.setattr(daemon, "_locate", half)
        result = await load(client, namespace_id, hashes)
        assert result.blocks == BLOCKS
        assert 0 < daemon.mounted.read_bytes < BYTES
        assert daemon.mounted.events["not_on_disk"] > 0

    run_cluster(body)


def test_a_failing_medium_costs_nothing_but_the_way(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded(**mounted(cluster))
        namespace_id, hashes = await stored(client, BLOCKS)
        daemon = link(client)
        assert daemon.mounted is not None
        mount = daemon.mounted.mount
        plan = FaultPlan(seed=7, read_error=0.3)
        mount._device = FaultDevice(mount._device, plan)
        mount._files = SegmentFiles(mount._device)
        result = await load(client, namespace_id, hashes)
        assert result.blocks == BLOCKS
        assert daemon.mounted.events["failed"] > 0
        assert 0 < daemon.mounted.read_bytes < BYTES
        plan.read_error, plan.rot = 0.0, 0.1
        for _ in range(3):
            assert (await load(client, namespace_id, hashes)).blocks == BLOCKS
        assert daemon.mounted.events["corrupt"] > 0

    run_cluster(body)


def test_a_chunk_that_did_not_verify_is_not_read_from_the_mount_again(run_cluster: Run) -> None:
    """Whoever waits for the chunk asks again at once, while the rest is still being read: a
    second wrong read of it would end the load."""

    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded(**mounted(cluster))
        namespace_id, hashes = await stored(client, BLOCKS)
        daemon = link(client)
        assert daemon.mounted is not None
        mount = daemon.mounted.mount
        mount._device = FaultDevice(mount._device, FaultPlan(seed=7, rot=1.0))
        mount._files = SegmentFiles(mount._device)
        for _ in range(4):
            result = await load(client, namespace_id, hashes)
            assert (result.blocks, result.miss) == (BLOCKS, MissReason.NONE), result
        assert daemon.mounted.off

    run_cluster(body)


def test_a_segment_that_was_short_or_replaced_is_read_anew(
    run_cluster: Run, tmp_path: Path
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await stored(await cluster.embedded("writer"), BLOCKS)
        seen = tmp_path / "seen"
        shutil.copytree(cluster.daemon_config.data, seen, ignore=shutil.ignore_patterns("index"))
        segment = min((seen / "segments").iterdir())
        whole = segment.read_bytes()
        offset = len(whole) // 4096 // 2 * 4096
        place = ChunkPlace(segment_number(segment.name) or 0, offset, 4096)
        mount = SegmentMount(seen)

        def read() -> bytes | None:
            found: list[bytes | None] = []

            def on_read(_: int, data: memoryview | None, __: str) -> None:
                found.append(None if data is None else bytes(data))

            mount.read([place], WAIT_S, on_read)
            return found[0]

        try:
            segment.write_bytes(whole[:4096])
            assert read() is None
            segment.write_bytes(whole)
            assert read() == whole[offset : offset + 4096], "it was opened while it was short"
            other = tmp_path / "other"
            other.write_bytes(b"\x5a" * len(whole))
            other.replace(segment)
            mount.doubt(place)
            assert read() == b"\x5a" * 4096, "another file has its name"
            assert len(mount._files) == 1
        finally:
            mount.close()

    run_cluster(body)


def test_a_mount_with_stale_bytes_never_reaches_an_engine_and_is_given_up(
    run_cluster: Run, tmp_path: Path
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        writer = await cluster.embedded("writer")
        namespace_id, hashes = await stored(writer, BLOCKS)
        stale = tmp_path / "stale"
        shutil.copytree(cluster.daemon_config.data, stale, ignore=shutil.ignore_patterns("index"))
        for segment in (stale / "segments").iterdir():
            with segment.open("r+b") as file:
                size = file.seek(0, 2)
                file.seek(size // 8)
                file.write(b"\x5a" * (size - size // 8))
        client = await cluster.embedded(**mounted(cluster, stale))
        daemon = link(client)
        await client.open_namespace(Namespace("model", LAYOUT))
        for _ in range(20):
            result = await load(client, namespace_id, hashes)
            assert daemon.mounted is not None
            if daemon.mounted.off:
                break
        assert daemon.mounted is not None
        assert "did not verify" in daemon.mounted.off
        result = await load(client, namespace_id, hashes)
        assert (result.blocks, result.miss) == (BLOCKS, MissReason.NONE)

    run_cluster(body)


def test_the_mount_of_another_store_is_not_used(run_cluster: Run, tmp_path: Path) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        other = tmp_path / "other"
        (other / "segments").mkdir(parents=True)
        (other / "META").write_text('{"product": "dualpath-store", "format": 1, "id": "b0b"}')
        client = await cluster.embedded(**mounted(cluster, other))
        namespace_id, hashes = await stored(client, BLOCKS)
        result = await load(client, namespace_id, hashes)
        assert result.blocks == BLOCKS
        daemon = link(client)
        assert daemon.mounted is not None
        assert "holds store b0b" in daemon.mounted.off
        assert daemon.mounted.read_bytes == 0

    run_cluster(body)


def test_without_the_directory_the_daemon_delivers(run_cluster: Run, tmp_path: Path) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded(**mounted(cluster, tmp_path / "nothing"))
        namespace_id, hashes = await stored(client, BLOCKS)
        assert (await load(client, namespace_id, hashes)).blocks == BLOCKS
        assert link(client).mounted is None

    run_cluster(body)


def test_aborted_loads_leave_nothing_behind_and_write_no_more(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded(**mounted(cluster))
        namespace_id, hashes = await stored(client, BLOCKS)
        for _ in range(5):
            memory = await client.allocate(BYTES)
            running = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
            await running.started()
            await running.abort()
            after = bytes(memory.view)
            await asyncio.sleep(0)
            assert (await load(client, namespace_id, hashes)).blocks == BLOCKS
            assert bytes(memory.view) == after, "bytes landed after the abort"
            await memory.aclose()
        daemon = link(client)
        assert daemon.mounted is not None
        assert not daemon.mounted._jobs
        mount = daemon.mounted.mount
        assert mount._space.used_bytes == 0

    run_cluster(body)


def test_a_restarted_daemon_is_read_by_its_mount_again(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded(**mounted(cluster))
        namespace_id, hashes = await stored(client, BLOCKS)
        assert (await load(client, namespace_id, hashes)).blocks == BLOCKS
        await cluster.stop_daemon()
        await cluster.start_daemon()
        await embedded_agent(client).settled(WAIT_S)
        daemon = link(client)
        loop = asyncio.get_running_loop()
        end = loop.time() + WAIT_S
        while not daemon.up:
            assert loop.time() < end
            await asyncio.sleep(0.01)
        assert daemon.mounted is not None
        before = daemon.mounted.read_bytes
        assert (await load(client, namespace_id, hashes)).blocks == BLOCKS
        assert daemon.mounted.read_bytes == before + BYTES

    run_cluster(body)


@pytest.mark.parametrize(
    ("mounts", "message"),
    [
        (("127.0.0.1:1",), "daemon=/absolute/path"),
        (("127.0.0.1:1=data",), "daemon=/absolute/path"),
        (("127.0.0.1:2=/data",), "none of the agent's daemons"),
        (("127.0.0.1:1=/a", "127.0.0.1:1=/b"), "one mount at most"),
    ],
)
def test_mounts_are_checked_when_the_agent_is_configured(
    mounts: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        AgentConfig(name="a", daemons=("127.0.0.1:1",), mounts=mounts)


def test_a_directory_that_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="META cannot be read"):
        SegmentMount(tmp_path)


def test_reads_beyond_the_files_fail_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "META").write_text('{"product": "dualpath-store", "format": 1, "id": "b0b"}')
    segments = tmp_path / "segments"
    segments.mkdir()
    (segments / "segment-00000003").write_bytes(bytes(range(256)) * 64)
    mount = SegmentMount(tmp_path, buffers_bytes=1 << 20)
    told: dict[int, tuple[bytes, str]] = {}

    def on_read(index: int, data: memoryview | None, reason: str) -> None:
        told[index] = (b"" if data is None else bytes(data), reason)

    places = [ChunkPlace(3, 4096, 100), ChunkPlace(3, 0, 8192), ChunkPlace(3, 4096, 8192)]
    mount.read(places, WAIT_S, on_read)
    assert told[0] == ((bytes(range(256)) * 64)[4096:4196], "")
    assert len(told[1][0]) == 8192
    mount.read([ChunkPlace(9, 0, 4096), ChunkPlace(3, 0, 4096)], WAIT_S, on_read)
    assert "No such file" in told[0][1]
    mount.read([ChunkPlace(3, 1 << 20, 4096)], WAIT_S, on_read)
    assert told[0][1]
    mount.read([ChunkPlace(3, 0, 2 << 20)], 0.01, on_read)
    assert told[0][1] == "no read buffer by the deadline"
    assert mount._space.used_bytes == 0
    mount.close()
    mount.read([ChunkPlace(3, 0, 4096)], WAIT_S, on_read)
    assert "closed" in told[0][1]


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (os.mkfifo, "Errno"),
        (Path.mkdir, "Errno"),
        (lambda path: path.symlink_to("/dev/zero"), "Errno"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (Path.touch, "Errno"),
    ],
    ids=["pipe", "directory", "device", "loop", "empty"],
)
def test_what_is_no_segment_in_its_place_fails_at_once_and_the_mount_closes(
    tmp_path: Path, put: Callable[[Path], None], said: str
) -> None:
    (tmp_path / "META").write_text('{"product": "dualpath-store", "format": 1, "id": "b0b"}')
    (tmp_path / "segments").mkdir()
    put(tmp_path / "segments" / "segment-00000003")
    mount = SegmentMount(tmp_path, buffers_bytes=1 << 20)
    told: list[tuple[int, bool, str]] = []

    def read_and_close() -> None:
        place = ChunkPlace(3, 0, 4096)
        mount.read([place], WAIT_S, lambda at, data, why: told.append((at, data is None, why)))
        mount.close()

    reading = threading.Thread(target=read_and_close, daemon=True)
    reading.start()
    reading.join(WAIT_S)
    assert not reading.is_alive()
    assert [(at, failed) for at, failed, _ in told] == [(0, True)]
    assert said in told[0][2]


@pytest.mark.parametrize("offset", [1 << 62, 1 << 63, (1 << 64) - 4096])
def test_places_that_no_file_has_cost_no_buffers(tmp_path: Path, offset: int) -> None:
    (tmp_path / "META").write_text('{"product": "dualpath-store", "format": 1, "id": "b0b"}')
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments" / "segment-00000003").write_bytes(bytes(8192))
    mount = SegmentMount(tmp_path, buffers_bytes=1 << 20)
    told: list[bool] = []
    places = [ChunkPlace(3, 0, 4096), ChunkPlace(3, offset, 4096)]
    mount.read(places, WAIT_S, lambda at, data, why: told.append(bool(why)))
    assert told == [True, True]
    assert mount._space.used_bytes == 0
    mount.close()
