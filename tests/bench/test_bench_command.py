"""What all programs of `dualpath bench` share: outputs that are checked first, a polite end."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import pytest
from dualpath.bench import command as bench
from dualpath.cli.main import main


class Program:
    """A program that does `work` and says whether it cleaned up."""

    name = "program"
    help = "a program"

    def __init__(self) -> None:
        self.ran = self.cleaned_up = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The flags that name files."""
        for flag in ("--json", "--plot", "--markdown"):
            parser.add_argument(flag, default="")

    def run(self, args: argparse.Namespace) -> int:
        """Be ended in the middle of the work."""
        self.ran = True
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 30)
        finally:
            self.cleaned_up = True
        raise AssertionError("SIGTERM was not heard")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    """In place of any of the list."""
    program = Program()
    monkeypatch.setattr(bench, "load_program", lambda _name: program)
    return program


@pytest.mark.parametrize("flag", ["--json", "--plot", "--markdown"])
def test_a_file_in_no_folder_is_refused_before_anything_is_measured(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    path = tmp_path / "gone" / "out"
    assert main(["bench", "store", flag, str(path)]) == 2
    assert f"{flag} {path}: there is no folder {path.parent}" in capsys.readouterr().err
    assert not program.ran


@pytest.mark.parametrize("flag", ["--json", "--plot", "--markdown"])
def test_a_folder_in_place_of_a_file_is_refused_before_anything_is_measured(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert main(["bench", "store", flag, str(tmp_path)]) == 2
    assert f"{flag} {tmp_path}: that is a folder" in capsys.readouterr().err
    assert not program.ran


def test_a_program_cleans_up_when_it_is_terminated(program: Program) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["bench", "store"]) == 130
    assert program.cleaned_up
    assert signal.getsignal(signal.SIGTERM) is before
