"""The files in deploy/: settings and paths in them exist, and the tools that read them agree.

No image is built and no unit is started here: neither Docker nor systemd need be running.
"""

from __future__ import annotations

import fnmatch
import http.server
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dualpath.agent.config import AgentConfig
from dualpath.cli.command import known_commands
from dualpath.cli.config_file import given_flags, read_config
from dualpath.cli.main import command_parser
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.service.access_rules import parse_access
from dualpath.kvstore.service.config import DaemonConfig, is_loopback, split_address
from dualpath.kvstore.service.principal import ALL_RIGHTS, Rights
from dualpath.transfer.errors import InvalidRequest

DEPLOY = Path("deploy")
CONFIGS: dict[str, type] = {"serve": DaemonConfig, "agent": AgentConfig}
TOKEN = "a-token-of-more-than-16-chars"


def config_of(command: list[str], environment: dict[str, str]) -> Any:
    """What a command line would run with."""
    name, *flags = command
    args = command_parser(known_commands()[name].load()).parse_args(flags)
    kind = CONFIGS[name]
    return read_config(
        kind, name, file=args.config, environment=environment, flags=given_flags(args, kind)
    )


@pytest.fixture(scope="module")
def compose(root: Path) -> dict[str, Any]:
    loaded = yaml.safe_load((root / DEPLOY / "compose.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_every_service_of_the_compose_file_starts_with_settings_that_exist(
    compose: dict[str, Any],
) -> None:
    found = {}
    for name, service in compose["services"].items():
        environment = {
            key: re.sub(r"\$\{\w+:\?[^}]*\}", TOKEN, value)
            for key, value in service["environment"].items()
            if key != "DUALPATH_PROBE"
        }
        found[name] = config = config_of(service["command"], environment)
        probe = service["environment"].get("DUALPATH_PROBE", "http://127.0.0.1:9070/healthz")
        assert f"//{config.metrics_listen}/" in probe
        addresses = {network["ipv4_address"] for network in service["networks"].values()}
        for address in (config.listen, config.data_listen):
            assert address.rpartition(":")[0] in addresses, (name, address)
        seconds = int(service["stop_grace_period"].removesuffix("s"))
        assert seconds > getattr(config, "drain_s", 0)
    daemon, prefill, decode = found["daemon"], found["prefill"], found["decode"]
    assert prefill.daemons == decode.daemons == (daemon.listen,)
    assert prefill.relays == (f"{decode.name}={decode.listen}",)
    assert daemon.tokens == (prefill.token,) == (decode.token,)


def test_every_volume_and_network_of_the_compose_file_is_declared(compose: dict[str, Any]) -> None:
    volumes, networks = set(), set()
    for service in compose["services"].values():
        volumes |= {volume.split(":")[0] for volume in service["volumes"]}
        networks |= set(service["networks"])
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
    assert volumes == set(compose["volumes"])
    assert networks == set(compose["networks"])


def dockerfile(root: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of each, continued lines joined."""
    text = (root / DEPLOY / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def test_the_image_runs_as_a_user_without_rights_and_is_probed(root: Path) -> None:
    instructions = dockerfile(root)
    last = [name for name, _ in instructions][::-1].index("FROM")
    final = instructions[len(instructions) - last - 1 :]
    named = dict(final)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", named["USER"])
    order = [name for name, _ in final]
    assert order.index("USER") > max(i for i, name in enumerate(order) if name in ("RUN", "COPY"))
    assert "probe.py" in named["HEALTHCHECK"]
    assert named["ENTRYPOINT"] == '["dualpath"]'
    command = [part for part in yaml.safe_load(named["CMD"]) if isinstance(part, str)]
    given = {
        "DUALPATH_SERVE_TOKENS": "0123456789abcdef",
        "DUALPATH_SERVE_ADVERTISE_HOST": "10.0.0.5",
    }
    config = config_of(command, given)
    ports = {split_address(each, "")[1] for each in (config.listen, config.data_listen)}
    assert {int(port) for port in named["EXPOSE"].split()} == ports
    assert not any(
        is_loopback(split_address(each, "")[0]) for each in (config.listen, config.data_listen)
    )
    with pytest.raises(InvalidRequest, match="neither tokens nor"):
        config_of(command, {})
    probe = dict(re.findall(r"(\w+)=(\S+)", named["ENV"]))["DUALPATH_PROBE"]
    assert probe == f"http://{config.metrics_listen}/healthz"


def context(root: Path, files: tuple[Path, ...]) -> set[Path]:
    """What Docker would send to the build."""
    kept: set[Path] = set()
    for line in (root / DEPLOY / "Dockerfile.dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line == "*":
            continue
        matches = {
            path
            for path in files
            if path == Path(pattern)
            or Path(pattern) in path.parents
            or (pattern.startswith("**/") and fnmatch.fnmatch(path.name, pattern[3:]))
        }
        if line.startswith("!"):
            assert matches, f"{pattern} is not there"
            kept |= matches
        else:
            kept -= matches
    return kept


def test_what_the_image_copies_is_in_its_context(root: Path, files: tuple[Path, ...]) -> None:
    kept = context(root, files)
    for name, rest in dockerfile(root):
        sources = [word for word in rest.split()[:-1] if not word.startswith("--")]
        if name == "COPY" and sources != ["."]:
            assert {Path(source) for source in sources} <= kept
    assert not [path for path in kept if path.parts[0] in ("tests", "docs")]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_context_of_the_image_is_enough_to_build_it(
    root: Path, files: tuple[Path, ...], tmp_path: Path
) -> None:
    for path in context(root, files):
        (tmp_path / "src" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, tmp_path / "src" / path)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, tmp_path / "src"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if "scikit-build-core" in built.stderr and "Could not find" in built.stderr:
        pytest.skip(f"no scikit-build-core to build with: {built.stderr[-300:]}")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "dualpath/cli/main.py" in archive.namelist()


@pytest.mark.parametrize("unit", ["dualpath-daemon.service", "dualpath-agent.service"])
def test_systemd_accepts_the_unit(root: Path, tmp_path: Path, unit: str) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    text = (root / DEPLOY / "systemd" / unit).read_text()
    # The program need not be installed where the unit will find it.
    (tmp_path / unit).write_text(text.replace("/opt/dualpath/bin/dualpath", "/bin/true"))
    checked = subprocess.run(
        [tool, "verify", str(tmp_path / unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )
    told = [line for line in checked.stderr.splitlines() if unit in line]
    assert checked.returncode == 0, checked.stderr
    assert not told, told


@pytest.mark.parametrize("unit", ["dualpath-daemon.service", "dualpath-agent.service"])
def test_the_commands_of_a_unit_have_flags_that_exist(root: Path, unit: str) -> None:
    text = (root / DEPLOY / "systemd" / unit).read_text().replace("\\\n", " ")
    commands = re.findall(r"^Exec\w+=-?/opt/dualpath/bin/dualpath (.*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        name, *flags = shlex.split(command)
        args = command_parser(known_commands()[name].load()).parse_args(flags)
        if name in CONFIGS:
            file = root / DEPLOY / Path(args.config).name
            given = given_flags(args, CONFIGS[name])
            read_config(CONFIGS[name], name, file=file, environment={}, flags=given)
    stop = float(re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)[0])
    drained = re.findall(r"--deadline (\d+)s", text)
    waits = [float(seconds) for seconds in drained]
    table = tomllib.loads((root / DEPLOY / "daemon.toml").read_text())["serve"]
    if waits:
        assert stop > waits[0] + float(table["drain_s"].removesuffix("s"))


def test_the_sample_of_an_access_file_says_what_its_comments_say(root: Path) -> None:
    rules = parse_access((root / DEPLOY / "access.toml").read_text(), "access.toml")
    layout = KVLayout(layers=1, block_tokens=4, layer_bytes=4096, dtype="u8")
    ours, theirs = (Namespace(model="m", layout=layout, tenant=f"team-{t}") for t in "ab")
    assert rules.rights_everywhere("uid:998") == ALL_RIGHTS
    assert rules.rights("cert:agent-prefill-1", ours) == Rights.READ | Rights.WRITE
    assert rules.rights("cert:engine", ours) == Rights.NONE
    assert rules.rights("token:router", ours) == Rights.READ
    assert rules.rights("token:router", theirs) == Rights.NONE


@pytest.fixture
def endpoint() -> Iterator[tuple[str, dict[str, int]]]:
    """A server that answers with the status that the dict names."""
    status = {"now": 200}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status["now"])
            self.end_headers()
            self.wfile.write(b"the reason\n")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/healthz", status
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_the_probe_of_the_image_passes_on_status_and_reason(
    root: Path, endpoint: tuple[str, dict[str, int]]
) -> None:
    url, status = endpoint

    def probe(target: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, str(root / DEPLOY / "probe.py")],
            env={**os.environ, "DUALPATH_PROBE": target},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.returncode, done.stdout.strip()

    assert probe(url) == (0, "the reason")
    status["now"] = 503
    assert probe(url) == (1, "the reason")
    assert probe("http://127.0.0.1:1/healthz")[0] == 1
    assert probe("") == (1, "DUALPATH_PROBE must be http://HOST:PORT/healthz or /readyz, not ''")
