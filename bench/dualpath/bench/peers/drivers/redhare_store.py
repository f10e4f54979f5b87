"""redhare: in process, and over TCP from the DRAM of a cache node in another process.

settings: mode ("local", "tcp"), folder, capacity_bytes, bin (of its environment), server (program
of redis-server, for its metadata), environment.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from children import Children, free_port
from harness import PIECE_BYTES, serve
from redhare import KvStore

SPARE_BYTES = 512 << 20
OWN_BYTES = 8 << 20
"""Local memory of a client whose blocks shall lie at the cache node."""


class Driver:
    """See harness."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.version = "redhare " + version("redhare")
        self._settings = settings
        self._remote = settings["mode"] == "tcp"
        self._children = Children(settings["folder"])
        self._opened = 0
        self._store: Any = None
        self.server_pids: list[int] = []
        self.source: Any = None
        self.target: Any = None

    def start(self) -> None:
        port = free_port()
        self._redis = f"redis://127.0.0.1:{port}"
        self._children.start(
            "redis",
            [
                self._settings["server"],
                *("--port", str(port), "--bind", "127.0.0.1", "--save", ""),
            ],
            **self._settings["environment"],
        )
        self._children.wait_port(port)
        if self._remote:
            control = free_port()
            self._children.start(
                "cache-node",
                [
                    f"{self._settings['bin']}/redhare-client",
                    *("--client-id", "node", "--redis", self._redis, "--cluster", "bench"),
                    *("--capacity", str(self._settings["capacity_bytes"] + SPARE_BYTES)),
                    *("--cache-node-rpc-addr", f"127.0.0.1:{control}"),
                    *("--data-plane-addr", "127.0.0.1:0", "--transport", "tcp"),
                    *(
                        "--uds-path",
                        f"{self._settings['folder']}/redhare.sock",
                        "--metrics-addr",
                        "",
                    ),
                ],
            )
            self._children.wait_port(control)
        self.server_pids = self._children.pids
        own_bytes = OWN_BYTES if self._remote else self._settings["capacity_bytes"] + SPARE_BYTES
        self._store = KvStore(
            redis_url=self._redis,
            client_id="bench",
            data_plane_addr="127.0.0.1:0",
            capacity=own_bytes,
            cluster="bench",
            transport="tcp",
            enable_remote_dram=self._remote,
        )
        for array in (self.source, self.target):
            self._store.register_buffer(array.ctypes.data, array.nbytes)

    def open(self, block_bytes: int, pieces: int, piece_blocks: int) -> None:
        self._nbytes = block_bytes

    def _extents(self, base: int, count: int) -> tuple[list[list[int]], list[list[int]]]:
        addresses = [[base + index * self._nbytes] for index in range(count)]
        return addresses, [[self._nbytes]] * count

    def put(self, keys: list[str], blocks: list[memoryview]) -> None:
        extents = self._extents(self.source.ctypes.data, len(keys))
        self._check("put", self._store.batch_put_from_multi_buffers(keys, *extents))

    def get(self, keys: list[str], places: list[memoryview]) -> None:
        extents = self._extents(self.target.ctypes.data, len(keys))
        self._check("get", self._store.batch_get_into_multi_buffers(keys, *extents))

    @staticmethod
    def _check(what: str, statuses: list[int]) -> None:
        failed = sum(1 for status in statuses if status < 0)
        if failed:
            raise RuntimeError(f"{what} of {failed} of {len(statuses)} blocks failed")

    def forget(self, keys: list[str]) -> None:
        for key in keys:
            self._store.remove(key)

    def settle(self) -> None:
        """Everything is in DRAM."""

    def chill(self) -> None:
        """Nothing is on disk."""

    def close(self) -> None:
        self._store.close()
        self._children.stop()


if __name__ == "__main__":
    assert OWN_BYTES < PIECE_BYTES
    serve(Driver)
