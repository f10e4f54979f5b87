"""The transport port's contract as checks that any implementation can run against itself.

`check_transport(make_pair)` runs all of `CHECKS`, each on a fresh pair; a test suite may run
them one by one by name. A check raises AssertionError, naming what was heard instead. Nothing
here depends on time, except that a wait over 20 seconds fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dualpath.transfer import conformance_batches, conformance_peers, conformance_windows
from dualpath.transfer.conformance_scene import MakePair, TransportPair

__all__ = ["CHECKS", "Check", "MakePair", "TransportPair", "check_transport"]

Check = Callable[[MakePair], None]

CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        *conformance_windows.CHECKS,
        *conformance_batches.CHECKS,
        *conformance_peers.CHECKS,
    )
}
"""By name, which is a sentence."""


def check_transport(make_pair: MakePair) -> None:
    """Run every check; the first that fails is named in its AssertionError."""
    for name, check in CHECKS.items():
        try:
            check(make_pair)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
