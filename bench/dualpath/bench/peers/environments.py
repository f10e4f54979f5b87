"""Installs each peer into an environment of its own, or says why it cannot be had.

Owns `DIR/<name>` (a virtual environment) and in it `installed`, which holds what was installed: an
environment of another list is made anew. Needs the package registries the first time only.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dualpath.bench.peers.catalogue import Environment
from dualpath.transfer.errors import Unavailable

_STAMP = "installed"
_TAIL_CHARS = 400


class Environments:
    """The environments in one folder."""

    def __init__(self, folder: Path, progress: Callable[[str], None]) -> None:
        self._folder = folder.absolute()
        self._progress = progress

    def python(self, environment: Environment, *, install: bool) -> Path:
        """Its interpreter. Raises Unavailable with the reason, also if it is not installed and
        `install` is False."""
        folder = self._folder / environment.name
        program = folder / "bin" / "python"
        stamp = folder / _STAMP
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == _stamp(environment):
            return program
        if not install:
            raise Unavailable(
                f"{folder} is not there or of another version; "
                "`make bench-peers` or --install makes it"
            )
        self._install(environment, folder, program)
        stamp.write_text(_stamp(environment), encoding="utf-8")
        return program

    def redis_server(self, environment: Environment) -> tuple[str, dict[str, str]]:
        """The program and the variables that it needs: the machine's own, or the unpacked one."""
        found = shutil.which("redis-server")
        if found is not None:
            return found, {}
        root = self._folder / environment.name / "debian" / "usr"
        program = root / "bin" / "redis-server"
        if not program.is_file() and (root / "bin" / "redis-check-rdb").is_file():
            # One binary with several names; the link belongs to a package that is not needed.
            program.symlink_to("redis-check-rdb")
        if not program.is_file():
            raise Unavailable("there is no redis-server (Debian: apt install redis-server)")
        libraries = [str(path) for path in (root / "lib").glob("*-linux-*")]
        return str(program), {"LD_LIBRARY_PATH": ":".join(libraries)}

    def _install(self, environment: Environment, folder: Path, program: Path) -> None:
        self._progress(f"installing {environment.name} into {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        until = time.monotonic() + environment.install_s_max
        _run([sys.executable, "-m", "venv", str(folder)], until)
        pip = [str(program), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        if environment.requirements:
            _run([*pip, *environment.requirements], until)
        if environment.alone:
            _run([*pip, "--no-deps", *environment.alone], until)
        if environment.debian and shutil.which("redis-server") is None:
            _unpack(environment.debian, folder / "debian", until)


def _stamp(environment: Environment) -> str:
    text = "\n".join([*environment.requirements, "-", *environment.alone, "-", *environment.debian])
    return hashlib.sha256(text.encode()).hexdigest() + "\n"


def _unpack(packages: Sequence[str], folder: Path, until: float) -> None:
    """Debian packages, without installing them on this machine."""
    if shutil.which("apt-get") is None:
        raise Unavailable("there is no redis-server and no apt-get to download it with")
    folder.mkdir()
    try:
        _run(["apt-get", "download", "-q", *packages], until, cwd=folder)
    except Unavailable:
        _run(["apt-get", "update", "-q"], until)
        _run(["apt-get", "download", "-q", *packages], until, cwd=folder)
    for package in folder.glob("*.deb"):
        _run(["dpkg-deb", "-x", str(package), str(folder)], until)
        package.unlink()


def _run(argv: Sequence[str], until: float, cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=max(1.0, until - time.monotonic()),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{' '.join(argv[:6])}: {error}") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-_TAIL_CHARS:]
        raise Unavailable(f"{' '.join(argv[:6])} ended with {done.returncode}: {said}")
