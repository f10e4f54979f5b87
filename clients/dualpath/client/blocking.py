"""`KVClient` for programs without an event loop.

Owns one thread with one loop, made on `connect` or `embedded` (after a fork, never before it), in
which everything happens; each method waits for it. Thread-safe. Deadlines are the client's own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Self, TypeVar

from dualpath.agent.config import AgentConfig
from dualpath.agent.outcome import LoadResult, LoadStarted, Lookup, SaveResult
from dualpath.agent.places import Places
from dualpath.client.kv_client import KVClient
from dualpath.client.load import Load
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.namespace import Namespace
from dualpath.proto.tls import NO_TLS, Tls
from dualpath.proto.v1 import agent_pb2
from dualpath.transfer.errors import Unavailable

T = TypeVar("T")

JOIN_S_MAX = 10.0


class _LoopThread:
    """A thread that runs an event loop until `stop`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="dualpath client", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run in the loop and wait for the end."""
        if not self._thread.is_alive():
            work.close()
            raise Unavailable("the client is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop(self) -> None:
        """End the loop and its thread. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(JOIN_S_MAX)


class BlockingLoad:
    """A load; see `dualpath.client.load.Load`."""

    def __init__(self, load: Load, thread: _LoopThread) -> None:
        self._load = load
        self._thread = thread
        self.load_id = load.load_id

    def started(self) -> LoadStarted:
        """What the lookup found."""
        return self._thread.wait(self._load.started())

    def wait_layer(self, layer: int) -> int:
        """Wait until layers [0, layer] are verified; for how many leading blocks."""
        return self._thread.wait(self._load.wait_layer(layer))

    def result(self) -> LoadResult:
        """Wait for the end."""
        return self._thread.wait(self._load.result())

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return self._load.done

    def abort(self) -> None:
        """Give it up; afterwards nothing more is written into the memory."""
        self._thread.wait(self._load.abort())


class BlockingKVClient:
    """The methods of `KVClient`, blocking. A context manager that closes it."""

    def __init__(self, client: KVClient, thread: _LoopThread) -> None:
        self._client = client
        self._thread = thread

    @classmethod
    def connect(cls, agent: str, *, token: str = "", tls: Tls = NO_TLS) -> BlockingKVClient:
        """See KVClient.connect."""
        return cls._made(KVClient.connect(agent, token=token, tls=tls))

    @classmethod
    def embedded(cls, config: AgentConfig) -> BlockingKVClient:
        """See KVClient.embedded."""
        return cls._made(KVClient.embedded(config))

    @classmethod
    def _made(cls, making: Coroutine[Any, Any, KVClient]) -> BlockingKVClient:
        thread = _LoopThread()
        try:
            return cls(thread.wait(making), thread)
        except BaseException:
            thread.stop()
            raise

    def open_namespace(self, namespace: Namespace) -> bytes:
        """See KVClient.open_namespace."""
        return self._thread.wait(self._client.open_namespace(namespace))

    def allocate(self, nbytes: int, *, behind_compute_link: bool = False) -> EngineMemory:
        """See KVClient.allocate."""
        memory = self._thread.wait(
            self._client.allocate(nbytes, behind_compute_link=behind_compute_link)
        )
        memory.close_in(self._thread.wait)
        return memory

    def lookup(self, namespace_id: bytes, hashes: Sequence[bytes]) -> Lookup:
        """See KVClient.lookup."""
        return self._thread.wait(self._client.lookup(namespace_id, hashes))

    def load(
        self,
        namespace_id: bytes,
        hashes: Sequence[bytes],
        memory: EngineMemory,
        places: Places,
        *,
        deadline_s: float,
        policy: str = "",
        decode_peer: str = "",
        paths: Sequence[str] = (),
        load_id: str = "",
    ) -> BlockingLoad:
        """See KVClient.load. Returns at once; wait on what it returns."""
        load = self._thread.wait(
            self._client.load(
                namespace_id,
                hashes,
                memory,
                places,
                deadline_s=deadline_s,
                policy=policy,
                decode_peer=decode_peer,
                paths=paths,
                load_id=load_id,
            )
        )
        return BlockingLoad(load, self._thread)

    def save(
        self,
        namespace_id: bytes,
        hashes: Sequence[bytes],
        parents: Sequence[bytes],
        memory: EngineMemory,
        places: Places,
        *,
        durable: bool = True,
        deadline_s: float,
    ) -> SaveResult:
        """See KVClient.save."""
        return self._thread.wait(
            self._client.save(
                namespace_id,
                hashes,
                parents,
                memory,
                places,
                durable=durable,
                deadline_s=deadline_s,
            )
        )

    def stats(self) -> agent_pb2.AgentStatsResponse:
        """See KVClient.stats."""
        return self._thread.wait(self._client.stats())

    def close(self) -> None:
        """See KVClient.close. Idempotent."""
        try:
            self._thread.wait(self._client.close())
        except Unavailable:
            return
        finally:
            self._thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
