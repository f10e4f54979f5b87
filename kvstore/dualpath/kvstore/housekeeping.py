"""What is done about once a second, whatever else happens: blocks expire, retentions end.

Called on the committer's thread between groups. Takes the store's lock for a slice at a time; the
list of retained prefixes is written without it.
"""

from __future__ import annotations

from dualpath.kvstore.store_state import StoreState

PERIOD_S = 1.0
_SLICES_MAX = 64
"""Most slices of one call: the rest follows at the next one."""


class Housekeeping:
    """See the module docstring."""

    def __init__(self, state: StoreState) -> None:
        self._state = state
        self._due_at = -float("inf")

    def run(self) -> None:
        """Do what is due."""
        state = self._state
        if state.clock() < self._due_at:
            return
        for _ in range(_SLICES_MAX):
            with state.lock:
                more = state.expiry.sweep()
                if more:
                    state.room.notify_all()
            if not more:
                self._due_at = state.clock() + PERIOD_S
                break
        with state.lock:
            state.retention.expire()
            changed = state.retention.take_changes()
        if changed is not None:
            state.retention.save(changed)
