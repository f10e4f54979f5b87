"""NIXL: one file through its POSIX plug-in, another process's memory through UCX.

NIXL moves bytes and has no keys: block i of a size lies at place i, which flatters it, as it finds
nothing. settings: mode ("uring", "aio", "tcp", "shm"), folder, capacity_bytes.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

from harness import buffer, serve
from nixl_cu12._api import nixl_agent, nixl_agent_config

TRANSFER_S_MAX = 120.0
_UCX = {"ucx_error_handling_mode": "none"}  # without it UCX leaves shared memory out
_TLS = {"tcp": "tcp,self", "shm": "shm,self"}


def ucx_agent(name: str) -> Any:
    """An agent with the UCX backend."""
    agent = nixl_agent(name, nixl_agent_config(backends=[]))
    agent.create_backend("UCX", _UCX)
    return agent


def transfer(agent: Any, handle: Any) -> None:
    """Run a prepared transfer to its end. Raises RuntimeError."""
    deadline = time.monotonic() + TRANSFER_S_MAX
    state = agent.transfer(handle)
    while state == "PROC":
        if time.monotonic() > deadline:
            raise RuntimeError(f"a transfer did not end in {TRANSFER_S_MAX:g} s")
        state = agent.check_xfer_state(handle)
    agent.release_xfer_handle(handle)
    if state != "DONE":
        raise RuntimeError(f"a transfer ended with {state}")


class Driver:
    """See harness."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.version = "NIXL " + version("nixl-cu12")
        self._settings = settings
        self._mode = settings["mode"]
        self._disk = self._mode in ("uring", "aio")
        self._remote: subprocess.Popen[str] | None = None
        self.server_pids: list[int] = []
        self.source: Any = None
        self.target: Any = None

    def start(self) -> None:
        capacity = self._settings["capacity_bytes"]
        if self._disk:
            self._agent = nixl_agent("bench", nixl_agent_config(backends=[]))
            self._agent.create_backend(
                "POSIX",
                {
                    "use_uring": "true" if self._mode == "uring" else "false",
                    "use_aio": "true" if self._mode == "aio" else "false",
                },
            )
            path = os.path.join(self._settings["folder"], "blocks")
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
            os.posix_fallocate(self._file, 0, capacity)
            self._agent.register_memory([(0, capacity, self._file, "blocks")], "FILE")
        else:
            os.environ["UCX_TLS"] = _TLS[self._mode]
            self._agent = ucx_agent("bench")
            self._start_remote(capacity)
        for array in (self.source, self.target):
            self._agent.register_memory([(array.ctypes.data, array.nbytes, 0, "")], "DRAM")

    def _start_remote(self, capacity: int) -> None:
        log = open(os.path.join(self._settings["folder"], "remote.log"), "w")  # noqa: SIM115
        self._remote = subprocess.Popen(
            [sys.executable, __file__, "remote", str(capacity)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self.server_pids = [self._remote.pid]
        assert self._remote.stdout is not None
        assert self._remote.stdin is not None
        address, metadata = self._told(self._remote.stdout)
        self._base = int(address)
        self._peer = self._agent.add_remote_agent(base64.b64decode(metadata))
        # The other side progresses only in its own calls; it is told of us so that both connect.
        mine = base64.b64encode(self._agent.get_agent_metadata()).decode()
        self._remote.stdin.write(mine + "\n")
        self._remote.stdin.flush()
        self._agent.make_connection(self._peer)

    @staticmethod
    def _told(lines: Any) -> list[str]:
        for line in lines:
            words: list[str] = line.split()
            if words and words[0] == "ready":
                return words[1:]
        raise RuntimeError("the remote agent ended before it was ready")

    def open(self, block_bytes: int, pieces: int, piece_blocks: int) -> None:
        self._nbytes = block_bytes

    def _move(self, way: str, array: Any, keys: list[str]) -> None:
        nbytes, mine = self._nbytes, array.ctypes.data
        places = [int(key[8:16], 16) * nbytes for key in keys]
        local = [(mine + index * nbytes, nbytes, 0) for index in range(len(keys))]
        if self._disk:
            remote = [(place, nbytes, self._file) for place in places]
            peer, kind = "bench", "FILE"
        else:
            remote = [(self._base + place, nbytes, 0) for place in places]
            peer, kind = self._peer, "DRAM"
        agent = self._agent
        handle = agent.initialize_xfer(
            way, agent.get_xfer_descs(local, "DRAM"), agent.get_xfer_descs(remote, kind), peer
        )
        transfer(agent, handle)

    def put(self, keys: list[str], blocks: list[memoryview]) -> None:
        self._move("WRITE", self.source, keys)

    def get(self, keys: list[str], places: list[memoryview]) -> None:
        self._move("READ", self.target, keys)

    def forget(self, keys: list[str]) -> None:
        """Places are written again."""

    def settle(self) -> None:
        """Not durable: it never syncs."""

    def chill(self) -> None:
        """O_DIRECT: nothing is in the page cache."""

    def close(self) -> None:
        if self._remote is not None:
            self._remote.kill()
            self._remote.wait()


def remote(capacity: int) -> None:
    """The other process: memory that is read and written by UCX."""
    memory = buffer(capacity)
    agent = ucx_agent("remote")
    agent.register_memory([(memory.ctypes.data, capacity, 0, "")], "DRAM")
    metadata = base64.b64encode(agent.get_agent_metadata()).decode()
    print(f"\nready {memory.ctypes.data} {metadata}", flush=True)
    agent.add_remote_agent(base64.b64decode(sys.stdin.readline()))
    sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1:2] == ["remote"]:
        remote(int(sys.argv[2]))
    else:
        serve(Driver)
