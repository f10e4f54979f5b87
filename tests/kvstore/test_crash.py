"""kill -9 during writes: the index opens, what was acknowledged is there, nothing is torn."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace

LAYOUT = KVLayout(layers=3, block_tokens=4, layer_bytes=100_000, dtype="bf16")
NAMESPACE = Namespace(model="crash", layout=LAYOUT)
CONFIG = StoreConfig(disk_bytes=24 << 20, dram_bytes=6 << 20, segment_bytes=4 << 20)
CHAINS = 40
BLOCKS = 4

_CHILD = """
import itertools, sys
import random, hashlib
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace

path, first, chains, blocks = sys.argv[1], *map(int, sys.argv[2:5])
layout = KVLayout(layers=3, block_tokens=4, layer_bytes=100_000, dtype="bf16")
config = StoreConfig(disk_bytes=24 << 20, dram_bytes=6 << 20, segment_bytes=4 << 20)
store = BlockStore.open(path, config)
space = store.open_namespace(Namespace(model="crash", layout=layout))
print("open", flush=True)
for i in itertools.count(first):
    hashes = chain_hashes(range(1000 * (i % chains), 1000 * (i % chains) + 4 * blocks), 4)
    data = [random.Random(hashlib.sha256(h).digest()).randbytes(layout.block_bytes)
            for h in hashes]
    durable = i % 3 != 0
    statuses = store.put(space, hashes, parents_of(hashes), data, durable=durable)
    ok = all(s.value in ("sealed", "exists") for s in statuses)
    print(f"put {i % chains} {int(durable and ok)}", flush=True)
"""


def chain(index: int) -> list[bytes]:
    return chain_hashes(range(1000 * index, 1000 * index + 4 * BLOCKS), 4)


def content(block_hash: bytes) -> bytes:
    return random.Random(hashlib.sha256(block_hash).digest()).randbytes(LAYOUT.block_bytes)


def run_and_kill(path: Path, dice: random.Random) -> list[int]:
    """Chains whose durable put was acknowledged, in order, before the kill."""
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            _CHILD,
            str(path),
            str(dice.randrange(CHAINS)),
            str(CHAINS),
            str(BLOCKS),
        ],
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        time.sleep(dice.uniform(0.0, 0.6))
        child.send_signal(signal.SIGKILL)
        lines = child.stdout.read().splitlines()
        assert child.wait(30) == -signal.SIGKILL
    acknowledged = []
    for line in lines:
        words = line.split()
        if len(words) == 3 and words[2] == "1":
            acknowledged.append(int(words[1]))
    return acknowledged


def check_after_kill(path: Path, acknowledged: list[int]) -> None:
    with BlockStore.open(path, CONFIG) as store:
        space = store.open_namespace(NAMESPACE)
        lengths = {}
        for index in range(CHAINS):
            blocks = store.get(space, chain(index))
            assert blocks == [content(h) for h in chain(index)[: len(blocks)]]
            lengths[index] = len(blocks)
        # The last few cannot have been evicted since: the disk holds some 18 chains.
        for index in acknowledged[-4:]:
            assert lengths[index] == BLOCKS, f"chain {index} was acknowledged and is lost"
        assert store.stats().corrupt_blocks == 0


def crash_often(path: Path, rounds: int) -> None:
    dice = random.Random(rounds)
    total = 0
    for _ in range(rounds):
        acknowledged = run_and_kill(path, dice)
        total += len(acknowledged)
        check_after_kill(path, acknowledged)
    assert total > 0


def test_three_kills_during_writes_lose_and_tear_nothing(tmp_path: Path) -> None:
    crash_often(tmp_path / "data", 3)


@pytest.mark.slow
def test_twenty_kills_during_writes_lose_and_tear_nothing(tmp_path: Path) -> None:
    crash_often(tmp_path / "data", 20)
