"""The subcommand `dualpath demo-model`: flags, table, exit status."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dualpath.bench.model.demonstration import DTYPES, ModelDemoConfig, run
from dualpath.cli.sizes import format_bytes, format_rate, parse_rate

_EXAMPLE = """example:
  dualpath demo-model
  dualpath demo-model --dtype bfloat16 --prefix-tokens 2048 --json out.json

One process prefills a long prompt with a small random Llama and saves its KV through the node's
agent. A second process loads the prefix over both paths, layer by layer, and continues. Its logits
must be those of the same two steps without the store, bit by bit, and those of a full prefill
within the rounding of another order of sums. Exit status 1 if they are not; 0 with
`skipped: REASON` where torch or transformers are not installed."""


class DemoModelCommand:
    """Loaded by the CLI through the entry-point group `dualpath.commands`."""

    name = "demo-model"
    help = "send a real model's KV through the store and back, and compare the logits"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags; their defaults are ModelDemoConfig's."""
        parser.epilog = _EXAMPLE
        default = ModelDemoConfig()
        for name, text in (
            ("prefix_tokens", "of the stored prefix, a multiple of 64"),
            ("new_tokens", "after the prefix"),
            ("decoded_tokens", "decoded afterwards and compared"),
        ):
            value = getattr(default, name)
            flag = f"--{name.replace('_', '-')}"
            parser.add_argument(
                flag, type=int, default=value, metavar="N", help=f"{text} (default {value})"
            )
        parser.add_argument("--dtype", choices=DTYPES, default=default.dtype)
        parser.add_argument(
            "--storage-rate",
            default=f"{default.storage_bytes_per_s / 1e6:.0f}MB/s",
            metavar="RATE",
            help="of each node's storage link, paced in user space; 0: none (default 200MB/s)",
        )
        parser.add_argument(
            "--timeout-s",
            type=float,
            default=default.timeout_s,
            metavar="S",
            help=f"longest time of each engine process (default {default.timeout_s:g})",
        )
        parser.add_argument("--json", default="", metavar="FILE", help="write the result as JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Run it, print, compare."""
        missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
        if missing:
            print(f"skipped: {' and '.join(missing)} not installed (extra `model`)")
            return 0
        config = ModelDemoConfig(
            prefix_tokens=args.prefix_tokens,
            new_tokens=args.new_tokens,
            decoded_tokens=args.decoded_tokens,
            dtype=args.dtype,
            storage_bytes_per_s=parse_rate(args.storage_rate),
            timeout_s=args.timeout_s,
        )
        result = asyncio.run(run(config))
        _print(result)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return 0 if result["ok"] else 1


def _print(result: Mapping[str, Any]) -> None:
    shares = ", ".join(
        f"{path} {format_bytes(nbytes)}" for path, nbytes in result["bytes_by_path"].items()
    )
    limit = result["storage_bytes_per_s"]
    print(
        f"prefix of {result['prefix_tokens']} tokens, {result['new_tokens']} new ones, "
        f"{result['dtype']}; storage links {format_rate(limit) if limit else 'without limit'}"
    )
    for name, text in (
        ("KV saved", f"{format_bytes(result['saved_bytes'])} in {result['save_s']:.2f} s"),
        ("KV loaded", f"{format_bytes(result['loaded_bytes'])} in {result['load_s']:.2f} s"),
        ("by path", shares),
        ("TTFT, full prefill", f"{result['ttft_full_s']:.3f} s"),
        ("TTFT, prefix loaded", f"{result['ttft_loaded_s']:.3f} s"),
        ("logits bit-equal", "yes" if result["bit_equal"] else "NO"),
        (
            "off a full prefill",
            f"{result['max_difference']:.2g} at most (without the prefix: "
            f"{result['difference_without_prefix']:.2g})",
        ),
        ("tokens equal", "yes" if result["tokens_equal"] else "no"),
    ):
        print(f"  {name:20} {text}")
    for problem in result["problems"]:
        print(f"  WRONG: {problem}")


command = DemoModelCommand()
