"""Where `get` and the reports write to: what is replaced, what is written into, what fails."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dualpath.cli.main import main

PROGRAM = [sys.executable, "-m", "dualpath.cli.main"]
CONTENT = bytes(range(256)) * 9000
NULL, FULL = os.makedev(1, 3), os.makedev(1, 7)
Stored = tuple[str, ...]


@pytest.fixture
def stored(daemon: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Stored:
    """The words of a `get` of CONTENT, all but the output."""
    file = tmp_path / "original"
    file.write_bytes(CONTENT)
    words = ("--key", "output", "--daemon", daemon["listen"])
    assert main(["put", str(file), *words]) == 0
    file.unlink()
    capsys.readouterr()
    return ("get", *words)


def device(path: Path, number: int) -> Path:
    """A device node of our own, never one of the machine."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, number)
        path.open("wb").close()
    except OSError as error:
        pytest.skip(f"no device node can be made and opened here: {error}")
    return path


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def check_one_line(code: int, err: str, message: str) -> None:
    assert (code, err) == (1, f"dualpath: output: cannot write {message}\n")


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stays_and_its_target_is_written(
    stored: Stored, tmp_path: Path, there: bool
) -> None:
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    if there:
        target.write_bytes(b"before")
    link.symlink_to("folder/target")
    assert main([*stored, "-o", str(link)]) == 0
    assert os.readlink(link) == "folder/target"
    assert target.read_bytes() == CONTENT
    assert os.listdir(target.parent) == ["target"]


def test_a_file_keeps_its_permissions_and_at_a_failure_its_bytes(
    stored: Stored, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"before")
    file.chmod(0o640)
    assert main(["get", "--key", "never stored", *stored[3:], "-o", str(file)]) == 1
    assert file.read_bytes() == b"before"
    assert main([*stored, "-o", str(file)]) == 0
    assert file.read_bytes() == CONTENT
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_fifo_and_a_device_are_written_into_and_stay_what_they_are(
    stored: Stored, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE) as reader:
        with subprocess.Popen([*PROGRAM, *stored, "-o", str(fifo)]) as writer:
            assert reader.communicate(timeout=60)[0] == CONTENT
        assert writer.returncode == 0
    assert stat.S_ISFIFO(fifo.lstat().st_mode)
    null, link = device(tmp_path / "null", NULL), tmp_path / "link"
    link.symlink_to(null)
    for name in (null, link):
        assert main([*stored, "-o", str(name)]) == 0
    assert null.lstat().st_rdev == NULL
    assert sorted(os.listdir(tmp_path)) == ["fifo", "link", "null"]


def test_stdout_by_its_name_is_written_where_it_stands(stored: Stored, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb", buffering=0) as stdout:
        stdout.write(b"before")
        subprocess.run([*PROGRAM, *stored, "-o", "/dev/stdout"], stdout=stdout, check=True)
        stdout.write(b"after")
    assert file.read_bytes() == b"before" + CONTENT + b"after"


@pytest.mark.parametrize("name", ["", "folder", "folder/", "new/", "loop", "folder/no/file"])
def test_what_can_not_be_a_file_is_refused_before_anything_is_loaded(
    stored: Stored,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    assert main([*stored, "-o", name]) == 2
    err = capsys.readouterr().err
    assert err.startswith("dualpath: invalid: cannot write ")
    assert name in err
    assert err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["folder", "loop"]
    assert not os.listdir("folder")


def test_a_disk_that_is_full_leaves_no_part_of_the_file(
    stored: Stored,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = os.write

    def filling(descriptor: int, data: Any) -> int:
        if ".part-" not in os.readlink(f"/proc/self/fd/{descriptor}"):
            return write(descriptor, data)
        if os.fstat(descriptor).st_size > len(CONTENT) // 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: len(CONTENT) // 3])

    monkeypatch.setattr(os, "write", filling)
    code = main([*stored, "-o", str(tmp_path / "copy")])
    check_one_line(code, capsys.readouterr().err, f"{tmp_path}/copy: No space left on device")
    assert not os.listdir(tmp_path)


def test_a_device_that_is_full_is_one_clear_line(
    stored: Stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = device(tmp_path / "full", FULL)
    code = main([*stored, "-o", str(full)])
    check_one_line(code, capsys.readouterr().err, f"{full}: No space left on device")
    assert full.lstat().st_rdev == FULL


@pytest.mark.parametrize("command", ["get", "stat", "stat --json", "get --help"])
@pytest.mark.parametrize("kind", ["full", "closed"])
def test_a_stdout_that_takes_nothing_is_one_clear_line_or_the_end_of_text(
    stored: Stored, tmp_path: Path, command: str, kind: str
) -> None:
    words = stored if command == "get" else (*command.split(), *stored[3:])
    if kind == "full":
        stdout = os.open(device(tmp_path / "full", FULL), os.O_WRONLY)
    else:
        stdout = closed_pipe()
    try:
        ran = subprocess.run(
            [*PROGRAM, *words],
            check=False,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(stdout)
    if kind == "closed" and command != "get":
        assert (ran.returncode, ran.stderr) == (141, ""), "a reader may have seen enough"
        return
    reason = "No space left on device" if kind == "full" else "Broken pipe"
    check_one_line(ran.returncode, ran.stderr, f"stdout: {reason}")


def test_a_stdout_that_is_closed_is_refused_for_bytes(stored: Stored) -> None:
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *PROGRAM, *stored]
    ran = subprocess.run(shell, check=False, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ran.returncode == 2
    assert ran.stderr.startswith("dualpath: invalid: not writing bytes to a closed stdout")
    assert ran.stderr.count("\n") == 1
