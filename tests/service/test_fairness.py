"""Fairness: whoever floods, holds on or dies harms himself and nobody else."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import grpc.aio
import pytest
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.service.access_rules import Limits
from dualpath.kvstore.service.delivery_queue import (
    DeliveryQueue,
    Grant,
    GrantedChunks,
)
from dualpath.kvstore.service.fair_executor import FairExecutor
from dualpath.kvstore.service.fair_turns import FairTurns
from dualpath.kvstore.service.quotas import Quotas, Usage
from dualpath.proto.status import error_of
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import Overloaded
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.slice_table import SliceTable

WAIT_S = 20.0
GOOD, BAD = "good-token-0123456789", "bad-token-0123456789"
ACCESS = f"""
[[token]]
name = "good"
token = "{GOOD}"
[[token]]
name = "bad"
token = "{BAD}"
"""
SMALL = KVLayout(layers=1, block_tokens=4, layer_bytes=65_536, dtype="u8")

# Keeps 300 look-ups outstanding until it is killed.
FLOOD = """
import asyncio, hashlib, sys
from dualpath.proto.dial import open_channel
from dualpath.proto.v1 import store_pb2, store_pb2_grpc

async def main(target, token, namespace_id):
    channel = open_channel(target)
    stub = store_pb2_grpc.StoreStub(channel)
    hashes = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(500))
    request = store_pb2.LookupRequest(
        namespace_id=bytes.fromhex(namespace_id), hashes=hashes, hash_bytes=32
    )
    answers = 0

    async def one():
        nonlocal answers
        while True:
            await stub.Lookup(request, metadata=(("authorization", "Bearer " + token),))
            answers += 1
            if answers == 1000:
                print("flooding", flush=True)

    await asyncio.gather(*[one() for _ in range(300)])

asyncio.run(main(*sys.argv[1:]))
"""


def _limits(limits: Limits) -> Quotas:
    return Quotas(lambda _: limits, time.monotonic)


def test_a_call_over_the_limit_is_refused_with_reason_quota_and_a_time_to_retry() -> None:
    quotas = _limits(Limits(calls=2))
    with quotas.call("p"), quotas.call("p"), quotas.call("other"):
        with (
            pytest.raises(Overloaded, match="p has 2 outstanding calls") as caught,
            quotas.call("p"),
        ):
            pass
        assert caught.value.reason == "quota"
        assert caught.value.retry_after_s > 0
    with quotas.call("p"):
        assert quotas.usage("p").calls_active == 1
    assert (quotas.usage("p").calls, quotas.usage("p").refusals, quotas.refusals) == (3, 1, 1)


def test_look_ups_a_second_are_counted_by_a_bucket_that_tells_when_it_is_full_again() -> None:
    now = [100.0]
    quotas = Quotas(lambda _: Limits(lookups_per_s=10), lambda: now[0])
    for _ in range(10):
        quotas.lookup("p")
    with pytest.raises(Overloaded) as caught:
        quotas.lookup("p")
    assert caught.value.retry_after_s == pytest.approx(0.1)
    quotas.lookup("other")
    now[0] += caught.value.retry_after_s + 1e-9
    quotas.lookup("p")


def test_principals_that_come_and_go_are_remembered_within_bounds() -> None:
    quotas = _limits(Limits())
    with quotas.call("stays"):
        for number in range(5000):
            quotas.usage(f"cert:{number}")
        assert quotas.usage("stays").calls_active == 1
    principals, _ = quotas.snapshot()
    assert len(principals) <= 256
    assert Usage().idle


def test_one_principal_cannot_have_all_threads_nor_go_before_others() -> None:
    whose = threading.local()
    executor = FairExecutor(4, 3, lambda: str(whose.name), "test")
    hold = threading.Event()
    order: list[str] = []
    lock = threading.Lock()

    def work(name: str, wait: bool) -> None:
        if wait:
            assert hold.wait(WAIT_S)
        with lock:
            order.append(name)

    def submit(name: str, wait: bool = False) -> Future[None]:
        whose.name = name
        return executor.submit(work, name, wait)

    flood = [submit("flood", wait=True) for _ in range(20)]
    submit("good").result(WAIT_S)  # a thread is left for it
    assert order == ["good"]
    hold.set()
    later = [submit(name) for name in ("good", "other") for _ in range(3)]
    for future in flood + later:
        future.result(WAIT_S)
    counts = Counter(order)
    assert counts == {"flood": 20, "good": 4, "other": 3}
    executor.shutdown()
    with pytest.raises(RuntimeError):
        submit("late")


def test_an_executor_that_shuts_down_finishes_what_is_queued_or_cancels_it() -> None:
    for cancel in (False, True):
        executor = FairExecutor(1, 1, lambda: "p", "test")
        hold = threading.Event()
        first = executor.submit(hold.wait, WAIT_S)
        rest = [executor.submit(int, "7") for _ in range(5)]
        threading.Timer(0.05, hold.set).start()
        executor.shutdown(cancel_futures=cancel)
        assert first.result(0)
        if cancel:
            assert all(future.cancelled() for future in rest)
        else:
            assert [future.result(0) for future in rest] == [7] * 5


def test_a_job_that_fails_or_is_cancelled_frees_its_thread() -> None:
    executor = FairExecutor(1, 1, lambda: "p", "test")
    hold = threading.Event()
    executor.submit(hold.wait, WAIT_S)
    wrong = executor.submit(int, "no number")
    dropped = executor.submit(int, "1")
    assert dropped.cancel()
    last = executor.submit(int, "2")
    hold.set()
    assert last.result(WAIT_S) == 2
    assert isinstance(wrong.exception(WAIT_S), ValueError)
    executor.shutdown()


def test_alone_nobody_waits_for_a_turn() -> None:
    async def body() -> None:
        turns = FairTurns()
        passed = [asyncio.ensure_future(turns.turn("p")) for _ in range(1000)]
        await asyncio.sleep(0)
        assert all(turn.done() for turn in passed)

    asyncio.run(body())


def test_of_several_the_flood_waits_and_who_calls_little_does_not() -> None:
    async def body() -> None:
        turns = FairTurns()
        turns._rate = 1000.0  # as if the loop had had too much to do
        await turns.turn("good")
        flood = [asyncio.ensure_future(turns.turn("flood")) for _ in range(300)]
        await asyncio.sleep(0)
        waiting = sum(not turn.done() for turn in flood)
        assert waiting > 200
        good = asyncio.ensure_future(turns.turn("good"))
        await asyncio.sleep(0)
        assert good.done()
        flood[-1].cancel()
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*flood, return_exceptions=True)

    asyncio.run(body())


def test_deliveries_go_round_between_principals_however_many_attachments_one_has() -> None:
    chunk = 1 << 20
    queue = DeliveryQueue(peer_inflight_bytes=64 * chunk, inflight_bytes=1024 * chunk)
    window = RegionDescriptor(1, 1, 0, 1 << 30)

    def grant(peer: str, principal: str) -> None:
        queue.open(peer, principal)
        tags = list(range(64))
        granted = GrantedChunks([0] * 64, tags, tags, SliceTable.contiguous([0] * 64, [chunk] * 64))
        queue.add(peer, Grant(1, 1, window, Lane.LOAD_PREFILL, 1e9, granted))

    for index in range(16):
        grant(f"bad-{index}", "bad")
    grant("good-0", "good")
    assert queue.principal_bytes("bad") == 16 * 64 * chunk
    served: Counter[str] = Counter()
    while served["good"] < 64:
        job = queue.next(0.0)
        assert job is not None
        served[job.peer.split("-")[0]] += len(job.granted)
        queue.finished(job, range(len(job.granted)), {})
    assert served["bad"] <= 64 + 16
    assert queue.principal_bytes("good") == 0


async def _quota(call: Any) -> Overloaded:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    error = error_of(caught.value)
    assert isinstance(error, Overloaded), error
    assert error.reason == "quota"
    return error


def test_what_one_principal_holds_leaves_room_for_the_others(in_lab: Any, tmp_path: Path) -> None:
    file = tmp_path / "access.toml"
    file.write_text(ACCESS)

    async def body(lab: Any) -> None:
        running = await lab.daemon(
            access_file=str(file),
            dram_bytes=4 << 20,
            principal_leases_max=5,
            principal_reserved_bytes=3 << 20,
            principal_attachments_max=2,
        )
        bad = await lab.client(running, BAD).attach()
        await lab.client(running, BAD).attach()
        await _quota(lab.client(running, BAD).attach())
        space = await bad.namespace(SMALL)
        greedy = await bad.reserve(space, lab.chain(100, "bad"))
        counts = Counter(greedy.status)
        room = (3 << 20) // SMALL.slot_bytes
        assert counts == {
            store_pb2.RESERVE_STATUS_RESERVED: room,
            store_pb2.RESERVE_STATUS_FULL: 100 - room,
        }
        refused = await _quota(bad.reserve(space, lab.chain(1, "more")))
        assert refused.retry_after_s > 0
        good = await lab.client(running, GOOD).attach()
        hashes = lab.chain(3, "good")
        await good.save(space, hashes, layout=SMALL)
        for _ in range(5):
            assert (await bad.lookup(space, hashes)).lease_id
        await _quota(bad.lookup(space, hashes))
        assert (await good.lookup(space, hashes)).lease_id
        usage = {each.name: each for each in (await good.stats()).principal}
        assert usage["token:bad"].reservations == room
        assert usage["token:bad"].leases == 5
        assert usage["token:bad"].refusals == 3
        assert usage["token:good"].refusals == 0
        # It dies: what it held is there for others.
        await bad.close()

        async def free() -> bool:
            stats = await good.stats()
            return bool(stats.reservations == 0 and stats.leases == 1)

        await lab.until(free, "what a dead client held is free")

    in_lab(body)


def test_bytes_to_be_delivered_have_a_limit_of_their_own(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon(principal_queue_bytes=1)
        client = await lab.client(running).attach()
        space = await client.namespace()
        await client.save(space, lab.chain(1))
        hit = await client.lookup(space, lab.chain(1))
        async with client.deliver() as delivery:
            granted = await delivery.grant([(0, 0)], delivery.window(), lease_id=hit.lease_id)
            outcome = await delivery.outcome(granted)
            assert set(outcome.failed.values()) == {3}  # overloaded
            assert "at most for one principal" in outcome.detail

    in_lab(body)


async def _calls(client: Any, principal: str) -> int:
    """How many calls of a principal the daemon has taken."""
    usage = {each.name: each.calls for each in (await client.stats()).principal}
    return int(usage.get(principal, 0))


def test_a_flood_of_look_ups_delays_itself_and_not_its_neighbour(
    in_lab: Any, tmp_path: Path
) -> None:
    file = tmp_path / "access.toml"
    file.write_text(ACCESS)
    flags = ["--data", str(tmp_path / "data"), "--listen", "127.0.0.1:0"]
    flags += ["--dram-bytes", "16MiB", "--disk-bytes", "64MiB", "--access-file", str(file)]
    daemon = subprocess.Popen(
        [sys.executable, "-m", "dualpath.cli.main", "serve", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    async def body(lab: Any) -> None:
        assert daemon.stdout is not None
        line = await asyncio.to_thread(daemon.stdout.readline)
        target = json.loads(line.removeprefix("ready "))["listen"]
        good = lab.client(target, GOOD)
        space = await good.namespace()
        await good.lookup(space, lab.chain(64))  # its channel is there before the flood
        flood = subprocess.Popen(
            [sys.executable, "-c", FLOOD, target, BAD, space.hex()],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert flood.stdout is not None
        try:
            flooding = asyncio.ensure_future(asyncio.to_thread(flood.stdout.readline))
            passed: list[int] = []
            while not flooding.done() or len(passed) < 200:
                before = await _calls(good, "token:bad")
                await good.lookup(space, lab.chain(64), lease_ms=0)  # never refused
                passed.append(await _calls(good, "token:bad") - before)
            assert flood.poll() is None
            assert await flooding == "flooding\n"
        finally:
            flood.kill()
            flood.wait()
        # In one queue, the look-up and the call that counts would each wait for all 300.
        assert median(passed[-100:]) * 5 < 2 * 300, passed[-100:]

    try:
        in_lab(body)
    finally:
        daemon.terminate()
        daemon.wait(WAIT_S)
