"""An event loop whose clock moves only when it is told, so that a run is a list of decisions.

Owns virtual time. `settle` runs whatever is ready and nothing that time would bring; `advance`
lets time pass up to the next timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
EVENT_S = 20e-6
"""What happens takes a moment: nothing can go on for ever without coming closer to a deadline."""


class StageLoop(asyncio.SelectorEventLoop):
    """See the module docstring. Starts at 0 s."""

    # Of asyncio's own loops: nothing public tells whether they are at rest.
    _ready: Sequence[asyncio.Handle]
    _scheduled: Sequence[asyncio.TimerHandle]

    def __init__(self) -> None:
        self._now_s = 0.0
        self.raised: list[BaseException] = []
        """What callbacks and tasks raised and nobody caught."""
        self.on_thread: Callable[[Callable[[], None]], None] = _at_once
        """Decides when what goes to a thread is done."""
        super().__init__()
        self.set_exception_handler(self._note)

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def run_in_executor(
        self, executor: object, func: Callable[..., T], *args: object
    ) -> asyncio.Future[T]:
        """Work for a thread: an event like all others."""
        del executor
        done: asyncio.Future[T] = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 - whoever waits gets it
                if not done.cancelled():
                    done.set_exception(error)
            else:
                if not done.cancelled():
                    done.set_result(result)

        self.on_thread(work)
        return done

    def perform(self, event: Callable[[], None]) -> None:
        """Let something happen in the loop, a moment later, and all that follows at once."""
        self._now_s += EVENT_S
        self.call_soon(event)
        self.settle()

    def settle(self) -> None:
        """Run until nothing is ready any more."""
        while self._ready:
            self.call_soon(self.stop)
            self.run_forever()

    def next_timer_s(self) -> float | None:
        """When the next timer is due, None if there is none."""
        due = [timer.when() for timer in self._scheduled if not timer.cancelled()]
        return min(due, default=None)

    def advance(self) -> None:
        """Let time pass until the next timer, and run it."""
        due = self.next_timer_s()
        if due is not None:
            self._now_s = max(self._now_s, due - EVENT_S)
            self.perform(_nothing)

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        del loop
        error = context.get("exception")
        self.raised.append(
            error if isinstance(error, BaseException) else RuntimeError(str(context["message"]))
        )


def _at_once(work: Callable[[], None]) -> None:
    work()


def _nothing() -> None:
    """Only so that timers which are due get their turn."""
