"""Runs the demo with a real model: daemon, two agents, two engine processes, one comparison.

Owns the processes and the temporary folder; both are gone when `run` returns, whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualpath.bench.model.job import Job
from dualpath.bench.testbed.process import ChildProcess
from dualpath.transfer.errors import DeadlineExceeded, InvalidRequest, Unavailable

READY_S_MAX = 30.0
STOP_S_MAX = 10.0
BLOCK_TOKENS = 64
PROMPT_TOKENS_MAX = 16 << 10
DTYPES = ("float32", "bfloat16")
DIFFERENCES_MAX = {"float32": 0.01, "bfloat16": 1.0}
"""Largest difference from the logits of a full prefill in one pass, which sums in another order.
Without the prefix they differ by several units; the same two steps must agree in every bit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDemoConfig:
    """What to run. `storage_bytes_per_s` paces each node's storage link, 0: no limit."""

    prefix_tokens: int = 4096
    new_tokens: int = 32
    decoded_tokens: int = 8
    dtype: str = "float32"
    storage_bytes_per_s: float = 200e6
    timeout_s: float = 240.0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidRequest(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.prefix_tokens % BLOCK_TOKENS or not 0 < self.prefix_tokens <= PROMPT_TOKENS_MAX:
            raise InvalidRequest(
                f"--prefix-tokens must be a multiple of {BLOCK_TOKENS}, at most "
                f"{PROMPT_TOKENS_MAX}, not {self.prefix_tokens}"
            )
        if not 1 <= self.new_tokens <= 1024 or not 1 <= self.decoded_tokens <= 256:
            raise InvalidRequest(
                f"--new-tokens must lie in 1..1024 and --decoded-tokens in 1..256, not "
                f"{self.new_tokens} and {self.decoded_tokens}"
            )
        if not self.timeout_s > 0:
            raise InvalidRequest(f"--timeout-s must be positive, not {self.timeout_s}")


async def run(config: ModelDemoConfig) -> dict[str, Any]:
    """Run everything; return plain values. Raises DualPathError if a process fails."""
    with tempfile.TemporaryDirectory(prefix="dualpath-model-") as name:
        folder = Path(name)
        async with _cluster(config, folder) as agent:
            job = Job(
                folder=name,
                agent=agent,
                dtype=config.dtype,
                prefix_tokens=config.prefix_tokens,
                new_tokens=config.new_tokens,
                decoded_tokens=config.decoded_tokens,
                deadline_s=60.0,
            )
            written = await _engine("writer", job, config.timeout_s)
            read = await _engine("reader", job, config.timeout_s)
    return _judged(config, {**written, **read})


def _judged(config: ModelDemoConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    allowed = DIFFERENCES_MAX[config.dtype]
    problems = []
    if found["loaded_blocks"] != found["saved_blocks"]:
        problems.append(
            f"{found['loaded_blocks']} of {found['saved_blocks']} blocks were loaded: "
            f"miss {found['miss']}"
        )
    if not found["bit_equal"]:
        problems.append("the logits differ from those with KV that never left its process")
    if not found["max_difference"] <= allowed:
        problems.append(f"the logits differ from a full prefill's by {found['max_difference']}")
    if not found["difference_without_prefix"] > allowed:
        problems.append("the logits do not depend on the prefix, so they prove nothing")
    if config.dtype == "float32" and not found["tokens_equal"]:
        problems.append("the decoded tokens differ from those after a full prefill")
    return {
        "ok": not problems,
        "problems": problems,
        "dtype": config.dtype,
        "prefix_tokens": config.prefix_tokens,
        "new_tokens": config.new_tokens,
        "storage_bytes_per_s": config.storage_bytes_per_s,
        "max_difference_allowed": allowed,
        "ttft_ratio": found["ttft_loaded_s"] / found["ttft_full_s"],
        **found,
    }


@contextlib.asynccontextmanager
async def _cluster(config: ModelDemoConfig, folder: Path) -> AsyncIterator[str]:
    """A daemon, a decode agent that relays, the prefill agent; yields the latter's address."""
    started: list[ChildProcess] = []

    async def start(name: str, *arguments: str) -> ChildProcess:
        argv = [sys.executable, "-m", "dualpath.cli.main", *arguments, "--log-level", "warning"]
        child = await ChildProcess.start(name, argv, folder / f"{name}.log")
        started.append(child)
        await child.wait_ready(READY_S_MAX)
        return child

    limit = ("--storage-limit-bytes-per-s", f"{config.storage_bytes_per_s:.0f}")
    try:
        store = folder / "store"
        daemon = await start("daemon", "serve", "--data", str(store), "--listen", "127.0.0.1:0")
        daemons = ("--daemons", daemon.address("listen"))
        decode = await start("decode-1", "agent", "--name", "decode-1", *daemons, *limit)
        relays = ("--relays", f"decode-1={decode.address('listen')}")
        unix = ("--unix", str(folder / "engines.sock"))
        await start("prefill-1", "agent", "--name", "prefill-1", *daemons, *relays, *unix, *limit)
        yield f"unix:{folder / 'engines.sock'}"
    finally:
        for child in reversed(started):
            child.terminate()
            await child.close(STOP_S_MAX)


async def _engine(name: str, job: Job, timeout_s: float) -> dict[str, Any]:
    """Run an engine process to its end; what it reported."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"dualpath.bench.model.{name}",
        job.to_text(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    except TimeoutError as error:
        raise DeadlineExceeded(f"the {name} was not done after {timeout_s:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        tail = "\n".join(err.decode("utf-8", errors="replace").splitlines()[-12:])
        raise Unavailable(f"the {name} ended with status {process.returncode}\n{tail}")
    reported: dict[str, Any] = json.loads(out.decode().splitlines()[-1])
    return reported
