"""One hand-off as its prefill engine sees it: layers done, the result, abort.

Owns the task that waits for the agent and nothing else; the agent owns the hand-off. Every wait
ends at the deadline at the latest. What fails is a reason in the result; only the caller's own
mistakes (InvalidRequest) are raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from dualpath.agent.hand_off_spec import HandOffResult, HandOffSpec, LayerGate


class HandOff:
    """A running or finished hand-off. All methods belong to the loop."""

    def __init__(
        self,
        spec: HandOffSpec,
        run: Callable[[HandOffSpec, LayerGate], Awaitable[HandOffResult]],
        on_end: Callable[[HandOff], None] | None = None,
    ) -> None:
        """`on_end` is called in the loop once it is `done`."""
        self.request = spec.request
        self._gate = LayerGate()
        self._task = asyncio.create_task(self._run(run, spec), name=f"hand-off {spec.request}")
        if on_end is not None:
            self._task.add_done_callback(lambda _: on_end(self))

    async def _run(
        self, run: Callable[[HandOffSpec, LayerGate], Awaitable[HandOffResult]], spec: HandOffSpec
    ) -> HandOffResult:
        return await run(spec, self._gate)

    def layer_done(self, layer: int) -> None:
        """Layers [0, layer] of all blocks are final in memory. Does not wait. Raises
        InvalidRequest for a negative number."""
        self._gate.done(layer)

    async def result(self) -> HandOffResult:
        """Wait for the end; nothing reads the memory afterwards. Raises InvalidRequest."""
        return await asyncio.shield(self._task)

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return self._task.done()

    @property
    def outcome(self) -> HandOffResult | BaseException | None:
        """The result, or what `result` raises; None until it is `done`."""
        if not self._task.done():
            return None
        if self._task.cancelled():
            return asyncio.CancelledError()
        return self._task.exception() or self._task.result()

    async def abort(self) -> None:
        """Give it up; when this returns, nothing reads the memory any more."""
        self._gate.abort()
        await asyncio.wait((self._task,))
