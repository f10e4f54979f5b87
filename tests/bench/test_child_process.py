"""Children of a demo: they announce themselves, are told apart when they fail, and always end."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dualpath.bench.testbed.process import ChildProcess
from dualpath.transfer.errors import DeadlineExceeded, Unavailable

READY = 'import sys; print(\'ready {"listen": "127.0.0.1:1"}\', flush=True); sys.stdin.read()'
FOREVER = "import signal; print('ready {}', flush=True); signal.pause()"
DEAF = "import signal; signal.signal(15, signal.SIG_IGN); " + FOREVER.split("; ", 1)[1]


async def start(code: str, tmp_path: Path) -> ChildProcess:
    return await ChildProcess.start("node", [sys.executable, "-c", code], tmp_path / "node.log")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_ready_line_is_parsed(tmp_path: Path) -> None:
    async def check() -> None:
        child = await start(READY, tmp_path)
        await child.wait_ready(20)
        assert child.address("listen") == "127.0.0.1:1"
        with pytest.raises(Unavailable, match="announced no `unix`"):
            child.address("unix")
        await child.close(20)

    asyncio.run(check())


def test_a_child_that_ends_early_is_reported_with_its_last_words(tmp_path: Path) -> None:
    async def check() -> None:
        child = await start("import sys; sys.exit('port 7070 is in use')", tmp_path)
        with pytest.raises(Unavailable, match=r"status 1(.|\n)*port 7070 is in use"):
            await child.wait_ready(20)
        await child.close(20)

    asyncio.run(check())


def test_a_child_that_says_something_else_is_reported(tmp_path: Path) -> None:
    async def check() -> None:
        child = await start("print('hello')", tmp_path)
        with pytest.raises(Unavailable, match="hello"):
            await child.wait_ready(20)
        await child.close(20)

    asyncio.run(check())


def test_a_child_that_says_nothing_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    async def check() -> None:
        child = await start("import signal; signal.pause()", tmp_path)
        with pytest.raises(DeadlineExceeded, match="not ready after"):
            await child.wait_ready(0.3)
        child.terminate()
        await child.close(20)

    asyncio.run(check())


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    async def check() -> None:
        with pytest.raises(Unavailable, match="/no/such/program"):
            await ChildProcess.start("node", ["/no/such/program"], tmp_path / "node.log")

    asyncio.run(check())


def test_a_child_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    async def check() -> None:
        child = await start(DEAF, tmp_path)
        await child.wait_ready(20)
        child.terminate()
        await child.close(0.2)
        assert not alive(child.pid)

    asyncio.run(check())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs parent death signals")
def test_a_child_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    owner = f"""
import asyncio, sys
from pathlib import Path
from dualpath.bench.testbed.process import ChildProcess
async def run():
    argv = [sys.executable, "-c", {FOREVER!r}]
    child = await ChildProcess.start("n", argv, Path({str(tmp_path / "n.log")!r}))
    await child.wait_ready(20)
    print(child.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(run())
"""
    with subprocess.Popen(
        [sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)
