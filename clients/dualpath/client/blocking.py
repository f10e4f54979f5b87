"""`KVClient` for programs without an event loop.

Owns one thread with one loop, made on `connect` or `embedded` (after a fork, never before it), in
which everything happens; each method waits for it. Thread-safe. Deadlines are the client's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Self, TypeVar

from dualpath.agent.config import AgentConfig
from dualpath.agent.hand_off_spec import HandOffResult, HandOffSpec
from dualpath.agent.load_spec import LoadSpec
from dualpath.agent.outcome import LoadResult, LoadStarted, Lookup, SaveResult
from dualpath.agent.places import Places
from dualpath.client.hand_off import HandOff
from dualpath.client.kv_client import KVClient, hand_off_spec, load_spec, receive_spec
from dualpath.client.load import Load
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.namespace import Namespace
from dualpath.proto.tls import NO_TLS, Tls
from dualpath.proto.v1 import agent_pb2
from dualpath.transfer.errors import InvalidRequest, Unavailable

T = TypeVar("T")

CLOSED = "the client is closed"
JOIN_S_MAX = 10.0
ALIVE_S = 1.0
"""How often a wait for a load looks whether there is still a loop that can end it."""


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
        try:
            self.check()
        except Unavailable:
            work.close()
            raise
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def call(self, work: Callable[[], None]) -> None:
        """Run in the loop, after all that was asked for before; do not wait."""
        self.check()
        with contextlib.suppress(RuntimeError):  # it has closed: `check` says so from now on
            self._loop.call_soon_threadsafe(work)

    def check(self) -> None:
        """Raise Unavailable once it has ended."""
        if not self.alive:
            raise Unavailable(CLOSED)

    @property
    def alive(self) -> bool:
        """Whether it still runs what it is given."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the loop and its thread. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(JOIN_S_MAX)


BeginLoad = Callable[[LoadSpec, Callable[[Load], None]], Load]


class BlockingLoad:
    """A load; see `dualpath.client.load.Load`. It begins without a wait for the loop, and whoever
    waits for its end is woken by that alone: each turn of the loop takes time from the load."""

    def __init__(self, begin: BeginLoad, spec: LoadSpec, thread: _LoopThread) -> None:
        self.load_id = spec.load_id
        self._thread = thread
        self._load: Load | None = None
        self._ended: Future[LoadResult] = Future()
        thread.call(partial(self._begin, begin, spec))

    def started(self) -> LoadStarted:
        """What the lookup found."""
        return self._thread.wait(self._started())

    def wait_layer(self, layer: int) -> int:
        """Wait until layers [0, layer] are verified; for how many leading blocks."""
        return self._thread.wait(self._wait_layer(layer))

    def result(self) -> LoadResult:
        """Wait for the end."""
        while True:
            try:
                return self._ended.result(ALIVE_S)
            except TimeoutError:
                closed = not self._thread.alive  # first: then nothing ends it any more
                if self._ended.done():
                    return self._ended.result()
                if closed:
                    raise Unavailable(CLOSED) from None

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return self._ended.done()

    def abort(self) -> None:
        """Give it up; afterwards nothing more is written into the memory."""
        self._thread.wait(self._abort())

    # In the loop, where whatever comes later finds the load begun.

    def _begin(self, begin: BeginLoad, spec: LoadSpec) -> None:
        try:
            self._load = begin(spec, self._end)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self._ended.set_exception(error)

    def _end(self, load: Load) -> None:
        outcome = load.outcome
        if isinstance(outcome, LoadResult):
            self._ended.set_result(outcome)
        else:
            self._ended.set_exception(outcome)

    async def _started(self) -> LoadStarted:
        return await self._begun().started()

    async def _wait_layer(self, layer: int) -> int:
        return await self._begun().wait_layer(layer)

    async def _abort(self) -> None:
        await self._begun().abort()

    def _begun(self) -> Load:
        if self._load is None:
            self._ended.result(0)  # raises why not
        assert self._load is not None
        return self._load


class BlockingHandOff:
    """A hand-off; see `dualpath.client.hand_off.HandOff`. `layer_done` does not wait."""

    def __init__(self, client: KVClient, spec: HandOffSpec, thread: _LoopThread) -> None:
        self.request = spec.request
        self._thread = thread
        self._hand_off = thread.wait(self._begin(client, spec))

    def layer_done(self, layer: int) -> None:
        """Layers [0, layer] of all blocks are final in memory."""
        if layer < 0:
            raise InvalidRequest(f"a layer has a number from 0 on, not {layer}")
        self._thread.call(partial(self._hand_off.layer_done, layer))

    def result(self) -> HandOffResult:
        """Wait for the end."""
        return self._thread.wait(self._hand_off.result())

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return self._hand_off.done

    def abort(self) -> None:
        """Give it up; afterwards nothing reads the memory any more."""
        self._thread.wait(self._hand_off.abort())

    async def _begin(self, client: KVClient, spec: HandOffSpec) -> HandOff:
        return client.begin_hand_off(spec)


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
        request: str = "",
        recompute_tokens_per_s: float = 0.0,
        direct_share: float | None = None,
    ) -> BlockingLoad:
        """See KVClient.load. Returns at once; wait on what it returns."""
        spec = load_spec(
            namespace_id,
            hashes,
            memory,
            places,
            deadline_s=deadline_s,
            policy=policy,
            decode_peer=decode_peer,
            paths=paths,
            load_id=load_id,
            request=request,
            recompute_tokens_per_s=recompute_tokens_per_s,
            direct_share=direct_share,
        )
        return BlockingLoad(self._client.begin, spec, self._thread)

    def hand_off(
        self,
        request: str,
        decode_peer: str,
        namespace_id: bytes,
        hashes: Sequence[bytes],
        memory: EngineMemory,
        places: Places,
        *,
        deadline_s: float,
    ) -> BlockingHandOff:
        """See KVClient.hand_off. Returns at once; wait on what it returns."""
        spec = hand_off_spec(
            request, decode_peer, namespace_id, hashes, memory, places, deadline_s=deadline_s
        )
        return BlockingHandOff(self._client, spec, self._thread)

    def receive(
        self,
        request: str,
        namespace_id: bytes,
        hashes: Sequence[bytes],
        memory: EngineMemory,
        places: Places,
        *,
        deadline_s: float,
    ) -> BlockingLoad:
        """See KVClient.receive. Returns at once; wait on what it returns."""
        spec = receive_spec(request, namespace_id, hashes, memory, places, deadline_s=deadline_s)
        return BlockingLoad(self._client.begin_receive, spec, self._thread)

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
