"""The whole demo with real processes: small, byte by byte, by pacing and by the kernel."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dualpath.bench.demo.command import EXIT_FAILED, EXIT_OK, EXIT_USAGE, command
from dualpath.bench.testbed.namespaces import NAMESPACES_FOLDER, sweep_stale, why_not_kernel


def run(tmp_path: Path, *words: str) -> tuple[int, dict[str, object]]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "out.json"
    picture = tmp_path / "links.png"
    status = command.run(parser.parse_args([*words, "--json", str(out), "--plot", str(picture)]))
    return status, json.loads(out.read_text()) if out.exists() else {}


def leftovers(pid: int) -> set[str]:
    """Processes of a demo's cluster that are alive, by their command lines; `pid` of the demo."""
    found, folder = set(), f"dualpath-demo-{pid}-".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"dualpath.cli.main" in words and any(folder in word for word in words):
            found.add(f"{path.parent.name} {b' '.join(words).decode()}")
    return found


@pytest.mark.timeout(120)
def test_a_paced_demo_verifies_every_block_and_the_split_uses_both_storage_links(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result = run(
        tmp_path,
        *("--shaping", "pacing", "--policies", "direct,split", "--storage-rate", "20MB/s"),
        *("--budget-mib", "24", "--concurrency", "4", "--decode", "1"),
        *("--destination", "host", "--scheduler", "split"),
    )
    assert status == EXIT_OK, capsys.readouterr().err
    assert result["shaping"] == "pacing"
    assert result["corrupt_blocks"] == result["failed_loads"] == 0
    policies = result["policies"]
    assert isinstance(policies, dict)
    assert policies["split"]["verified_blocks"] == policies["direct"]["verified_blocks"] >= 96
    assert set(policies["split"]["bytes_by_path"]) == {"direct", "relay:decode-0"}
    assert policies["split"]["ratio_to_direct"] > 1.3
    scheduled = policies["scheduler:split"]
    assert scheduled["verified_blocks"] == policies["direct"]["verified_blocks"]
    assert set(scheduled["bytes_by_path"]) == {"direct", "relay:decode-0"}
    assert (tmp_path / "links.png").read_bytes().startswith(b"\x89PNG")
    assert "all right" in capsys.readouterr().out
    assert not leftovers(os.getpid())


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_kernel_shaped_demo_gains_by_the_split_and_cleans_up(tmp_path: Path) -> None:
    reason = why_not_kernel()
    if reason:
        pytest.skip(f"kernel shaping: {reason}")
    status, result = run(
        tmp_path,
        "--shaping",
        "kernel",
        "--policies",
        "direct,split",
        "--budget-mib",
        "96",
        "--decode",
        "1",
    )
    assert status == EXIT_OK
    assert result["shaping"] == "kernel"
    policies = result["policies"]
    assert isinstance(policies, dict)
    assert policies["split"]["ratio_to_direct"] > 1.5
    assert policies["direct"]["links"]["prefill-0 SNIC in"]["utilisation"] > 0.8
    assert not list(NAMESPACES_FOLDER.glob(f"dualpath-{os.getpid()}-*"))


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_behind_a_compute_link_no_wider_than_the_storage_link_the_split_gains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = why_not_kernel()
    if reason:
        pytest.skip(f"kernel shaping: {reason}")
    status, result = run(
        tmp_path,
        *("--policies", "direct,split", "--budget-mib", "96", "--storage-rate", "20MB/s"),
        *("--compute-ratio", "1", "--concurrency", "1", "--decode", "1"),
    )
    assert status == EXIT_OK
    policies = result["policies"]
    assert isinstance(policies, dict)
    assert policies["split"]["ratio_to_direct"] < 1.2
    assert "a second path gains nothing" in capsys.readouterr().out


def start(*words: str) -> subprocess.Popen[str]:
    """A demo that will run for a while, in a process of its own."""
    argv = [sys.executable, "-m", "dualpath.cli.main", "demo", "--plot", "", *words]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(demo: subprocess.Popen[str], word: str) -> None:
    assert demo.stderr is not None
    for line in demo.stderr:
        if line.startswith(word):
            return
    pytest.fail(f"the demo never said {word!r}")


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_process_behind(number: signal.Signals) -> None:
    with start("--policies", "direct", "--storage-rate", "10MB/s") as demo:
        wait_for(demo, "direct")
        assert leftovers(demo.pid)
        demo.send_signal(number)
        demo.wait(30)
    if number is signal.SIGKILL:
        sweep_stale()
    else:
        assert demo.returncode == 130
        assert not list(Path("/tmp").glob(f"dualpath-demo-{demo.pid}-*"))
    assert not list(NAMESPACES_FOLDER.glob(f"dualpath-{demo.pid}-*"))
    deadline = time.monotonic() + 20
    while leftovers(demo.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not leftovers(demo.pid)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_node_that_dies_ends_the_demo_with_its_last_words() -> None:
    with start("--policies", "direct", "--storage-rate", "10MB/s") as demo:
        wait_for(demo, "direct")
        victim = next(each for each in leftovers(demo.pid) if "--name prefill-0" in each)
        os.kill(int(victim.split()[0]), signal.SIGKILL)
        assert demo.stderr is not None
        said = demo.stderr.read()
        assert demo.wait(60) == EXIT_FAILED
    assert "prefill-0 ended with status -9" in said
    assert not leftovers(demo.pid)


def test_a_demo_that_cannot_be_shaped_as_demanded_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "dualpath.bench.demo.demonstration.why_not_kernel", lambda: "`tc` is not installed"
    )
    status, _ = run(tmp_path, "--shaping", "kernel")
    assert status == EXIT_FAILED
    said = capsys.readouterr().err
    assert "`tc` is not installed" in said
    assert "--shaping pacing" in said


def test_a_store_that_does_not_fit_the_disk_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "dualpath.bench.demo.demonstration.shutil.disk_usage",
        lambda _path: argparse.Namespace(free=5 << 20),
    )
    status, _ = run(tmp_path, "--shaping", "none", "--data", str(tmp_path / "store"))
    assert status == EXIT_USAGE
    assert "5 MiB are free" in capsys.readouterr().err
