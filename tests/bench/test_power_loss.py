"""The model of power loss: what is synced stays, what is not may be lost, torn or reordered; and
the recorder sees every change that a process makes."""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from dualpath.bench.soak.power_loss import SECTOR_BYTES, Mood, PowerLoss, PowerLossError
from dualpath.bench.soak.recording import (
    LIBRARY_VARIABLE,
    Change,
    Record,
    build_recorder,
    read_log,
)
from dualpath.transfer.errors import Unavailable

SEEDS = range(40)


class Script:
    """Changes below one directory, as a recorder would log them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loss = PowerLoss(root)
        self._handles = 0

    def open(self, name: str, flags: int = 0, *, made: bool = False) -> int:
        self._handles += 1
        path = str(self.root / name) if name else str(self.root)
        self._follow(Change.OPENED, self._handles, flags, int(made), path.encode())
        return self._handles

    def write(self, handle: int, offset: int, data: bytes, *, at_once: bool = False) -> None:
        self._follow(Change.WRITTEN, handle, offset, int(at_once), data)

    def resize(self, handle: int, size: int) -> None:
        self._follow(Change.SIZED, handle, size)

    def sync(self, handle: int) -> None:
        self._follow(Change.SYNCED, handle)

    def fail_sync(self, handle: int) -> None:
        self._follow(Change.SYNC_FAILED, handle)

    def rename(self, before: str, after: str) -> None:
        paths = f"{self.root / before}\0{self.root / after}"
        self._follow(Change.RENAMED, data=paths.encode())

    def unlink(self, name: str) -> None:
        self._follow(Change.UNLINKED, data=str(self.root / name).encode())

    def mkdir(self, name: str) -> None:
        self._follow(Change.MADE_DIRECTORY, data=str(self.root / name).encode())

    def _follow(
        self, kind: Change, handle: int = 0, a: int = 0, b: int = 0, data: bytes = b""
    ) -> None:
        self.loss.follow([Record(kind, handle, a, b, data)])

    def left(self, target: Path, mood: Mood | None = None) -> list[dict[str, bytes]]:
        """What is left, for many seeds: content by name."""
        found = []
        for seed in SEEDS:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            self.loss.lose(seed, target, mood)
            files = [path for path in sorted(target.rglob("*")) if path.is_file()]
            found.append({str(p.relative_to(target)): p.read_bytes() for p in files})
        return found


@pytest.fixture
def script(tmp_path: Path) -> Script:
    root = tmp_path / "root"
    root.mkdir()
    (root / "old").write_bytes(b"o" * 4 * SECTOR_BYTES)
    return Script(root)


def test_what_was_there_at_the_start_stays(script: Script, tmp_path: Path) -> None:
    assert all(left == {"old": b"o" * 2048} for left in script.left(tmp_path / "left"))


def test_synced_bytes_stay_and_others_may_be_old_new_or_torn(
    script: Script, tmp_path: Path
) -> None:
    file = script.open("old")
    script.write(file, 0, b"s" * SECTOR_BYTES)
    script.sync(file)
    script.write(file, SECTOR_BYTES, b"n" * 3 * SECTOR_BYTES)
    seen = Counter(left["old"] for left in script.left(tmp_path / "left"))
    assert all(content[:SECTOR_BYTES] == b"s" * SECTOR_BYTES for content in seen)
    tails = {content[SECTOR_BYTES:] for content in seen}
    assert b"o" * 1536 in tails, "all of it can be lost"
    assert b"n" * 1536 in tails, "and all of it can stay"
    assert any(len(set(tail)) == 2 for tail in tails), "and some of it"
    for tail in tails:
        sectors = [tail[at : at + SECTOR_BYTES] for at in range(0, len(tail), SECTOR_BYTES)]
        assert all(len(set(sector)) == 1 for sector in sectors), "a sector is never torn"


def test_a_later_write_may_stay_while_an_earlier_one_is_lost(
    script: Script, tmp_path: Path
) -> None:
    file = script.open("old")
    script.write(file, 0, b"1" * SECTOR_BYTES)
    script.write(file, 3 * SECTOR_BYTES, b"2" * SECTOR_BYTES)
    seen = {(left["old"][:1], left["old"][-1:]) for left in script.left(tmp_path / "left")}
    assert seen == {(b"o", b"o"), (b"1", b"o"), (b"o", b"2"), (b"1", b"2")}


def test_a_sector_written_twice_may_have_any_of_its_versions(
    script: Script, tmp_path: Path
) -> None:
    file = script.open("old")
    for version in (b"1", b"2"):
        script.write(file, 0, version * SECTOR_BYTES)
    assert {left["old"][:1] for left in script.left(tmp_path / "left")} == {b"o", b"1", b"2"}


def test_what_was_written_before_a_sync_that_failed_is_in_doubt_until_it_is_written_again(
    script: Script, tmp_path: Path
) -> None:
    file = script.open("old")
    for sector in (0, 1):
        script.write(file, sector * SECTOR_BYTES, b"1" * SECTOR_BYTES)
    script.fail_sync(file)
    script.write(file, SECTOR_BYTES, b"2" * SECTOR_BYTES)
    script.sync(file)
    seen = {(left["old"][:1], left["old"][600:601]) for left in script.left(tmp_path / "left")}
    assert seen == {(b"o", b"2"), (b"1", b"2")}
    script.write(file, 0, b"3" * SECTOR_BYTES)
    script.sync(file)
    assert {left["old"][:1] for left in script.left(tmp_path / "left")} == {b"3"}


def test_a_write_that_is_durable_at_once_stays_and_syncs_nothing_else(
    script: Script, tmp_path: Path
) -> None:
    file = script.open("old")
    script.write(file, SECTOR_BYTES, b"n" * SECTOR_BYTES)
    script.write(file, 0, b"d" * 100, at_once=True)
    contents = {left["old"] for left in script.left(tmp_path / "left")}
    assert all(content[:101] == b"d" * 100 + b"o" for content in contents)
    assert len({content[SECTOR_BYTES] for content in contents}) == 2


def test_a_new_size_may_come_without_its_bytes(script: Script, tmp_path: Path) -> None:
    file = script.open("old")
    script.write(file, 4 * SECTOR_BYTES, b"n" * SECTOR_BYTES)
    contents = {left["old"] for left in script.left(tmp_path / "left")}
    assert {len(content) for content in contents} == {2048, 2560}
    assert b"o" * 2048 + bytes(512) in contents
    script.sync(file)
    assert {left["old"] for left in script.left(tmp_path / "left")} == {b"o" * 2048 + b"n" * 512}


def test_cutting_a_file_short_is_in_doubt_until_it_is_synced(
    script: Script, tmp_path: Path
) -> None:
    file = script.open("old", os.O_TRUNC)
    assert {len(left["old"]) for left in script.left(tmp_path / "left")} == {0, 2048}
    script.write(file, 0, b"n")
    script.resize(file, 600)
    script.sync(file)
    assert {left["old"] for left in script.left(tmp_path / "left")} == {b"n" + bytes(599)}


def test_a_new_name_needs_its_directory_synced_and_not_only_its_file(
    script: Script, tmp_path: Path
) -> None:
    file = script.open("new", os.O_CREAT, made=True)
    script.write(file, 0, b"n")
    script.sync(file)
    assert {"new" in left for left in script.left(tmp_path / "left")} == {True, False}
    script.sync(script.open(""))
    assert all(left["new"] == b"n" for left in script.left(tmp_path / "left"))


def test_a_rename_is_whole_or_absent(script: Script, tmp_path: Path) -> None:
    file = script.open("new", os.O_CREAT, made=True)
    script.write(file, 0, b"n")
    script.sync(file)
    script.sync(script.open(""))
    script.rename("new", "old")
    seen = script.left(tmp_path / "left")
    assert {left["old"] for left in seen} == {b"n", b"o" * 2048}
    assert all(("new" in left) == (left["old"] != b"n") for left in seen)


def test_names_of_one_directory_change_in_order(script: Script, tmp_path: Path) -> None:
    for name in ("a", "b"):
        script.open(name, os.O_CREAT, made=True)
    script.unlink("a")
    seen = {tuple(sorted(left)) for left in script.left(tmp_path / "left")}
    assert seen <= {("old",), ("a", "old"), ("a", "b", "old"), ("b", "old")}
    assert len(seen) == 4


def test_a_file_in_a_directory_that_never_came_to_be_is_gone(
    script: Script, tmp_path: Path
) -> None:
    script.mkdir("folder")
    file = script.open("folder/file", os.O_CREAT, made=True)
    script.sync(file)
    script.sync(script.open("folder"))
    seen = {"folder/file" in left for left in script.left(tmp_path / "left")}
    assert seen == {True, False}
    script.sync(script.open(""))
    assert all("folder/file" in left for left in script.left(tmp_path / "left"))


def test_what_the_model_does_not_know_is_refused(script: Script) -> None:
    with pytest.raises(PowerLossError, match="symlink"):
        script.loss.follow([Record(Change.UNKNOWN, 0, 0, 0, b"symlink")])


@pytest.fixture(scope="module")
def recorder() -> Path:
    try:
        return build_recorder()
    except Unavailable as error:
        pytest.skip(str(error))


_PROGRAM = """
import lmdb, os, subprocess, sys
from pathlib import Path
root = Path(sys.argv[1])
(root / "folder").mkdir()
file = os.open(root / "folder" / "a", os.O_RDWR | os.O_CREAT)
os.write(file, b"written")
os.pwrite(file, b"P", 3)
os.pwritev(file, [b"v" * 10, b"w" * 600], 1000)
os.posix_fallocate(file, 0, 5000)
again = os.dup(file)
os.close(file)
os.pwrite(again, b"dup", 5000)
os.fdatasync(again)
os.close(again)
(root / "folder" / "b").write_text("text")
(root / "folder" / "b").rename(root / "folder" / "c")
(root / "old").unlink()
with open(root / "d", "w") as out:
    out.write("x" * 100_000)
    out.truncate(70_000)
with lmdb.open(str(root / "folder"), lock=False, map_size=1 << 20) as env:
    for n in range(300):
        with env.begin(write=True) as txn:
            txn.put(b"%d" % (n % 50), b"v" * n)
subprocess.run([sys.executable, "-c", "open(%r, 'w').write('child')" % str(root / "e")], check=True)
Path(sys.argv[2]).write_text("outside")
"""


def test_the_recorder_sees_what_python_lmdb_and_children_do(tmp_path: Path, recorder: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    root.mkdir()
    (root / "old").write_text("old")
    loss = PowerLoss(root)
    subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(root), str(tmp_path / "outside")],
        env={
            **os.environ,
            LIBRARY_VARIABLE: str(recorder),
            "DUALPATH_RECORD_ROOT": str(root),
            "DUALPATH_RECORD_LOG": str(log),
        },
        check=True,
        timeout=60,
    )
    records = list(read_log(log))
    loss.follow(records)
    left = tmp_path / "left"
    left.mkdir()
    loss.lose(0, left, Mood.NOTHING)
    names = {str(path.relative_to(root)) for path in root.rglob("*")}
    assert names == {str(path.relative_to(left)) for path in left.rglob("*")}
    assert {"folder/a", "folder/c", "folder/data.mdb", "d", "e"} <= names
    for name in names:
        if (root / name).is_file():
            assert (root / name).read_bytes() == (left / name).read_bytes(), name
    kinds = Counter(record.kind for record in records)
    assert kinds[Change.SYNCED] > 300, "LMDB syncs its data in each commit"
    metas = [r for r in records if r.kind is Change.WRITTEN and r.b]
    assert len(metas) >= 300, "and writes its meta page durably at once"
    assert all(r.a % 4096 + len(r.data) <= SECTOR_BYTES for r in metas), "within one sector"


def test_the_process_is_killed_before_the_change_that_was_asked_for(
    tmp_path: Path, recorder: Path
) -> None:
    assert ctypes.util.find_library("c")
    for cut in (1, 4, 9):
        root, log = tmp_path / f"root-{cut}", tmp_path / f"log-{cut}"
        root.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(root), str(tmp_path / "outside")],
            env={
                **os.environ,
                LIBRARY_VARIABLE: str(recorder),
                "DUALPATH_RECORD_ROOT": str(root),
                "DUALPATH_RECORD_LOG": str(log),
                "DUALPATH_RECORD_CUT": str(cut),
            },
            check=False,
            timeout=60,
        )
        assert done.returncode == -9
        assert len(list(read_log(log))) == cut - 1


_FAILING = """
import errno, os, sys
from pathlib import Path
from dualpath.bench.soak.recording import Faults, recording
root, share, failed = Path(sys.argv[1]), float(sys.argv[2]), []
recording().begin(root, Path(sys.argv[1] + ".log"))
recording().fail(Faults("sick", share, share, 7))
data = [b"w" * 8192]
for name in ("sick", "well"):
    file = os.open(root / name, os.O_RDWR | os.O_CREAT)
    for at in range(200):
        for call in (lambda: os.pwritev(file, data, at * 8192), lambda: os.fdatasync(file)):
            try:
                call()
            except OSError as error:
                assert error.errno == errno.EIO
                failed.append(name)
assert set(failed) == ({"sick"} if share else set()), failed
print(len(failed))
"""


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_share_of_writes_and_syncs_of_some_files_fails_and_is_recorded(
    tmp_path: Path, recorder: Path, share: float
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    loss = PowerLoss(root)
    done = subprocess.run(
        [sys.executable, "-c", _FAILING, str(root), str(share)],
        env={**os.environ, LIBRARY_VARIABLE: str(recorder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    records = list(read_log(tmp_path / "root.log"))
    failed = sum(record.kind is Change.SYNC_FAILED for record in records)
    written = sum(record.kind is Change.WRITTEN for record in records)
    assert (failed > 0, int(done.stdout) > failed) == (share > 0, share > 0)
    assert written < 400 or not share, "some were not done at all"
    loss.follow(records)
    (tmp_path / "left").mkdir()
    loss.lose(0, tmp_path / "left", Mood.NOTHING)
    for name in ("sick", "well"):
        assert (root / name).read_bytes() == (tmp_path / "left" / name).read_bytes()


_BLIND = """
import os, sys
from pathlib import Path
from dualpath.bench.soak.recording import recording
from dualpath.transfer.errors import Unavailable
os.environ["LD_PRELOAD"] = sys.argv[1] + "/gone.so"
try:
    recording().begin(Path(sys.argv[1]), Path(sys.argv[1] + ".log"))
except Unavailable as error:
    print(error)
"""


def test_a_process_whose_children_would_not_be_recorded_is_not_recorded(
    tmp_path: Path, recorder: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BLIND, str(tmp_path)],
        env={**os.environ, LIBRARY_VARIABLE: str(recorder)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "gone.so' is gone" in done.stdout
