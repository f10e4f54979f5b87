"""top, events, invalidate, drain: what operators see, and what scripts read."""

from __future__ import annotations

import builtins
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dualpath.cli.main import main
from dualpath.cli.ready import ready_teller
from dualpath.cli.top_view import Sample, daemon_values, frame
from dualpath.proto.v1 import store_pb2

READY_S = 30.0
Output = tuple[int, str, str]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DUALPATH_CLIENT_DAEMON", "DUALPATH_CLIENT_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> Output:
    """One command in this process."""
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def stored(daemon: dict[str, Any], tmp_path: Path, capsys: Any) -> tuple[str, str]:
    """A daemon with a file in a namespace of its own: address, namespace id."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 5000)
    model = tmp_path.name
    address = daemon["listen"]
    identity = ["--key", "k", "--model", model, "--daemon", address]
    assert run(capsys, "put", str(file), *identity)[0] == 0
    code, out, _ = run(capsys, "lookup", *identity, "--json")
    assert code == 0
    return address, json.loads(out)["namespace_id"]


def test_invalidate_counts_and_then_removes(
    stored: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    address, namespace = stored
    code, out, _ = run(capsys, "invalidate", address, "--namespace", namespace, "--dry-run")
    assert (code, out) == (0, "1 blocks (1.00 MiB) would leave, 0 of them in use\n")
    code, out, _ = run(capsys, "invalidate", address, "--namespace", namespace, "--json")
    assert code == 0
    assert json.loads(out) == {
        "dry_run": False,
        "blocks": 1,
        "bytes": 1 << 20,
        "leased_blocks": 0,
    }
    code, out, _ = run(capsys, "invalidate", address, "--namespace", namespace)
    assert out.startswith("0 blocks")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "--namespace or --writer"),
        (["--namespace", "xyz"], "hexadecimal"),
        (["--namespace", "00ff"], "namespace_id: 2 bytes"),
        (["--writer", "w", "--hash", "00" * 32], "hash"),
    ],
)
def test_what_means_nothing_is_refused_as_wrong_usage(
    daemon: dict[str, Any], capsys: pytest.CaptureFixture[str], flags: list[str], word: str
) -> None:
    code, out, err = run(capsys, "invalidate", daemon["listen"], *flags)
    assert (code, out) == (2, "")
    assert word in err
    assert len(err.splitlines()) == 1


def test_events_are_lines_for_people_and_for_scripts(
    stored: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    address, namespace = stored
    run(capsys, "invalidate", address, "--namespace", namespace)
    flags = ["events", address, "--from", "1", "--namespace", namespace, "--limit", "2"]
    code, out, _ = run(capsys, *flags)
    assert code == 0
    assert [line.split()[1] for line in out.splitlines()] == ["stored", "cleared"]
    code, out, _ = run(capsys, *flags, "--json")
    first, last = map(json.loads, out.splitlines())
    assert (first["kind"], first["reason"], first["namespace_id"]) == ("stored", "none", namespace)
    assert (last["kind"], last["reason"], last["hash"]) == ("cleared", "invalidated", "")
    assert last["sequence"] > first["sequence"]


def test_a_limit_holds_also_inside_of_one_answer(
    stored: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    address, namespace = stored
    run(capsys, "invalidate", address, "--namespace", namespace)
    flags = ["events", address, "--from", "1", "--namespace", namespace, "--limit", "1"]
    code, out, _ = run(capsys, *flags)
    assert code == 0
    assert [line.split()[1] for line in out.splitlines()] == ["stored"]


def test_a_drain_and_its_end_are_told_and_exit_by_the_outcome(
    daemon: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    address = daemon["listen"]
    try:
        assert run(capsys, "drain", address, "--deadline", "5s")[:2] == (0, "drained\n")
        code, out, _ = run(capsys, "top", address, "--once", "--interval", "100ms", "--json")
        assert (code, json.loads(out)["daemons"][0]["state"]) == (0, "drained")
    finally:
        code, out, _ = run(capsys, "drain", address, "--resume", "--json")
    assert (code, json.loads(out)["state"]) == (0, "serving")


def test_top_shows_daemons_that_answer_and_those_that_do_not(
    stored: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    address, namespace = stored
    code, out, _ = run(capsys, "top", address, "127.0.0.1:1", "--once", "--interval", "100ms")
    assert code == 1  # one of them is away
    assert f"{address}  serving" in out
    assert "127.0.0.1:1  no answer: unavailable" in out
    assert "open" in out  # the principal of loopback without tokens
    assert namespace[:8] in out
    code, out, _ = run(capsys, "top", address, "--once", "--interval", "100ms", "--json")
    (values,) = json.loads(out)["daemons"]
    assert code == 0
    assert {"state", "tiers", "principals", "namespaces", "hit_ratio"} <= set(values)


@pytest.mark.parametrize("flags", [["--interval", "1ms"], ["--interval", "fast"]])
def test_an_interval_that_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert run(capsys, "top", "127.0.0.1:1", "--once", *flags)[0] == 2


def test_top_without_rich_draws_with_plain_sequences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dualpath.cli import top

    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rich"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with top._screen() as show:
        show(["one", "two"])
    assert capsys.readouterr().out == "one\ntwo\n"


def _stats(lookups: int, hits: int, misses: int, server: str = "s") -> store_pb2.StatsResponse:
    return store_pb2.StatsResponse(
        server_id=server,
        state="serving",
        lookups=lookups,
        hit_blocks=hits,
        missed_blocks=misses,
        misses={"evicted": misses},
        troubles={"disk_full": "no space"},
        tier=[store_pb2.TierStats(tier="dram", read_bytes=hits << 20, capacity_bytes=1 << 30)],
        tier_hit_blocks={"dram": hits},
        principal=[
            store_pb2.UsageStats(name=f"token:{index}", calls=lookups * index)
            for index in range(12)
        ],
    )


def test_rates_are_those_between_the_samples() -> None:
    before = Sample("d:1", 100.0, _stats(10, 100, 0))
    after = Sample("d:1", 102.0, _stats(30, 160, 20))
    values = daemon_values(before, after)
    assert values["lookups_per_s"] == 10
    assert values["hit_ratio"] == 60 / 80
    assert values["misses_per_s"] == {"evicted": 10}
    assert values["tiers"][0]["read_bytes_per_s"] == 30 << 20
    assert values["tiers"][0]["hit_blocks_per_s"] == 30
    assert [row["name"] for row in values["principals"]][:2] == ["token:11", "token:10"]
    text = "\n".join(frame([before], [after]))
    assert "DEGRADED disk_full: no space" in text
    assert "and 4 more" in text
    assert "hits 75%" in text


def test_a_daemon_that_was_restarted_in_between_has_no_rates_yet() -> None:
    before = Sample("d:1", 100.0, _stats(1000, 100, 0, "old"))
    values = daemon_values(before, Sample("d:1", 102.0, _stats(30, 160, 20, "new")))
    assert (values["lookups_per_s"], values["hit_ratio"]) == (0, None)


def test_a_daemon_that_went_away_is_shown_with_the_reason() -> None:
    before = Sample("d:1", 100.0, _stats(1, 1, 0))
    lines = frame([before], [Sample("d:1", 101.0, None, "unavailable: gone")])
    assert lines == ["d:1  no answer: unavailable: gone"]


def test_systemd_is_told_when_the_process_is_ready(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.settimeout(10)
        ready_teller({"NOTIFY_SOCKET": path})({"listen": "x"})
        assert listener.recv(100) == b"READY=1"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{tmp_path}/abstract")
        listener.settimeout(10)
        ready_teller({"NOTIFY_SOCKET": f"@{tmp_path}/abstract"})({"listen": "x"})
        assert listener.recv(100) == b"READY=1"
    ready_teller({})({"listen": "x"})
    assert capsys.readouterr().out == 'ready {"listen": "x"}\n' * 3


@pytest.fixture
def stoppable(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A daemon of its own, and its address."""
    flags = ["--data", str(tmp_path / "store"), "--listen", "127.0.0.1:0"]
    flags += ["--dram-bytes", "16MiB", "--disk-bytes", "64MiB"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dualpath.cli.main", "serve", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    yield process, json.loads(process.stdout.readline().removeprefix("ready "))["listen"]
    process.kill()
    process.wait()


def test_a_drain_with_stop_ends_the_process_cleanly(
    stoppable: tuple[subprocess.Popen[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    process, address = stoppable
    assert run(capsys, "drain", address, "--deadline", "5s", "--stop")[0] == 0
    assert process.wait(READY_S) == 0
