"""LMCache's storage backends: local CPU memory, its server (lm://), local disk with O_DIRECT.

A put copies from the caller into LMCache's memory and hands that over; a get copies from what the
backend gives into the caller's memory. settings: mode ("cpu", "server", "disk"), folder,
capacity_bytes, bin (of its environment).
"""

from __future__ import annotations

import asyncio
import threading
import time
from importlib.metadata import version
from typing import Any

import torch
from children import Children, free_port
from harness import PIECE_BYTES, serve
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend
from lmcache.v1.storage_backend.remote_backend import RemoteBackend

GIB = 1 << 30
STORE_S_MAX = 120.0
SPARE_BYTES = 512 << 20
_LAYERS, _TOKENS, _WORD_BYTES = 8, 16, 2


class Driver:
    """See harness."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.version = "LMCache " + version("lmcache")
        self._settings = settings
        self._mode = settings["mode"]
        self._children = Children(settings["folder"])
        self.server_pids: list[int] = []
        self.source: Any = None
        self.target: Any = None

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        own = self._settings["capacity_bytes"] if self._mode == "cpu" else 2 * PIECE_BYTES
        chosen: dict[str, Any] = {}
        if self._mode == "disk":
            chosen = {
                "local_disk": self._settings["folder"] + "/blocks",
                "max_local_disk_size": (self._settings["capacity_bytes"] + SPARE_BYTES) / GIB,
                "extra_config": {"use_odirect": True},
            }
        elif self._mode == "server":
            port = free_port()
            program = f"{self._settings['bin']}/lmcache_server"
            self._children.start("server", [program, "127.0.0.1", str(port), "cpu"])
            self._children.wait_port(port)
            chosen = {"remote_url": f"lm://127.0.0.1:{port}", "remote_serde": "naive"}
        self.server_pids = self._children.pids
        self._config = LMCacheEngineConfig.from_defaults(
            chunk_size=_TOKENS,
            local_cpu=self._mode == "cpu",
            max_local_cpu_size=(own + SPARE_BYTES) / GIB,
            save_unfull_chunk=True,
            **chosen,
        )

    def open(self, block_bytes: int, pieces: int, piece_blocks: int) -> None:
        hidden = block_bytes // (2 * _LAYERS * _TOKENS * _WORD_BYTES)
        self._shape = torch.Size([2, _LAYERS, _TOKENS, hidden])
        metadata = LMCacheMetadata(
            model_name="bench",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(_LAYERS, 2, _TOKENS, 1, hidden),
            chunk_size=_TOKENS,
        )
        self._memory = LocalCPUBackend(self._config, metadata, dst_device="cpu")
        self._backend = self._memory
        if self._mode == "disk":
            self._backend = LocalDiskBackend(self._config, self._loop, self._memory, "cpu")
        elif self._mode == "server":
            self._backend = RemoteBackend(
                self._config, metadata, self._loop, self._memory, dst_device="cpu"
            )

    def _key(self, key: str) -> Any:
        return CacheEngineKey("bench", 1, 0, int(key[:16], 16), torch.bfloat16)

    def put(self, keys: list[str], blocks: list[memoryview]) -> None:
        names = [self._key(key) for key in keys]
        objects = []
        for block in blocks:
            held = self._memory.allocate(self._shape, torch.bfloat16, MemoryFormat.KV_2LTD)
            if held is None:
                raise RuntimeError("LMCache has no memory left")
            memoryview(held.byte_array).cast("B")[:] = block
            objects.append(held)
        stored = threading.Semaphore(0)
        self._backend.batched_submit_put_task(
            names, objects, on_complete_callback=lambda _key: stored.release()
        )
        for held in objects:
            held.ref_count_down()
        until = time.monotonic() + STORE_S_MAX
        for _ in names:
            if not stored.acquire(timeout=max(0.0, until - time.monotonic())):
                raise RuntimeError(f"LMCache did not store within {STORE_S_MAX:g} s")

    def get(self, keys: list[str], places: list[memoryview]) -> None:
        names = [self._key(key) for key in keys]
        for place, held in zip(places, self._backend.batched_get_blocking(names), strict=True):
            if held is None:
                raise RuntimeError("LMCache misses a block that was put")
            place[:] = memoryview(held.byte_array).cast("B")
            held.ref_count_down()

    def forget(self, keys: list[str]) -> None:
        if self._mode == "server":
            return  # its protocol removes nothing: the second put replaces the first
        for key in keys:
            self._backend.remove(self._key(key))

    def settle(self) -> None:
        """Each put has waited; nothing is durable."""

    def chill(self) -> None:
        """O_DIRECT: nothing is in the page cache."""

    def close(self) -> None:
        self._children.stop()


if __name__ == "__main__":
    serve(Driver)
