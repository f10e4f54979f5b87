"""The rules of the house that no other tool checks: sizes, names, stray files, dead references."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

COLUMNS_MAX = 100
MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
COMPONENTS = ("bench", "clients", "kvstore", "proto", "transfer")
FORBIDDEN_MODULES = frozenset(
    ["base", "common", "commons", "helper", "helpers", "manager", "misc", "util", "utils", "v2"]
)
TEXT_SUFFIXES = frozenset(
    [
        ".cfg",
        ".css",
        ".html",
        ".ini",
        ".js",
        ".json",
        ".md",
        ".proto",
        ".py",
        ".pyi",
        ".sh",
        ".svg",
        ".toml",
        ".txt",
        ".yaml",
        ".yml",
    ]
)
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")
# Written so that this file does not match itself.
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/-])/(?:" + "|".join(("work", "home", "root", "Users")) + r")/\w"
)
# A comment for a tool is not for people, and cannot be broken.
PRAGMA = re.compile(r"\s*# (?:type: ignore|noqa)\b.*$")
CONFLICT_MARKER = re.compile(r"^(?:" + "<" * 7 + "|" + ">" * 7 + r")(?: |$)", re.MULTILINE)


def sources(files: tuple[Path, ...]) -> list[Path]:
    """Python that people write."""
    return [path for path in files if path.suffix == ".py" and not GENERATED.search(path.name)]


def texts(root: Path, files: tuple[Path, ...]) -> Iterator[tuple[Path, str]]:
    for path in files:
        if path.suffix in TEXT_SUFFIXES or path.name in ("Makefile", "run"):
            yield path, (root / path).read_text(encoding="utf-8")


def test_lines_modules_and_functions_stay_within_their_limits(
    root: Path, files: tuple[Path, ...]
) -> None:
    wrong = []
    for path in sources(files):
        text = (root / path).read_text(encoding="utf-8")
        lines = text.splitlines()
        if len(lines) > MODULE_LINES_MAX:
            wrong.append(f"{path}: {len(lines)} lines, at most {MODULE_LINES_MAX}")
        for number, line in enumerate(lines, 1):
            if len(PRAGMA.sub("", line)) > COLUMNS_MAX:
                wrong.append(f"{path}:{number}: {len(line)} columns, at most {COLUMNS_MAX}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES_MAX:
                    wrong.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_no_init_file_turns_a_namespace_portion_into_a_package(files: tuple[Path, ...]) -> None:
    stray = [
        str(path)
        for path in files
        if path.name == "__init__.py"
        and (
            len(path.parts) <= 2
            or path.parts[0] == "tests"
            or (path.parts[0] in COMPONENTS and path.parts[1:-1] == ("dualpath",))
        )
    ]
    assert not stray, stray


def test_modules_are_named_after_what_they_own(files: tuple[Path, ...]) -> None:
    wrong = [
        str(path)
        for path in sources(files)
        if path.stem in FORBIDDEN_MODULES or path.parent.name in FORBIDDEN_MODULES
    ]
    assert not wrong, wrong


def test_every_module_opens_with_a_docstring(root: Path, files: tuple[Path, ...]) -> None:
    wrong = [
        str(path)
        for path in sources(files)
        if path.parts[0] in COMPONENTS
        and not ast.get_docstring(ast.parse((root / path).read_text(encoding="utf-8")))
    ]
    assert not wrong, wrong


def test_no_file_has_conflict_markers(root: Path, files: tuple[Path, ...]) -> None:
    wrong = [str(path) for path, text in texts(root, files) if CONFLICT_MARKER.search(text)]
    assert not wrong, wrong


def test_no_file_names_a_path_of_somebodys_machine(root: Path, files: tuple[Path, ...]) -> None:
    wrong = [
        f"{path}: {match.group()}"
        for path, text in texts(root, files)
        if (match := ABSOLUTE_PATH.search(text))
    ]
    assert not wrong, wrong


def documents(files: tuple[Path, ...]) -> list[Path]:
    return [path for path in files if path.suffix == ".md"]


def test_every_path_named_in_the_documents_exists(root: Path, files: tuple[Path, ...]) -> None:
    known = {path.parts[0] for path in files if len(path.parts) > 1}
    wrong = []
    for document in documents(files):
        text = (root / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target and not (root / document.parent / target).exists():
                wrong.append(f"{document}: link to {target}")
        for name in re.findall(r"`([\w.-]+/[\w./-]*)`", text):
            if name.split("/", 1)[0] in known and not (root / name).exists():
                wrong.append(f"{document}: {name}")
    assert not wrong, "\n".join(wrong)


def test_every_module_named_in_the_documents_exists(root: Path, files: tuple[Path, ...]) -> None:
    modules = {
        ".".join(path.with_suffix("").parts[1:]).removesuffix(".__init__")
        for path in files
        if path.suffix == ".py" and path.parts[0] in COMPONENTS
    } | {"dualpath"}
    wrong = []
    for document in documents(files):
        text = (root / document).read_text(encoding="utf-8")
        for name in re.findall(r"(?:from|import) (dualpath(?:\.\w+)+)", text):
            if name not in modules:
                wrong.append(f"{document}: {name}")
    assert not wrong, "\n".join(wrong)


def test_the_generated_stubs_are_current(
    root: Path, files: tuple[Path, ...], tmp_path: Path
) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed (make env)")
    protos = [str(path.relative_to("proto")) for path in files if path.suffix == ".proto"]
    tools = Path(sys.executable).parent
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{root / 'proto'}"]
        + [f"--plugin={tools / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
        + [f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}"]
        + [f"--mypy_out=quiet:{tmp_path}", f"--mypy_grpc_out=quiet:{tmp_path}"]
        + protos,
        check=True,
        timeout=60,
    )
    fresh = {path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2*")}
    committed = {path.relative_to("proto") for path in files if GENERATED.search(path.name)}
    assert fresh == committed
    stale = [
        str(path)
        for path in sorted(fresh)
        if (tmp_path / path).read_bytes() != (root / "proto" / path).read_bytes()
    ]
    assert not stale, f"run `make proto`: {stale}"
