"""What doctor finds, and that it leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest
from dualpath.cli import probe_storage
from dualpath.cli.finding import Finding, Status
from dualpath.cli.main import main
from dualpath.cli.probe_memory import memory_findings
from dualpath.cli.probe_network import network_findings
from dualpath.cli.probe_software import software_findings
from dualpath.cli.probe_storage import storage_findings
from dualpath.kvstore import device_choice
from dualpath.kvstore.ring_pool import NativeRing


def test_whatever_is_missing_says_what_it_costs_and_how_to_get_it(tmp_path: Path) -> None:
    findings = [
        *software_findings(),
        *storage_findings(tmp_path),
        *memory_findings(),
        *network_findings(),
    ]
    assert len({finding.name for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.detail
        if finding.status is not Status.OK:
            assert finding.cost, finding
            assert finding.remedy, finding
    assert not list(tmp_path.iterdir())


def test_the_report_is_json_and_the_code_is_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--data", str(tmp_path / "not" / "yet"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {finding["name"] for finding in report["findings"]}
    assert {"io_uring", "O_DIRECT", "memlock", "RDMA devices", "GPU", "link shaping"} <= names


def test_a_directory_that_cannot_be_used_is_fatal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--data", str(tmp_path / "file")]) == 1
    assert "data directory" in capsys.readouterr().err


def test_blocks_in_clear_beside_calls_over_tls_are_hinted_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "dualpath.toml"
    file.write_text('[serve]\ntls_cert = "c"\n[agent]\ntls_ca = "a"\ndata_tls = true\n')
    command = ["doctor", "--data", str(tmp_path), "--config", str(file), "--json"]

    def told() -> dict[str, str]:
        assert main(command) == 0
        report = json.loads(capsys.readouterr().out)
        return {
            each["name"]: each["status"] for each in report["findings"] if "TLS" in each["name"]
        }

    assert told() == {"TLS of [serve]": "partial", "TLS of [agent]": "ok"}
    monkeypatch.setenv("DUALPATH_SERVE_DATA_TLS", "yes")
    assert told() == {"TLS of [serve]": "ok", "TLS of [agent]": "ok"}
    file.write_text('[serve]\nlisten = "127.0.0.1:1"\n')
    assert told() == {}
    file.write_text("[serve")
    assert main(command) != 0
    assert "is not TOML" in capsys.readouterr().err


def test_a_refused_ring_says_by_whom(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    switch = tmp_path / "io_uring_disabled"
    switch.write_text("2\n")
    monkeypatch.setattr(device_choice, "_DISABLED", switch)
    codes = [errno.EPERM, errno.ENOSYS, errno.ENOMEM]

    def refuse(depth: int) -> NativeRing:
        raise OSError(codes[0], os.strerror(codes[0]))

    monkeypatch.setattr(device_choice, "make_ring", refuse)
    assert "io_uring_disabled is 2" in probe_storage.io_uring().detail
    switch.write_text("0\n")
    assert "seccomp" in probe_storage.io_uring().detail
    codes.pop(0)
    assert "too old" in probe_storage.io_uring().detail
    codes.pop(0)
    assert "ulimit -l" in probe_storage.io_uring().remedy
    monkeypatch.setattr(device_choice, "make_ring", None)
    assert "native module" in probe_storage.io_uring().detail


def test_a_limit_on_locked_memory_costs_io_uring_its_registered_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def memlock(limit: int) -> Finding:
        monkeypatch.setattr(resource, "getrlimit", lambda _which: (limit, resource.RLIM_INFINITY))
        return next(found for found in memory_findings() if found.name == "memlock")

    for limit in (64 << 10, 8 << 30):
        limited = memlock(limit)
        assert limited.status is Status.PARTIAL
        assert "io_uring" in limited.cost
        assert "RDMA" in limited.cost
        assert "LimitMEMLOCK=infinity" in limited.remedy
    assert memlock(resource.RLIM_INFINITY).status is Status.OK


def test_a_file_system_that_refuses_o_direct_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real_open = os.open

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    finding = probe_storage._direct(tmp_path)
    assert finding.status is Status.ABSENT
    assert "page cache" in finding.cost


def test_shaping_tools_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    shaping = next(found for found in network_findings() if found.name == "link shaping")
    assert shaping.status is Status.ABSENT
    assert "tc" in shaping.detail
