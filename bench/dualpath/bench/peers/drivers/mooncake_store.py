"""Mooncake Store: over TCP from another process, through its shared-memory client, in process.

settings: mode ("tcp", "shm", "local"), folder, capacity_bytes, bin (of its environment).
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from typing import Any

import numpy as np
from children import Children, free_port
from harness import PIECE_BYTES, serve
from mooncake.store import MooncakeDistributedStore

SPARE_BYTES = 512 << 20
BUFFER_BYTES = 256 << 20
LEASE_MS = 5000


class Driver:
    """See harness."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.version = "Mooncake " + version("mooncake-transfer-engine-non-cuda")
        self._settings = settings
        self._mode = settings["mode"]
        self._segment_bytes = settings["capacity_bytes"] + SPARE_BYTES
        self._children = Children(settings["folder"])
        self._store = MooncakeDistributedStore()
        self.server_pids: list[int] = []
        self.source: Any = None
        self.target: Any = None

    def start(self) -> None:
        port, programs = free_port(), self._settings["bin"]
        self._children.start(
            "master",
            [
                f"{programs}/mooncake_master",
                f"--rpc_port={port}",
                f"--metrics_port={free_port()}",
                f"--default_kv_lease_ttl={LEASE_MS}",
            ],
        )
        self._children.wait_port(port)
        master = f"127.0.0.1:{port}"
        if self._mode == "shm":
            self._start_shared(master)
        else:
            if self._mode == "tcp":
                self._start_remote(master)
            own_bytes = 0 if self._mode == "tcp" else self._segment_bytes
            self._checked(
                "setup",
                self._store.setup(
                    "127.0.0.1", "P2PHANDSHAKE", own_bytes, BUFFER_BYTES, "tcp", "", master
                ),
            )
        self.server_pids = self._children.pids
        if self._mode == "shm":
            # Its shared-memory client moves only bytes that lie in its own pool.
            self.source, self.target = self._pooled(), self._pooled()
        for array in (self.source, self.target):
            self._checked(
                "register_buffer", self._store.register_buffer(array.ctypes.data, array.nbytes)
            )

    def _pooled(self) -> Any:
        address = self._store.alloc_from_mem_pool(PIECE_BYTES)
        if not address:
            raise RuntimeError("alloc_from_mem_pool gave nothing")
        array = np.ctypeslib.as_array((ctypes.c_uint8 * PIECE_BYTES).from_address(address))
        array[:] = 0
        return array

    def _client(self, master: str, port: int) -> None:
        self._children.start(
            "client",
            [
                f"{self._settings['bin']}/mooncake_client",
                "--host=127.0.0.1",
                f"--port={port}",
                "--protocol=tcp",
                f"--global_segment_size={self._segment_bytes}",
                "--metadata_server=P2PHANDSHAKE",
                f"--master_server_address={master}",
            ],
        )
        self._children.wait_port(port)

    def _start_remote(self, master: str) -> None:
        self._client(master, free_port())

    def _start_shared(self, master: str) -> None:
        port = free_port()
        self._client(master, port)
        self._checked(
            "setup_dummy",
            self._store.setup_dummy(BUFFER_BYTES, BUFFER_BYTES, f"127.0.0.1:{port}"),
        )

    @staticmethod
    def _checked(what: str, status: int) -> None:
        if status:
            raise RuntimeError(f"{what} answered {status}")

    def open(self, block_bytes: int, pieces: int, piece_blocks: int) -> None:
        """There is room for the blocks of every size: what was read lately cannot be removed."""

    def put(self, keys: list[str], blocks: list[memoryview]) -> None:
        nbytes = blocks[0].nbytes
        base = self.source.ctypes.data
        places = [base + index * nbytes for index in range(len(keys))]
        statuses = self._store.batch_put_from(keys, places, [nbytes] * len(keys))
        if any(statuses):
            raise RuntimeError(f"batch_put_from answered {sorted(set(statuses))}")

    def get(self, keys: list[str], places: list[memoryview]) -> None:
        nbytes = places[0].nbytes
        base = self.target.ctypes.data
        pointers = [base + index * nbytes for index in range(len(keys))]
        statuses = self._store.batch_get_into(keys, pointers, [nbytes] * len(keys))
        if any(status != nbytes for status in statuses):
            raise RuntimeError(f"batch_get_into answered {sorted(set(statuses))}")

    def forget(self, keys: list[str]) -> None:
        statuses = self._store.batch_remove(keys)
        if any(statuses):
            raise RuntimeError(f"batch_remove answered {sorted(set(statuses))}")

    def chill(self) -> None:
        """Nothing is on disk."""

    def settle(self) -> None:
        """Everything is in DRAM."""

    def close(self) -> None:
        self._store.close()
        self._children.stop()


if __name__ == "__main__":
    serve(Driver)
