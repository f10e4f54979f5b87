"""The published results of arXiv 2602.21548 beside simulated ones.

The inputs are those committed in `calibration.toml`, `catalogue.toml`, `engine_details.py` and
`replayed_set.py`; no figure has inputs of its own. Which runs a result needs, and what the paper
leaves open about them, is declared in `paper_offline` and `paper_online`.
"""

from __future__ import annotations

from collections.abc import Sequence

from dualpath.bench.progress import Progress
from dualpath.bench.simulate.comparison import PaperReport
from dualpath.bench.simulate.paper_offline import AGENTS, OfflineFigures
from dualpath.bench.simulate.paper_online import DURATION_S, ROUNDS, OnlineFigures
from dualpath.bench.simulate.runs import Runs
from dualpath.bench.simulate.setting import Setting

FULL_AGENTS = 512
"""With fewer agents than this the online runs are cut short too: a quick look."""
QUICK_S = 25.0


def reproduce(
    progress: Progress,
    *,
    seed: int = 0,
    calibration: str = "",
    agents: Sequence[int] = (),
    jobs: int = 1,
) -> PaperReport:
    """Run everything. `agents` replaces the 660B runs' counts, and a smaller one the others' too:
    for a quick look, whose figures are not the paper's setting. Raises InvalidRequest."""
    base, runs = Setting(seed=seed, calibration=calibration), Runs()
    counts = tuple(agents) or AGENTS
    offline = OfflineFigures(base, counts)
    quick = max(counts) < FULL_AGENTS
    online = OnlineFigures(base, QUICK_S if quick else DURATION_S, 1 if quick else ROUNDS)
    runs.simulate(offline.settings(), progress, jobs=jobs, title="offline")
    online.simulate(runs, progress, jobs)
    return PaperReport(
        comparisons=[*offline.comparisons(runs), *online.comparisons(runs)],
        tables=[*offline.tables(runs), *online.tables(runs)],
        curves=offline.curves(runs) | online.curves(runs),
        runs={each.name: figures for each, figures in runs.figures.items()},
        seconds={each.name: seconds for each, seconds in runs.seconds.items()},
    )
