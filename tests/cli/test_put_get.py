"""Files through a real daemon: what was put comes back identical, and misses have reasons."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest
from dualpath.cli.main import main
from dualpath.proto.v1 import common_pb2, store_pb2, store_pb2_grpc

StartDaemon = Callable[..., AbstractContextManager[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _use_the_daemon(daemon: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALPATH_CLIENT_DAEMON", daemon["listen"])


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What a command says with --json."""
    assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("nbytes", [0, 1, (1 << 20) - 48, (1 << 20) - 47, 3_000_001])
def test_a_file_comes_back_identical_under_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nbytes: int
) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.write_bytes(os.urandom(nbytes))
    key = f"file-{nbytes}"
    put = report(capsys, "put", str(original), "--key", key)
    assert put["file_bytes"] == nbytes
    assert put["new_blocks"] == put["blocks"] == -(-(nbytes + 48) // (1 << 20))
    got = report(capsys, "get", "--key", key, "-o", str(copy))
    assert copy.read_bytes() == original.read_bytes()
    assert got["sha256"] == put["sha256"]
    looked = report(capsys, "lookup", "--key", key)
    assert looked["hit_blocks"] == looked["blocks"] == put["blocks"]
    assert looked["miss"] == "none"
    assert {path.name for path in tmp_path.iterdir()} == {"original", "copy"}


def test_putting_the_same_again_stores_nothing_and_other_bytes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert report(capsys, "put", str(path), "--key", "same")["new_blocks"] == 1
    assert report(capsys, "put", str(path), "--key", "same")["new_blocks"] == 0
    path.write_bytes(b"two")
    assert main(["put", str(path), "--key", "same"]) == 1
    assert "exists: other bytes are stored" in capsys.readouterr().err


def test_a_block_that_another_session_is_writing_is_named(
    daemon: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    put = report(capsys, "put", str(path), "--key", "reserved")
    namespace_id, block = bytes.fromhex(put["namespace_id"]), bytes.fromhex(put["last_hash"])
    with grpc.insecure_channel(daemon["listen"]) as channel:
        store = store_pb2_grpc.StoreStub(channel)
        store.Invalidate(store_pb2.InvalidateRequest(namespace_id=namespace_id, hash=block))
        session = store.Attach(common_pb2.AttachRequest(name="thief", transports=["tcp"])).session
        reserved = store.Reserve(
            store_pb2.ReserveRequest(
                namespace_id=namespace_id,
                hash=[block],
                parent=[b""],
                ttl_ms=60_000,
                session=session,
            )
        )
        assert main(["put", str(path), "--key", "reserved"]) == 1
        assert capsys.readouterr().err == (
            "dualpath: pending: stored 0 of 1 blocks: block 0: another session is writing it now: "
            "try again soon\n"
        )
        ids = reserved.reservation_id
        store.Abandon(store_pb2.AbandonRequest(reservation_id=ids, session=session))
    assert report(capsys, "put", str(path), "--key", "reserved")["new_blocks"] == 1


def test_a_file_larger_than_the_store_is_told_what_is_full_and_how_large_it_is(
    start_daemon: StartDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(12 << 20))
    sizes = ("--dram-bytes", "8MiB", "--disk-bytes", "8MiB", "--segment-bytes", "4MiB")
    with start_daemon(tmp_path, *sizes) as daemon:
        assert main(["put", str(path), "--key", "large", "--daemon", daemon["listen"]]) == 1
        err = capsys.readouterr().err
        assert re.match(r"dualpath: full: stored \d+ of 13 blocks: .* the store is full", err)
        assert "dram 8.00 MiB, ssd 8.00 MiB: disk_bytes and dram_bytes of the daemon" in err
        assert "what was stored stays until others need the room" in err
        assert err.count("\n") == 1
        path.write_bytes(os.urandom(5 << 20))
        report(capsys, "put", str(path), "--key", "small", "--daemon", daemon["listen"])


def test_more_than_one_batch_is_moved_piece_by_piece(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.write_bytes(os.urandom(5_000_000))
    flags = ("--key", "batches", "--batch-bytes", "2MiB")
    assert report(capsys, "put", str(original), *flags)["blocks"] == 5
    report(capsys, "get", *flags, "-o", str(copy))
    assert copy.read_bytes() == original.read_bytes()


def test_raw_kv_is_found_by_its_token_ids_and_by_its_prefix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kv, copy, tokens = tmp_path / "kv", tmp_path / "copy", tmp_path / "tokens.json"
    layout = ["--raw", "--layers", "2", "--block-tokens", "4", "--layer-bytes", "4KiB"]
    layout += ["--model", "m", "--dtype", "float16"]
    kv.write_bytes(os.urandom(3 * 8192))
    tokens.write_text(json.dumps(list(range(13))))
    report(capsys, "put", str(kv), "--tokens", str(tokens), *layout)
    looked = report(capsys, "lookup", "--tokens", "0..99", *layout)
    assert (looked["hit_blocks"], looked["hit_tokens"]) == (3, 12)
    assert looked["miss"] == "absent"
    assert report(capsys, "get", "--tokens", "0..8", *layout, "-o", str(copy))["blocks"] == 2
    assert copy.read_bytes() == kv.read_bytes()[: 2 * 8192]
    other = report(capsys, "lookup", "--tokens", "0..99", *layout, "--salt", "mine")
    assert (other["hit_blocks"], other["miss"]) == (0, "namespace")


def test_a_layout_file_names_what_the_flags_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kv, layout = tmp_path / "kv", tmp_path / "layout.toml"
    kv.write_bytes(os.urandom(8192))
    layout.write_text('[layout]\nmodel = "t"\nlayers = 2\nlayer_bytes = "4KiB"\n')
    put = report(capsys, "put", str(kv), "--raw", "--tokens", "0..15", "--layout", str(layout))
    flags = ["--model", "t", "--layers", "2", "--layer-bytes", "4096"]
    looked = report(capsys, "lookup", "--raw", "--tokens", "0..15", *flags)
    assert looked["namespace_id"] == put["namespace_id"]
    assert looked["hit_blocks"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["get", "--key", "absent", "-o", "x"], 1, "absent: nothing is stored under this name"),
        (["get", "--tokens", "1..2", "-o", "x"], 2, "1 blocks need 16 tokens .*, 2 were given"),
        (["get", "--raw", "--key", "k", "-o", "x"], 2, "needs --tokens"),
        (["get", "--key", "k", "--json"], 2, "--json needs -o FILE"),
        (["get", "--key", "k", "-o", "no/such/folder"], 2, "cannot write no/such/folder"),
        (["put", "no-such-file", "--key", "k"], 2, "cannot read no-such-file"),
        (["put", "-", "--tokens", "-"], 2, "both come from stdin"),
        (["put", "kv", "--raw", "--tokens", "0..99"], 2, "5 bytes, which is not a whole number"),
        (["put", "kv", "--key", ""], 2, "--key is empty"),
        (["put", "kv", "--key", "k", "--engine-format", "v"], 2, "give --raw with it"),
        (["put", "kv", "--key", "k", "--layers", "0"], 2, "layers must lie in"),
        (["put", "kv", "--key", "k", "--layer-bytes", "4G"], 2, "'4G' is not a size"),
        (["lookup", "--key", "k", "--daemon", "127.0.0.1:1"], 1, "unavailable: .*127.0.0.1:1"),
        (["stat", "--daemon", "127.0.0.1:1"], 1, "unavailable: .*127.0.0.1:1"),
    ],
)
def test_a_mistake_is_one_clear_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kv").write_bytes(b"bytes")
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert bool(out) == ("--json" in arguments)
    assert re.search(message, err), err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kv"]


def test_stdin_and_stdout_carry_files(daemon: dict[str, Any]) -> None:
    program = [sys.executable, "-m", "dualpath.cli.main"]
    content = os.urandom(100_000)
    flags = ["--key", "piped", "--daemon", daemon["listen"]]
    subprocess.run([*program, "put", "-", *flags], input=content, check=True, timeout=60)
    got = subprocess.run([*program, "get", *flags], capture_output=True, check=True, timeout=60)
    assert got.stdout == content
    assert b"loaded" in got.stderr


def test_stat_shows_the_daemons_counters(capsys: pytest.CaptureFixture[str]) -> None:
    stats = report(capsys, "stat")
    assert stats["blocks"] > 0
    assert {tier["tier"] for tier in stats["tier"]} == {"dram", "ssd"}
    assert main(["stat"]) == 0
    assert "256.00 MiB" in capsys.readouterr().out


def test_the_python_of_the_readme_runs(
    daemon: dict[str, Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(program.replace("127.0.0.1:7070", daemon["listen"]), {})
    assert "blocks=4" in capsys.readouterr().out
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_stored_file_is_retained_for_a_while(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2_000_000))
    report(capsys, "put", str(path), "--key", "kept")
    kept = report(capsys, "retain", "--key", "kept", "--for", "1d")
    assert kept == {"blocks": 2, "retained_blocks": 2}
    assert main(["retain", "--key", "kept", "--for", "0"]) == 0
    assert "2 stored blocks are not retained any longer" in capsys.readouterr().out
    absent = report(capsys, "retain", "--key", "never", "--for", "12h")
    assert absent == {"blocks": 0, "retained_blocks": 0}
    assert main(["retain", "--key", "kept", "--for", "1d", "--agent", "unix:/x"]) != 0
    assert "give --daemon, not --agent" in capsys.readouterr().err
