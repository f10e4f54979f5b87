"""fsck finds every flipped byte that means something, changes nothing by itself, and repairs
without destroying what could be right."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest
from dualpath.cli.main import main
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.directory_format import RetainedPrefix, write_retained
from dualpath.kvstore.fsck import Fsck
from dualpath.kvstore.fsck_repair import FsckRepair
from dualpath.kvstore.fsck_report import FsckCode, FsckReport
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.namespace_files import COPIES_NAME
from dualpath.kvstore.record import BlockRecord
from dualpath.kvstore.store_api import MissReason, SealStatus
from dualpath.transfer.errors import InvalidRequest, Unavailable

CONFIG = StoreConfig(disk_bytes=1 << 20, dram_bytes=1 << 20, segment_bytes=128 << 10)
SMALL = Namespace(
    model="fsck", layout=KVLayout(layers=2, block_tokens=4, layer_bytes=3000, dtype="bf16")
)
LARGE = Namespace(
    model="fsck", layout=KVLayout(layers=3, block_tokens=4, layer_bytes=100_000, dtype="fp8")
)
SMALL_HASHES = chain_hashes(range(4 * 9), 4)
LARGE_HASHES = chain_hashes(range(4 * 2), 4)
CHAINS = ((SMALL, SMALL_HASHES), (LARGE, LARGE_HASHES))


def content(block_hash: bytes, nbytes: int) -> bytes:
    return random.Random(block_hash).randbytes(nbytes)


def put(store: BlockStore, namespace: Namespace, hashes: list[bytes]) -> list[object]:
    space = store.open_namespace(namespace)
    data = [content(h, namespace.layout.block_bytes) for h in hashes]
    return list(store.put(space, hashes, parents_of(hashes), data))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two namespaces, a chain each, and a header that an evicted block left behind."""
    path = tmp_path_factory.mktemp("fsck") / "data"
    with BlockStore.open(path, CONFIG) as store:
        for namespace, hashes in CHAINS:
            assert set(put(store, namespace, hashes)) == {SealStatus.SEALED}
        gone = chain_hashes(range(900, 904), 4)
        put(store, SMALL, gone)
        hit = store.lookup(SMALL.id, gone, owner="fsck", lease_s=60)
        state = store._state
        with state.lock:
            row = int(state.leases.find(hit.lease_id, state.clock()).rows[0])
            state.residency.drop(row, MissReason.EVICTED)
        store.release(hit.lease_id, owner="fsck")
    return path


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "data"))


def check(path: Path) -> FsckReport:
    with Fsck(path) as fsck:
        return fsck.check()


def repair(path: Path) -> FsckReport:
    with Fsck(path) as fsck:
        fsck.check()
        return FsckRepair(fsck).run()


def served(path: Path) -> list[int]:
    """Blocks of each chain that a store serves, all right; it takes the rest again."""
    counts = []
    with BlockStore.open(path, CONFIG) as store:
        for namespace, hashes in CHAINS:
            space = store.open_namespace(namespace)
            found = store.get(space, hashes)
            wanted = [content(h, namespace.layout.block_bytes) for h in hashes]
            assert found == wanted[: len(found)]
            counts.append(len(found))
        assert store.stats().corrupt_blocks == 0
        for namespace, hashes in CHAINS:
            put(store, namespace, hashes)
            assert len(store.get(namespace.id, hashes)) == len(hashes)
    return counts


def flip(path: Path, at: int, mask: int = 0x10) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ mask]))


def open_index(path: Path) -> lmdb.Environment:
    return lmdb.open(str(path / "index"), map_size=64 << 20, lock=False)


def find(path: Path, wanted: bytes) -> tuple[Path, int]:
    for file in sorted((path / "segments").iterdir()):
        at = file.read_bytes().find(wanted)
        if at >= 0:
            return file, at
    raise AssertionError("not there")


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def free_ranges(path: Path) -> dict[str, list[range]]:
    """Bytes that mean nothing, by file: data of free slots, and the number of the last process."""
    ranges: dict[str, list[range]] = {"LOCK": [range(1 << 20)]}
    with Fsck(path) as fsck:
        fsck.check()
        records = [BlockRecord.from_bytes(raw) for raw in fsck.state.records.values()]
        for segment in fsck.state.segments.values():
            geometry = segment.geometry
            assert geometry is not None
            taken = {r.slot for r in records if r.segment == segment.number}
            ranges[f"segments/{segment.name}"] = [
                range(geometry.slot_offset(s), geometry.slot_offset(s + 1))
                for s in range(geometry.slots)
                if s not in taken
            ]
    return ranges


def test_a_clean_store_has_no_findings_and_is_not_changed(data: Path) -> None:
    before = files(data)
    report = check(data)
    assert not report.findings
    assert (report.blocks, report.bad_blocks) == (11, 0)
    assert (report.namespaces, report.segments) == (2, len(list((data / "segments").iterdir())))
    assert files(data) == before
    assert repair(data).repairs == []
    assert files(data) == before


def test_a_store_that_was_killed_has_no_problems(tmp_path: Path) -> None:
    with BlockStore.open(tmp_path / "data", CONFIG) as store:
        for namespace, hashes in CHAINS:
            put(store, namespace, hashes)
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
    report = check(tmp_path / "copy")
    assert report.problems == 0
    assert report.counts[FsckCode.NOT_CLEAN] == 1


def flipped_everywhere(data: Path, flips: int, seed: int) -> None:
    """Each flipped byte must be found, alone; nothing wrong may be served with it."""
    dice = random.Random(seed)
    free = free_ranges(data)
    places = [
        (path, at)
        for path in sorted(data.rglob("*"))
        if path.is_file()
        for at in range(path.stat().st_size)
        if not any(at in r for r in free.get(str(path.relative_to(data)), ()))
    ]
    for path, at in dice.sample(places, flips):
        mask = 1 << dice.randrange(8)
        flip(path, at, mask)
        try:
            found = bool(check(data).findings)
        except InvalidRequest as error:
            found = error.reason == "newer_format"
        assert found, f"byte {at} of {path.name} ^ {mask:#x} was not found"
        flip(path, at, mask)
    assert not check(data).findings


def test_every_flipped_byte_that_means_something_is_found(data: Path) -> None:
    flipped_everywhere(data, 60, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_flipped_bytes_are_found(data: Path) -> None:
    flipped_everywhere(data, 1000, seed=2)


def test_bad_data_leaves_with_its_descendants(data: Path) -> None:
    file, at = find(data, content(SMALL_HASHES[6], 6000))
    flip(file, at + 5)
    report = check(data)
    assert report.counts == {FsckCode.DATA_DAMAGED: 1}
    assert report.bad_blocks == 1
    left = repair(data)
    assert left.problems == 0
    assert "1 of" not in left.repairs[0]
    assert (data / "damaged" / "index.1" / "data.mdb").exists()
    assert served(data) == [6, 2]


def test_a_damaged_superblock_is_written_anew_and_costs_nothing(data: Path) -> None:
    for file in sorted((data / "segments").iterdir()):
        flip(file, 14)
    assert check(data).counts[FsckCode.SUPERBLOCK_DAMAGED] > 1
    left = repair(data)
    assert left.problems == 0, left.findings
    assert served(data) == [9, 2]


def test_a_segment_that_was_cut_short_keeps_the_blocks_that_are_left(data: Path) -> None:
    file, at = find(data, content(SMALL_HASHES[4], 6000))
    os.truncate(file, at + 100)
    assert check(data).counts[FsckCode.SEGMENT_SIZE] == 1
    assert repair(data).problems == 0
    assert served(data) == [4, 2]


def test_a_segment_beyond_help_is_put_aside_whole(data: Path) -> None:
    file = max((data / "segments").iterdir())
    noise = random.Random(3).randbytes(file.stat().st_size)
    file.write_bytes(noise)
    assert repair(data).problems == 0
    assert (data / "damaged" / f"{file.name}.1").read_bytes() == noise
    assert sum(served(data)) < 11


def test_damaged_headers_are_written_anew(data: Path) -> None:
    for file in sorted((data / "segments").iterdir()):
        flip(file, 4096 + 30)
    assert check(data).counts[FsckCode.HEADER_DAMAGED] > 1
    assert repair(data).problems == 0
    shutil.rmtree(data / "index")
    assert served(data) == [9, 2]


def test_a_torn_header_of_a_free_slot_is_a_note_and_is_blanked(data: Path) -> None:
    gone = content(chain_hashes(range(900, 904), 4)[0], 6000)
    file, _ = find(data, gone)
    at = file.read_bytes().find(chain_hashes(range(900, 904), 4)[0])
    flip(file, at)
    report = check(data)
    assert (report.problems, report.counts) == (0, {FsckCode.FREE_HEADER_DAMAGED: 1})
    assert not repair(data).has(FsckCode.FREE_HEADER_DAMAGED)
    assert served(data) == [9, 2]


@pytest.mark.parametrize("damage", ["lost", "gone", "noise", "empty", "cut"])
def test_an_index_that_is_gone_comes_back_from_the_headers(data: Path, damage: str) -> None:
    file = data / "index" / "data.mdb"
    raw = file.read_bytes()
    if damage == "lost":
        file.unlink()
    elif damage == "gone":
        shutil.rmtree(file.parent)
    else:
        file.write_bytes({"noise": b"x" * 50_000, "empty": b"", "cut": raw[:8192]}[damage])
    assert check(data).problems
    left = repair(data)
    assert left.problems == 0, left.findings
    assert any("found by their headers" in text for text in left.repairs)
    assert served(data) == [9, 2]


def test_a_record_that_the_index_lost_is_missed_and_comes_back(data: Path) -> None:
    with open_index(data) as env, env.begin(write=True) as txn:
        txn.delete(SMALL.id + SMALL_HASHES[3])
    (data / "CLEAN").unlink()
    report = check(data)
    assert report.counts[FsckCode.INDEX_INCOMPLETE] == 1
    assert report.counts[FsckCode.ORPHAN] == 1
    assert repair(data).problems == 0
    assert served(data) == [9, 2]


def test_a_damaged_namespace_takes_its_blocks_along_and_nothing_else(data: Path) -> None:
    file = data / "namespaces" / f"{LARGE.id.hex()}.json"
    flip(file, 30)
    assert check(data).counts[FsckCode.NAMESPACE_DAMAGED] == 1
    good = (data / COPIES_NAME / file.name).read_bytes()
    (data / COPIES_NAME / file.name).unlink()
    assert check(data).counts[FsckCode.NAMESPACE_DAMAGED] == 1
    assert repair(data).problems == 0
    assert (data / "damaged" / f"{file.name}.1").exists()
    assert served(data)[0] == 9
    file.write_bytes(good)
    shutil.rmtree(data / "index")
    assert repair(data).problems == 0
    assert served(data) == [9, 2]


@pytest.mark.parametrize("name", ["index.snapshot", "CLEAN"])
def test_a_damaged_snapshot_or_clean_flag_costs_only_the_fast_start(data: Path, name: str) -> None:
    flip(data / name, 40)
    assert check(data).problems == 1
    assert repair(data).problems == 0
    assert served(data) == [9, 2]


def test_damaged_retentions_are_put_aside(data: Path) -> None:
    write_retained(data, [RetainedPrefix(SMALL.id, SMALL_HASHES[0], 1e12)])
    assert not check(data).findings
    flip(data / "RETAINED", 50)
    assert check(data).counts[FsckCode.RETAINED_DAMAGED] == 1
    assert repair(data).problems == 0
    assert served(data) == [9, 2]


@pytest.mark.parametrize("damage", ["data", "index", "meta", "superblock"])
def test_a_store_on_a_raw_device_is_checked_and_repaired(tmp_path: Path, damage: str) -> None:
    path, raw = tmp_path / "data", tmp_path / "raw"
    with raw.open("wb") as file:
        file.truncate(8 << 20)
    config = dataclasses.replace(CONFIG, raw_device=str(raw))
    with BlockStore.open(path, config) as store:
        for namespace, hashes in CHAINS:
            assert set(put(store, namespace, hashes)) == {SealStatus.SEALED}
    assert not check(path).findings
    if damage == "data":
        flip(raw, raw.read_bytes().find(content(SMALL_HASHES[6], 6000)) + 9)
    elif damage == "index":
        (path / "index" / "data.mdb").unlink()
    elif damage == "meta":
        flip(path / "META", 12)
    else:
        flip(raw, (2 << 20) + 12)
    assert check(path).problems
    assert repair(path).problems == 0
    with BlockStore.open(path, config) as store:
        found = len(store.get(SMALL.id, SMALL_HASHES)), len(store.get(LARGE.id, LARGE_HASHES))
        assert found == ((6, 2) if damage == "data" else (9, 2))
    flip(raw, 20)
    report = check(path)
    assert (report.problems, report.counts[FsckCode.RAW_TABLE_DAMAGED]) == (0, 1)
    flip(raw, (1 << 20) + 20)
    assert check(path).counts[FsckCode.RAW_TABLE_LOST] == 1
    for copy in (0, 1 << 20):
        flip(raw, copy + 20)
    moved = tmp_path / "elsewhere"
    raw.rename(moved)
    with Fsck(path, raw_device=str(moved)) as fsck:
        assert not fsck.check().problems


def test_a_raw_device_that_is_still_blank_is_no_problem(tmp_path: Path) -> None:
    path, raw = tmp_path / "data", tmp_path / "raw"
    with raw.open("wb") as file:
        file.truncate(8 << 20)
    config = dataclasses.replace(CONFIG, raw_device=str(raw))
    BlockStore.open(path, config).close()
    with raw.open("r+b") as file:
        file.write(bytes(2 << 20))
    assert not check(path).findings
    with BlockStore.open(path, config) as store:
        put(store, SMALL, SMALL_HASHES)
    with raw.open("r+b") as file:
        file.write(bytes(2 << 20))
    assert check(path).counts[FsckCode.RECORD_MISPLACED] == len(SMALL_HASHES)


def test_two_blocks_in_one_slot_leave_one_of_them(data: Path) -> None:
    with Fsck(data) as fsck:
        fsck.check()
        records = {r.hash: r for r in map(BlockRecord.from_bytes, fsck.state.records.values())}
    first, last = records[SMALL_HASHES[0]], records[SMALL_HASHES[8]]
    stale = dataclasses.replace(last, segment=first.segment, slot=first.slot, generation=0)
    with open_index(data) as env, env.begin(write=True) as txn:
        txn.put(stale.key, stale.to_bytes())
    assert check(data).counts[FsckCode.CLAIMED_TWICE] == 1
    assert repair(data).problems == 0
    assert served(data) == [9, 2]


def test_a_store_in_use_is_refused_naming_the_process(data: Path) -> None:
    with BlockStore.open(data, CONFIG), pytest.raises(Unavailable, match=str(os.getpid())):
        Fsck(data)
    assert not check(data).problems


def test_what_is_no_data_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not a data directory"):
        Fsck(tmp_path)
    with pytest.raises(InvalidRequest, match="not a data directory"):
        Fsck(tmp_path / "nowhere")


def test_the_command_tells_by_its_exit_code_and_in_json(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fsck", str(data)]) == 0
    assert "clean" in capsys.readouterr().out
    file, at = find(data, content(SMALL_HASHES[6], 6000))
    flip(file, at)
    assert main(["fsck", str(data), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["clean"], found["problems"], found["bad_blocks"]) == (False, 1, 1)
    assert found["findings"][0]["code"] == "data_damaged"
    assert main(["fsck", str(data), "--repair"]) == 0
    assert "repaired: the index is written anew" in capsys.readouterr().out
    assert main(["fsck", str(data / "index")]) == 2
    assert main(["fsck", str(data)]) == 0


def test_a_daemon_that_runs_is_named(data: Path) -> None:
    program = (
        "import sys, time\n"
        "from dualpath.kvstore.block_store import BlockStore\n"
        "store = BlockStore.open(sys.argv[1])\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(data)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        with pytest.raises(Unavailable, match=f"process {child.pid}"):
            Fsck(data)
        child.kill()


@pytest.mark.parametrize("seed", range(12))
def test_random_damage_is_repaired_to_a_store_that_serves_only_right_blocks(
    data: Path, seed: int
) -> None:
    dice = random.Random(seed)
    paths = [p for p in sorted(data.rglob("*")) if p.is_file() and p.stat().st_size]
    for _ in range(dice.choice([1, 3])):
        path = dice.choice(paths)
        for _ in range(dice.choice([1, 30])):
            flip(path, dice.randrange(path.stat().st_size), dice.randrange(1, 256))
    with contextlib.suppress(InvalidRequest):  # damage that looks like a newer format
        left = repair(data)
        assert left.problems == 0, left.findings
        served(data)
