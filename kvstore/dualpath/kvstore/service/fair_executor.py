"""Threads that principals share fairly: whoever floods them waits for himself.

Owns a fixed number of threads and a queue for each principal, served in turn. One principal never
has more than its share of the threads, so that calls that block for long (durable seals, a slow
medium) leave room for others. Queues are bounded by the calls that may be outstanding.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class FairExecutor(Executor):
    """See the module docstring. `whose()` names the principal that submits; at most `share` of
    the `threads` work for one."""

    def __init__(self, threads: int, share: int, whose: Callable[[], str], name: str) -> None:
        assert 0 < share <= threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = threads
        self._share = share
        self._whose = whose
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._queues: OrderedDict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = OrderedDict()
        self._running: Counter[str] = Counter()
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `fn` when its principal's turn comes."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new work after shutdown")
            queue = self._queues.setdefault(self._whose(), deque())
            queue.append((future, lambda: fn(*args, **kwargs)))
            self._dispatch()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take nothing more; what is queued still runs unless it is cancelled."""
        with self._idle:
            self._closed = True
            dropped = list(self._queues.values()) if cancel_futures else []
            if cancel_futures:
                self._queues.clear()
        for queue in dropped:
            for future, _ in queue:
                future.cancel()
        if wait:
            with self._idle:
                self._idle.wait_for(lambda: not self._queues and not self._running)
        self._pool.shutdown(wait=wait)

    def _dispatch(self) -> None:
        """Start what may run now. Needs the lock."""
        while self._free:
            name = next((name for name in self._queues if self._running[name] < self._share), None)
            if name is None:
                return
            queue = self._queues[name]
            job = queue.popleft()
            if queue:
                self._queues.move_to_end(name)  # the others first, next time
            else:
                del self._queues[name]
            self._free -= 1
            self._running[name] += 1
            self._pool.submit(self._work, name, *job)

    def _work(self, name: str, future: Future[Any], call: Callable[[], Any]) -> None:
        try:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001 - it is the submitter's
                    future.set_exception(error)
        finally:
            with self._lock:
                self._free += 1
                self._running[name] -= 1
                if not self._running[name]:
                    del self._running[name]
                self._dispatch()
                if not self._running:
                    self._idle.notify_all()
