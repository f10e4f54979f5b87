"""How many files and connections this process may have open.

Whoever connects takes a descriptor before he has said who he is, and the limit that shells and
containers begin with is soon taken. For the owner of a process only.
"""

from __future__ import annotations

import contextlib
import resource

DESCRIPTORS_MAX = 65536
"""As many as the units and the compose file ask for."""


def raise_descriptor_limit() -> int:
    """Allow as many as the hard limit does, DESCRIPTORS_MAX at most; more stay as they are.
    Returns the limit from now on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
