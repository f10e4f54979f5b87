"""Settings: defaults, file, environment, flags; unknown ones are refused by name."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest
from dualpath.agent.config import AgentConfig
from dualpath.cli import agent, block_identity, connection, scheduler, serve
from dualpath.cli.config_file import (
    TABLES,
    add_config_arguments,
    field_documents,
    field_names,
    given_flags,
    read_config,
)
from dualpath.kvstore.service.config import DaemonConfig
from dualpath.kvstore.tenant_limits import TenantLimits
from dualpath.transfer.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A component. `names` are its peers; `count` counts them."""

    name: str
    names: tuple[str, ...] = ()
    count: int = 3
    """How many."""
    cache_bytes: int = 1 << 20
    link_bytes_per_s: float = 0.0
    wait_s: float = 1.5
    direct: bool = True


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return path


def test_later_places_win(tmp_path: Path) -> None:
    file = toml(tmp_path, '[sample]\nname = "file"\ncount = 5\nwait_s = 2\ncache_bytes = "2MiB"\n')
    environment = {"DUALPATH_SAMPLE_COUNT": "6", "DUALPATH_SAMPLE_DIRECT": "no", "PATH": "x"}
    flags = {"name": "flag", "link_bytes_per_s": "800Mbit/s", "wait_s": None}
    read = read_config(Sample, "sample", file=file, environment=environment, flags=flags)
    assert read == Sample(
        name="flag",
        count=6,
        cache_bytes=2 << 20,
        link_bytes_per_s=1e8,
        wait_s=2.0,
        direct=False,
    )


def test_a_fallback_loses_against_everything(tmp_path: Path) -> None:
    assert read_config(Sample, "sample", fallbacks={"name": "host"}).name == "host"
    given = read_config(Sample, "sample", fallbacks={"name": "host"}, flags={"name": "me"})
    assert given.name == "me"


def test_lists_are_separated_by_commas_in_texts_and_arrays_in_files(tmp_path: Path) -> None:
    file = toml(tmp_path, '[sample]\nname = "n"\nnames = ["a", "b"]\n')
    assert read_config(Sample, "sample", file=file).names == ("a", "b")
    environment = {"DUALPATH_SAMPLE_NAMES": "c, d", "DUALPATH_SAMPLE_NAME": "n"}
    assert read_config(Sample, "sample", environment=environment).names == ("c", "d")
    flags = {"name": "n", "names": ["e", "f,g"]}
    assert read_config(Sample, "sample", flags=flags).names == ("e", "f", "g")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[sample]\nname = "n"\ncuont = 1\n', "unknown setting 'cuont'; did you mean 'count'"),
        ('[sample]\nname = "n"\ncount = 1.5\n', "sample.count: 1.5 is not a whole number"),
        ('[sample]\nname = "n"\ncount = "x"\n', "sample.count: 'x' is not a number"),
        ('[sample]\nname = "n"\ncount = true\n', "sample.count: True is not a number"),
        ("[sample]\nname = 5\n", "sample.name: 5 is not a text"),
        ('[sample]\nname = "n"\nnames = [1]\n', r"sample.names: \[1\] is not a list of texts"),
        ('[sample]\nname = "n"\ndirect = "maybe"\n', "sample.direct: 'maybe' is neither"),
        ('[sample]\nname = "n"\nwait_s = -1\n', "sample.wait_s: -1 must be finite and not neg"),
        ('[sample]\nname = "n"\nwait_s = inf\n', "sample.wait_s: inf must be finite"),
        ('[sample]\nname = "n"\ncache_bytes = "4G"\n', "sample.cache_bytes: '4G' is not a size"),
        ("[sampel]\n", r"has no table \[sample\]; it has \[sampel\]"),
        ("sample = 1\n", "sample must be a table"),
        ("[sample\n", "is not TOML"),
        ("[sample]\n", "name is not set; give --name, DUALPATH_SAMPLE_NAME"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_config(Sample, "sample", file=toml(tmp_path, text))


def test_an_unknown_variable_of_our_prefix_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"DUALPATH_SAMPLE_CONUT.*did you mean 'count'"):
        read_config(Sample, "sample", environment={"DUALPATH_SAMPLE_CONUT": "1"})


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("DUALPATH_SERV_LISTEN", "did you mean 'serve'"),
        ("DUALPATH_AGNET_NAME", "did you mean 'agent'"),
        ("DUALPATH_LISTEN", "DUALPATH_<TABLE>_<SETTING>"),
        ("DUALPATH_SERVE", "did you mean 'serve'"),
        ("DUALPATH_XYZ_QQ", "known: agent, client, layout, sample, scheduler, serve"),
    ],
)
def test_a_variable_of_an_unknown_table_is_refused_by_name(variable: str, hint: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{variable}.*{hint}"):
        read_config(Sample, "sample", environment={variable: "1"}, flags={"name": "a"})


def test_variables_of_other_commands_and_programs_are_let_be() -> None:
    environment = {f"DUALPATH_{table.upper()}_ANY": "x" for table in TABLES}
    environment |= {"DUALPATHX": "1", "XDUALPATH_SERV_A": "1"}
    read = read_config(Sample, "sample", environment=environment, flags={"name": "a"})
    assert read == Sample(name="a")


def test_the_known_tables_are_those_of_the_commands() -> None:
    commands = (agent, block_identity, connection, scheduler, serve)
    assert set(TABLES) == {command.TABLE for command in commands}


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot read .*gone\.toml"):
        read_config(Sample, "sample", file=tmp_path / "gone.toml")


def test_flags_come_from_the_fields_and_are_not_abbreviated() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_config_arguments(parser, Sample)
    args = parser.parse_args(["--cache-bytes", "1GiB", "--no-direct", "--names", "a,b"])
    assert given_flags(args, Sample) == {
        "cache_bytes": "1GiB",
        "direct": False,
        "names": ["a,b"],
    }
    with pytest.raises(SystemExit):
        parser.parse_args(["--cache", "1GiB"])


def test_fields_are_documented_by_their_own_string_or_the_class() -> None:
    documents = field_documents(Sample)
    assert documents["count"] == "How many"
    assert documents["names"] == "`names` are its peers"


@pytest.mark.parametrize("kind", [AgentConfig, DaemonConfig])
def test_every_field_of_the_components_can_be_set_by_a_flag(kind: type) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_config_arguments(parser, kind)
    flags = {option for action in parser._actions for option in action.option_strings}
    assert {f"--{name.replace('_', '-')}" for name in field_names(kind)} <= flags
    parser.format_help()


def test_a_daemon_is_configured_from_texts() -> None:
    config = read_config(
        DaemonConfig,
        "serve",
        environment={"DUALPATH_SERVE_DISK_BYTES": "8GiB", "DUALPATH_SERVE_DRAIN_S": "500ms"},
        flags={"data": "d", "send_limit_bytes_per_s": "50MB/s", "dram_bytes": "64MiB"},
    )
    assert (config.disk_bytes, config.dram_bytes) == (8 << 30, 64 << 20)
    assert (config.drain_s, config.send_limit_bytes_per_s) == (0.5, 5e7)


TENANTS = """
[serve]
data = "d"

[[serve.tenants]]
tenant = "acme"
disk_bytes = "10GiB"
ttl_s = "90s"

[[serve.tenants]]
tenant = "other"
dram_bytes = 4096
"""


def test_tenants_are_tables_of_the_file_or_texts(tmp_path: Path) -> None:
    expected = (
        TenantLimits(tenant="acme", disk_bytes=10 << 30, ttl_s=90),
        TenantLimits(tenant="other", dram_bytes=4096),
    )
    file = tmp_path / "settings.toml"
    file.write_text(TENANTS)
    assert read_config(DaemonConfig, "serve", file=file).tenants == expected
    text = "tenant=acme, disk_bytes=10GiB, ttl_s=90; tenant=other,dram_bytes=4KiB"
    given = read_config(
        DaemonConfig, "serve", environment={"DUALPATH_SERVE_TENANTS": text}, flags={"data": "d"}
    )
    assert given.tenants == expected
    flags = {"data": "d", "tenants": ["tenant=acme,disk_bytes=10GiB,ttl_s=90", text.split(";")[1]]}
    assert read_config(DaemonConfig, "serve", flags=flags).tenants == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenant=a,disc_bytes=1", "unknown setting 'disc_bytes'; did you mean 'disk_bytes'"),
        ("disk_bytes=1", "has no 'tenant'"),
        ("a", "'a' is not field=value"),
        ("tenant=a,disk_bytes=lots", "disk_bytes: 'lots' is not"),
        ("tenant=a;tenant=a", "'a' is named 2 times"),
        (5, "is not a list of tables"),
        ([5], "5 is not a table"),
    ],
)
def test_a_wrong_tenant_is_refused_by_name(text: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_config(DaemonConfig, "serve", flags={"data": "d", "tenants": text})
