"""`dualpath top`: what daemons do now, again and again: throughput, hits, queues, who uses them.

Owns the terminal: `rich` draws it where it is installed, else plain ANSI does. What is shown is
made in `top_view`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from dualpath.cli.connection import ClientConfig
from dualpath.cli.daemon_stub import CALL_S_MAX, add_daemon_arguments, configs_of, daemon_stub
from dualpath.cli.sizes import parse_seconds
from dualpath.cli.top_view import Sample, daemon_values, frame
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import DualPathError, InvalidRequest

DAEMONS_MAX = 64
INTERVAL_S_MIN = 0.1
_EXAMPLE = """example:
  dualpath top                                  # the daemon at 127.0.0.1:7070
  dualpath top 10.0.0.5:7070 10.0.0.6:7070 --interval 1s
  dualpath top --once --json                    # one sample of rates, for scripts

Rates are between two samples. Who uses a daemon is shown to principals with the right `admin` in
all namespaces. Ends by an interrupt."""


class TopCommand:
    """See the module docstring."""

    name = "top"
    help = "watch what daemons do"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Which daemons, how often."""
        parser.epilog = _EXAMPLE
        add_daemon_arguments(parser, several=True)
        parser.add_argument("--interval", metavar="TIME", default="2s", help="(default 2s)")
        parser.add_argument("--once", action="store_true", help="show one interval and end")

    def run(self, args: argparse.Namespace) -> int:
        """Sample and show until interrupted."""
        interval_s = parse_seconds(args.interval)
        if interval_s < INTERVAL_S_MIN:
            raise InvalidRequest(
                f"--interval: {interval_s} s; at least {INTERVAL_S_MIN} s is valid"
            )
        configs = configs_of(args)
        if len(configs) > DAEMONS_MAX:
            raise InvalidRequest(f"{len(configs)} daemons; {DAEMONS_MAX} at most")
        with ThreadPoolExecutor(len(configs)) as pool:

            def sample() -> list[Sample]:
                return list(pool.map(_sample, configs))

            if args.once or args.json:
                return _report(sample, interval_s, as_json=args.json, once=args.once)
            with _screen() as show:
                for before, after in _pairs(sample, interval_s):
                    show(frame(before, after))
        return 0


def _report(
    sample: Callable[[], list[Sample]], interval_s: float, *, as_json: bool, once: bool
) -> int:
    good = True
    for before, after in _pairs(sample, interval_s):
        if as_json:
            values = [daemon_values(*pair) for pair in zip(before, after, strict=True)]
            print(json.dumps({"daemons": values}), flush=True)
        else:
            print("\n".join(frame(before, after)))
        good = all(not each.error for each in after)
        if once:
            break
    return 0 if good else 1


def _pairs(
    sample: Callable[[], list[Sample]], interval_s: float
) -> Iterator[tuple[list[Sample], list[Sample]]]:
    """Samples an interval apart, each with the one before."""
    before = sample()
    while True:
        time.sleep(interval_s)
        after = sample()
        yield before, after
        before = after


def _sample(config: ClientConfig) -> Sample:
    try:
        with daemon_stub(config) as daemon:
            stats = daemon.stub.Stats(
                store_pb2.StatsRequest(),
                timeout=min(config.deadline_s, CALL_S_MAX),
                metadata=daemon.metadata,
            )
    except DualPathError as error:
        return Sample(config.daemon, time.monotonic(), None, f"{error.reason}: {error}")
    return Sample(config.daemon, time.monotonic(), stats)


@contextmanager
def _screen() -> Iterator[Callable[[Sequence[str]], None]]:
    """A function that shows a frame in place of the last one."""
    try:
        from rich.console import Console  # noqa: PLC0415 - only the extra `bench` brings it
        from rich.live import Live  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415
    except ImportError:
        yield _plain
        return
    with Live(console=Console(), screen=sys.stdout.isatty(), auto_refresh=False) as live:
        yield lambda lines: live.update(Text("\n".join(lines)), refresh=True)


def _plain(lines: Sequence[str]) -> None:
    home = "\x1b[H\x1b[J" if sys.stdout.isatty() else ""
    print(home + "\n".join(lines), flush=True)


command = TopCommand()
