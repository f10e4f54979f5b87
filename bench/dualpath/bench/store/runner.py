"""Runs sections one after another and collects their figures, misses and failures.

A section that fails or is not there ends by itself: the others are still measured.
"""

from __future__ import annotations

import gc
import logging
import shutil
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from dualpath.bench.machine import describe_machine, describe_storage, describe_versions
from dualpath.bench.progress import Progress
from dualpath.bench.store.fio import fio_version
from dualpath.bench.store.report import StoreReport
from dualpath.bench.store.section import JUDGED_ROUNDS_MIN, SKIPPED, Figures, Section
from dualpath.transfer.errors import DualPathError


def run_sections(
    sections: Sequence[Section], scratch: Path, rounds: int, progress: Progress
) -> StoreReport:
    """Measure each in a folder of its own, which is removed afterwards."""
    # What the parts say about links that end is no news here.
    logging.getLogger("dualpath").setLevel(logging.ERROR)
    report = StoreReport(
        rounds=rounds,
        machine={**describe_machine(), **describe_storage(scratch)},
        versions={**describe_versions(), "fio": fio_version()},
        date=time.strftime("%Y-%m-%d"),
    )
    for section in sections:
        folder = scratch / section.name
        folder.mkdir()
        progress.stage(section.name)
        figures, failure = _measured(section, folder, rounds, progress)
        progress.done(failure)
        shutil.rmtree(folder, ignore_errors=True)
        # What one section leaves behind must not run, or be collected, in the time of the next.
        gc.collect()
        report.figures[section.name] = figures
        if failure:
            report.failures.append(f"{section.name}: {failure}")
        elif rounds >= JUDGED_ROUNDS_MIN:
            missed = (target.missed(figures) for target in section.targets)
            report.misses.extend(f"{section.name}: {text}" for text in missed if text)
        elif SKIPPED in figures:
            report.notes.append(f"{section.name}: {figures[SKIPPED]}")
    return report


def _measured(
    section: Section, folder: Path, rounds: int, progress: Progress
) -> tuple[Figures, str]:
    try:
        measure = section.measure()
    except (ImportError, AttributeError) as error:
        return {SKIPPED: str(error)}, f"cannot be measured: {error}"
    try:
        return measure(folder, rounds, lambda text: progress.say(f"  {text}")), ""
    except DualPathError as error:
        return {SKIPPED: f"{error.reason}: {error}"}, f"{error.reason}: {error}"
    except Exception as error:  # noqa: BLE001 - one section's bug must not cost the others' hours
        traceback.print_exc()
        return {SKIPPED: repr(error)}, f"broke: {error!r}"
