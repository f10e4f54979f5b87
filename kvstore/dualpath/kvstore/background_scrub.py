"""The thread that scrubs: at a bounded rate, at the lowest priority, from where the last one ended.

Owns the thread and the file SCRUB, which keeps the position roughly: it is written now and then,
and a missing or damaged one means to start over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dualpath.kvstore.directory_format import write_durably
from dualpath.kvstore.regular_file import read_regular
from dualpath.kvstore.scrub_pace import ScrubPace
from dualpath.kvstore.scrubber import Position, Scrubber
from dualpath.kvstore.store_api import ScrubStep, Tier
from dualpath.kvstore.store_state import StoreState
from dualpath.transfer.errors import Unavailable

SCRUB_NAME = "SCRUB"
_TICK_S = 0.25
_SAVED_S = 60.0
_IDLE_S = 60.0
"""Pause after a pass that found hardly anything to read."""
_LOWEST_PRIORITY = 19
_STEP_BYTES_MAX = 4 << 20
_log = logging.getLogger(__name__)


def start_scrub(
    state: StoreState, scrubber: Scrubber, step: Callable[[int], ScrubStep], path: Path
) -> BackgroundScrub | None:
    """Start scrubbing as configured; None if that is not at all. `step` is Store.scrub_step,
    `path` the data directory."""
    if not state.config.scrub_bytes_per_s:
        return None
    scrub = BackgroundScrub(state, scrubber, step, path / SCRUB_NAME)
    scrub.start()
    return scrub


class BackgroundScrub:
    """See the module docstring."""

    def __init__(
        self, state: StoreState, scrubber: Scrubber, step: Callable[[int], ScrubStep], path: Path
    ) -> None:
        self._state = state
        self._scrubber = scrubber
        self._step = step
        self._path = path
        self._pace = ScrubPace(state.config.scrub_bytes_per_s, time.monotonic())
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dualpath-scrub", daemon=True)
        scrubber.position = self._load()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, wait_s: float) -> None:
        """Stop after the block at hand, and keep the position. Idempotent."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._thread.join(wait_s)
            self._save()

    def _run(self) -> None:
        # On Linux a priority is a thread's own.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        saved = time.monotonic()
        pause_s = _TICK_S
        while not self._stopping.wait(pause_s):
            pause_s = _TICK_S
            now = time.monotonic()
            try:
                pause_s = self._tick(now)
            except Unavailable:
                return  # the store is closed
            except Exception:  # noqa: BLE001 - scrubbing must not end by one surprise
                _log.exception("scrubbing failed; it goes on in %.0f s", _IDLE_S)
                pause_s = _IDLE_S
            if now - saved > _SAVED_S:
                saved = now
                self._save()

    def _tick(self, now: float) -> float:
        """Scrub as much as the pace allows; how long to wait."""
        counters = self._state.counters
        others_bytes = counters.read_bytes[Tier.SSD] + counters.written_bytes[Tier.SSD]
        budget = self._pace.budget(now, others_bytes)
        while budget > 0 and not self._stopping.is_set():
            step = self._step(min(budget, _STEP_BYTES_MAX))
            self._pace.spend(step.read_bytes)
            budget -= step.read_bytes
            if step.finished:
                return _IDLE_S if step.read_bytes < _STEP_BYTES_MAX else _TICK_S
        return _TICK_S

    def _load(self) -> Position:
        try:
            found = json.loads(read_regular(self._path))
            return int(found["segment"]), int(found["slot"])
        except (OSError, ValueError, TypeError, KeyError):
            return 0, 0

    def _save(self) -> None:
        segment, slot = self._scrubber.position
        try:
            write_durably(self._path, json.dumps({"segment": segment, "slot": slot}).encode())
        except OSError as error:
            _log.info("the position of the scrub was not kept: %s", error)
