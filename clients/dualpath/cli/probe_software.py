"""Python, the packages that must be there, and the extras."""

from __future__ import annotations

import importlib
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from dualpath.cli.finding import Finding, Status

_PYTHON_MIN = (3, 11)
# Import names where they differ from the distribution's.
_MODULES = {
    "grpcio": "grpc",
    "grpcio-health-checking": "grpc_health",
    "grpcio-reflection": "grpc_reflection",
    "prometheus-client": "prometheus_client",
    "protobuf": "google.protobuf",
}
_EXTRAS = {
    "bench": (("matplotlib", "rich"), "no picture and no live progress in `dualpath demo`"),
    "model": (
        ("torch", "transformers"),
        "`dualpath demo-model` is skipped (`make demo-model` installs it)",
    ),
    "cuda": (("cupy",), "nothing in this version, which loads into host memory"),
    "rdma": (
        ("pyverbs",),
        "`compute-transport = rdma` where the native part was not built; nothing elsewhere",
    ),
}


def software_findings() -> list[Finding]:
    """Python, required packages, extras."""
    return [_python(), _packages(), *(_extra(name) for name in _EXTRAS), _blake3()]


def _python() -> Finding:
    detail = f"{platform.python_implementation()} {platform.python_version()}"
    recent = sys.version_info >= _PYTHON_MIN
    return Finding(
        name="Python",
        status=Status.OK if recent else Status.ABSENT,
        detail=detail,
        remedy="" if recent else "Python >= 3.11",
        required=True,
    )


def _packages() -> Finding:
    """Import each; a package that is there and cannot be loaded counts as missing."""
    broken = []
    for distribution in _required_distributions():
        try:
            importlib.import_module(_MODULES.get(distribution, distribution))
        except ImportError as error:
            broken.append(f"{distribution} ({error})")
    if broken:
        return Finding(
            name="required packages",
            status=Status.ABSENT,
            detail=", ".join(broken),
            cost="daemon and clients do not start",
            remedy="pip install dualpath",
            required=True,
        )
    return Finding(
        name="required packages",
        status=Status.OK,
        detail=f"{len(_required_distributions())} importable",
        required=True,
    )


def _required_distributions() -> list[str]:
    try:
        lines = requires("dualpath") or []
    except PackageNotFoundError:
        return list(_MODULES)
    return [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in lines if "extra ==" not in line]


def _extra(name: str) -> Finding:
    modules, cost = _EXTRAS[name]
    missing = [module for module in modules if find_spec(module) is None]
    if not missing:
        return Finding(
            name=f"extra {name}",
            status=Status.OK,
            detail=", ".join(_named(module) for module in modules),
        )
    return Finding(
        name=f"extra {name}",
        status=Status.ABSENT,
        detail=f"not installed: {', '.join(missing)}",
        cost=cost,
        remedy=f"pip install 'dualpath[{name}]'",
    )


def _blake3() -> Finding:
    if find_spec("blake3") is not None:
        return Finding(name="blake3", status=Status.OK, detail=_named("blake3"))
    return Finding(
        name="blake3",
        status=Status.ABSENT,
        detail="not installed",
        cost="chain hashes are SHA-256 or xxh3-128; namespaces hashed with BLAKE3 cannot be used",
        remedy="pip install blake3",
    )


def _named(module: str) -> str:
    try:
        return f"{module} {version(module)}"
    except PackageNotFoundError:
        return module
