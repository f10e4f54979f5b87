"""Which way to libibverbs: our own native calls, or pyverbs where those were not built."""

from __future__ import annotations

from collections.abc import Callable

from dualpath.transfer.errors import InvalidRequest, Unavailable
from dualpath.transfer.rdma.native_device import NativeVerbs
from dualpath.transfer.rdma.pyverbs_device import PyverbsVerbs
from dualpath.transfer.rdma.verbs import Verbs

LIBRARIES = ("auto", "native", "pyverbs")
"""`auto`: native, else pyverbs."""


def open_verbs(library: str = "auto") -> Verbs:
    """The library, by the way that is named. Raises Unavailable (`no_rdma`), saying why each way
    that was tried failed."""
    ways: dict[str, Callable[[], Verbs]] = {"native": NativeVerbs, "pyverbs": PyverbsVerbs}
    if library not in LIBRARIES:
        raise InvalidRequest(f"an RDMA library is one of {', '.join(LIBRARIES)}, not {library!r}")
    if library != "auto":
        return ways[library]()
    try:
        return NativeVerbs()
    except Unavailable as native:
        try:
            return PyverbsVerbs()
        except Unavailable as other:
            raise Unavailable(
                f"{str(native).partition(';')[0]}; {other}", reason=native.reason
            ) from native
