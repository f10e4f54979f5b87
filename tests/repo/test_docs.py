"""The documents say what the code says: errors, settings, metrics.

Tables between `<!-- settings: NAME -->` and `<!-- end -->` are made from the dataclasses; write
them anew with `python tests/repo/test_docs.py`.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from pathlib import Path

import pytest
from dualpath.agent.config import AgentConfig
from dualpath.agent.outcome import MissReason
from dualpath.cli.block_identity import LayoutSettings
from dualpath.cli.config_file import field_documents, flag_name
from dualpath.cli.connection import ClientConfig
from dualpath.cli.sizes import format_bytes
from dualpath.kvstore.service.config import DaemonConfig
from dualpath.kvstore.store_api import ReserveStatus, SealStatus
from dualpath.proto.status import code_of
from dualpath.proto.v1 import common_pb2, store_pb2
from dualpath.scheduler.config import SchedulerConfig
from dualpath.transfer.errors import DualPathError, Overloaded

COMPONENTS = ("bench", "clients", "kvstore", "proto", "transfer")
SETTINGS = {
    "serve": DaemonConfig,
    "agent": AgentConfig,
    "scheduler": SchedulerConfig,
    "client": ClientConfig,
    "layout": LayoutSettings,
}
OPERATIONS = Path("docs/operations.md")


def words(text: str) -> set[str]:
    """What stands in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text.replace("```", "")))


def trees(root: Path) -> list[ast.Module]:
    return [
        ast.parse(path.read_text(encoding="utf-8"))
        for component in COMPONENTS
        for path in sorted((root / component).rglob("*.py"))
        if "_pb2" not in path.name
    ]


def error_classes() -> list[type[DualPathError]]:
    found: list[type[DualPathError]] = [DualPathError]
    for kind in found:
        found += kind.__subclasses__()
    return found


def error_of(kind: type[DualPathError]) -> DualPathError:
    if issubclass(kind, Overloaded):
        return kind("x", retry_after_s=1.0)
    return kind("x")


def settings_table(table: str) -> str:
    """Markdown of one dataclass."""
    kind = SETTINGS[table]
    documents = field_documents(kind)
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        default = field.default
        if default is dataclasses.MISSING:
            shown = "required"
        elif default in ("", ()):
            shown = ""
        elif field.name.endswith(("_bytes", "_bytes_max")) and isinstance(default, int):
            shown = f"`{format_bytes(default).replace('.00 ', '')}`"
        else:
            shown = f"`{str(default).lower()}`"
        meaning = documents.get(field.name, "").replace("|", "\\|")
        lines.append(f"| `{flag_name(field.name)}` | {shown} | {' '.join(meaning.split())} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The document with every settings table made anew."""
    return re.sub(
        r"(<!-- settings: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: match.group(1) + settings_table(match.group(2)) + "\n" + match.group(3),
        text,
        flags=re.DOTALL,
    )


def test_every_error_class_is_documented_with_its_status_and_reason(root: Path) -> None:
    text = (root / "docs/errors.md").read_text(encoding="utf-8")
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if (cells := [cell.strip(" `") for cell in line.strip("|").split("|")]) and len(cells) > 2
    }
    wrong = [
        kind.__name__
        for kind in error_classes()
        if kind.__module__.startswith("dualpath.")
        and rows.get(kind.__name__, [])[:2] != [code_of(error_of(kind)).name, kind.reason]
    ]
    assert not wrong, f"docs/errors.md: class, status and reason of {wrong}"


def test_every_reason_word_in_the_code_is_documented(root: Path) -> None:
    documented = words((root / "docs/errors.md").read_text(encoding="utf-8"))
    used = {
        str(keyword.value.value)
        for tree in trees(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "reason" and isinstance(keyword.value, ast.Constant)
        if isinstance(keyword.value.value, str) and keyword.value.value
    }
    used |= {reason.value for reason in MissReason}
    used |= {status.value for status in (*ReserveStatus, *SealStatus)}
    for prefix, enum in (
        ("CHUNK_FAILURE_", common_pb2.ChunkFailure),
        ("MISS_REASON_", store_pb2.MissReason),
        ("RESERVE_STATUS_", store_pb2.ReserveStatus),
        ("SEAL_STATUS_", store_pb2.SealStatus),
    ):
        names = (name.removeprefix(prefix).lower() for name in enum.keys())  # noqa: SIM118
        used |= {name for name in names if name != "unspecified"}
    assert not used - documented, sorted(used - documented)


@pytest.mark.parametrize("table", SETTINGS)
def test_every_setting_is_documented_as_it_is(root: Path, table: str) -> None:
    text = (root / OPERATIONS).read_text(encoding="utf-8")
    assert f"<!-- settings: {table} -->\n{settings_table(table)}\n<!-- end -->" in text, (
        "run: python tests/repo/test_docs.py"
    )


@pytest.mark.parametrize("kind", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_has_a_meaning(kind: type) -> None:
    documents = field_documents(kind)
    silent = [field.name for field in dataclasses.fields(kind) if not documents.get(field.name)]
    assert not silent, f"{kind.__name__}: a string below the field, or `name` in the docstring"


def test_every_metric_is_documented(root: Path) -> None:
    documented = words((root / OPERATIONS).read_text(encoding="utf-8"))
    used = {
        node.value
        for tree in trees(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"dualpath_[a-z0-9_]+", node.value)
    }
    used -= {path.stem for path in root.glob("bench/**/dualpath_*.py")}  # modules, not metrics
    assert not used - documented, sorted(used - documented)
    listed = set(
        re.findall(r"^\| `(dualpath_[a-z0-9_]+)` \|", (root / OPERATIONS).read_text("utf-8"), re.M)
    )
    assert not listed - used, sorted(listed - used)


def test_the_map_of_behaviours_names_modules_that_exist_and_all_of_the_agent(root: Path) -> None:
    named = words((root / "docs/architecture.md").read_text(encoding="utf-8"))
    modules = {word for word in named if re.fullmatch(r"[\w/]+\.py", word) and "/" in word}
    assert not [module for module in modules if not (root / module).is_file()]
    for folder in ("clients/dualpath/agent", "clients/dualpath/client"):
        files = {str(path.relative_to(root)) for path in (root / folder).glob("[a-z]*.py")}
        assert not files - modules, sorted(files - modules)


if __name__ == "__main__":
    path = Path(__file__).resolve().parents[2] / OPERATIONS
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{path}\n")
