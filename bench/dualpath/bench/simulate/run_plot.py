"""Draws the runs of `dualpath simulate`: times over the rate of agents, or over systems. Needs
matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dualpath.bench.picture import new_figure, write_png
from dualpath.bench.slo import Slo

Result = Mapping[str, object]


def draw_runs(results: Sequence[Result], slo: Slo, path: str, title: str) -> None:
    """Write the PNG. Raises Unavailable without matplotlib or right to write."""
    figure = new_figure(9, 4.2)
    online = any(result.get("aps") for result in results)
    names = list(dict.fromkeys(str(result["system"]) for result in results))
    if online:
        figures = (("ttft_s", "TTFT s, mean", slo.ttft_s), ("tpot_s", "TPOT s, mean", slo.tpot_s))
        for axes, (figure_name, label, promise) in zip(figure.subplots(1, 2), figures, strict=True):
            for name in names:
                mine = [each for each in results if each["system"] == name]
                rates = [_number(each, "aps") for each in mine]
                axes.plot(
                    rates, [_number(each, figure_name, "mean") for each in mine], "o-", label=name
                )
            if promise < float("inf"):
                axes.axhline(promise, color="grey", linestyle=":", label="SLO")
            axes.set_xlabel("agents a second")
            axes.set_ylabel(f"{label} (simulated)")
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    else:
        for axes, path_of, label in zip(
            figure.subplots(1, 2),
            (("jct_s",), ("ttft_s", "mean")),
            ("job completion, s", "TTFT s, mean"),
            strict=True,
        ):
            axes.bar(names, [_number(each, *path_of) for each in results])
            axes.set_ylabel(f"{label} (simulated)")
            axes.tick_params(axis="x", labelrotation=30)
            axes.grid(axis="y", alpha=0.3)
    figure.suptitle(title, fontsize=9)
    write_png(figure, path)


def _number(result: Result, *names: str) -> float:
    found: object = result
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) else float("nan")
