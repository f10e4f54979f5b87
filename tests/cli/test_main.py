"""The entry point: commands, exit codes, one line an error."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from dualpath.cli import main as entry
from dualpath.cli.command import BUILT_IN, CommandSource, known_commands
from dualpath.transfer.errors import Corrupt, DualPathError, InvalidRequest, Overloaded


class Probe:
    """A command that does what it is told."""

    name = "probe"
    help = "a probe"

    def __init__(self, action: Callable[[], int]) -> None:
        self.action = action

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--flag")
        parser.add_argument("--json", action="store_true")

    def run(self, args: argparse.Namespace) -> int:
        return self.action()


def run(monkeypatch: pytest.MonkeyPatch, action: Callable[[], int], *arguments: str) -> int:
    monkeypatch.setattr(CommandSource, "load", lambda _self: Probe(action))
    return entry.main(["doctor", *arguments])


def raising(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


def test_the_commands_code_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, lambda: 0) == 0
    assert run(monkeypatch, lambda: 1) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DualPathError("broke"), 1),
        (Corrupt("broke"), 1),
        (Overloaded("broke", retry_after_s=1), 1),
        (InvalidRequest("broke"), 2),
    ],
)
def test_an_error_is_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: DualPathError,
    code: int,
) -> None:
    assert run(monkeypatch, raising(error)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"dualpath: {error.reason}: broke\n"


def test_with_json_an_error_is_an_object_on_stdout_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, raising(Overloaded("full", retry_after_s=2)), "--json") == 1
    out, err = capsys.readouterr()
    assert err == "dualpath: overloaded: full\n"
    assert json.loads(out) == {
        "error": "Overloaded",
        "reason": "overloaded",
        "message": "full",
        "retry_after_s": 2,
    }
    with pytest.raises(SystemExit) as exited:
        run(monkeypatch, lambda: 0, "--json", "--flagg", "1")
    assert exited.value.code == 2
    out, err = capsys.readouterr()
    assert "--flagg" in err
    told = json.loads(out)
    assert (told["error"], told["reason"]) == ("InvalidRequest", "usage")
    assert "--flagg" in told["message"]


def test_json_that_names_a_file_leaves_stdout_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_file(_self: Probe, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", default="", metavar="FILE")

    monkeypatch.setattr(Probe, "add_arguments", with_file)
    assert run(monkeypatch, raising(DualPathError("broke")), "--json", "out.json") == 1
    assert capsys.readouterr().out == ""


NOWHERE = "127.0.0.1:1"


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["stat", "--daemon", NOWHERE], 1, "unavailable"),
        (["lookup", "--key", "k", "--daemon", NOWHERE], 1, "unavailable"),
        (["get", "--key", "k", "-o", "copy", "--daemon", NOWHERE], 1, "unavailable"),
        (["get", "--key", "k", "--daemon", NOWHERE], 2, "invalid"),
        (["put", "file", "--key", "k", "--daemon", NOWHERE], 1, "daemon_unavailable"),
        (["put", "no-file", "--key", "k"], 2, "invalid"),
        (["lookup", "--key", "no\udcffUTF-8", "--daemon", NOWHERE], 2, "invalid"),
        (["lookup", "--key", "k", "--token", "x\ny", "--daemon", NOWHERE], 2, "invalid"),
        (["retain", "--key", "k", "--for", "1d", "--daemon", NOWHERE], 1, "unavailable"),
        (["events", NOWHERE], 1, "unavailable"),
        (["invalidate", NOWHERE, "--writer", "w"], 1, "unavailable"),
        (["invalidate", NOWHERE], 2, "invalid"),
        (["drain", NOWHERE], 1, "unavailable"),
        (["top", NOWHERE, "--interval", "fast"], 2, "invalid"),
        (["fsck", "no-folder"], 2, "invalid"),
        (["fsck"], 2, "usage"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_every_command_answers_json_also_when_it_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"bytes")
    try:
        ended = entry.main([*words, "--json"])
    except SystemExit as exited:
        ended = int(str(exited.code))
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (ended, told["reason"]) == (code, reason)
    assert told["error"]
    assert told["message"] in err


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, raising(KeyboardInterrupt())) == 130


def test_a_flag_that_is_not_known_is_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as exited:
        run(monkeypatch, lambda: 0, "--flagg", "1")
    assert exited.value.code == 2


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["servw"]) == 2
    assert "did you mean 'serve'" in capsys.readouterr().err


def test_no_command_shows_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main([]) == 2
    assert entry.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(source.name in out and source.help in out for source in BUILT_IN)


def test_a_plugin_is_found_and_cannot_replace_a_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint(name, f"{__name__}:plugin", "dualpath.commands") for name in ("extra", "serve")
    ]
    monkeypatch.setattr("dualpath.cli.command.entry_points", lambda group: points)
    known = known_commands()
    assert known["extra"].entry_point is points[0]
    assert known["serve"].entry_point is None


def test_a_plugin_that_cannot_be_loaded_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point = EntryPoint("extra", "no_such_module_at_all:command", "dualpath.commands")
    monkeypatch.setattr("dualpath.cli.command.entry_points", lambda group: [point])
    assert entry.main(["extra"]) == 1
    assert "no_such_module_at_all" in capsys.readouterr().err
    assert entry.main(["--help"]) == 0
    assert "not available" in capsys.readouterr().out


@pytest.mark.parametrize("source", known_commands().values(), ids=lambda source: source.name)
def test_every_command_has_help_with_an_example(source: CommandSource) -> None:
    command = source.load()
    parser = entry.command_parser(command)
    assert command.help
    assert parser.epilog is not None
    assert f"dualpath {source.name}" in parser.epilog
    if source.name not in ("serve", "agent", "scheduler"):
        assert "--json" in parser.format_help()


def test_it_runs_as_a_module_and_starts_without_the_heavy_parts() -> None:
    program = (
        "import sys; from dualpath.cli.main import main; code = main(['--version']);"
        "heavy = {'grpc', 'lmdb', 'matplotlib', 'torch'} & set(sys.modules);"
        "print(sorted(heavy)); sys.exit(code)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert ran.stdout.splitlines()[-1] == "[]"
    module = subprocess.run(
        [sys.executable, "-m", "dualpath.cli.main", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(module.stdout)["ok"] is True
