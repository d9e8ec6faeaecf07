"""The README's plots, from a run's JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cases import TASKS
from benchmarks.report import OURS, PEER, Row, rows

PANELS = {
    "benchmark_speed.png": ("unet", "decode", "text", "train"),
    "benchmark_whole.png": ("generate", "start", "memory"),
}
COLOURS = {OURS: "#c8442e", PEER: "#4a6fa5"}
OTHER = "#9a9a9a"


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws one bar for each system, one panel for each case; the line in it is from the fastest to the slowest run.

    Args:
        result: a run.
        folder: where the PNG files are written.

    Returns:
        The files; none for tasks that were not measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, files = rows(result), []
    for name, tasks in PANELS.items():
        cases = list(dict.fromkeys(row.case for row in found if row.case.split(" ")[0] in tasks))
        cases.sort(key=lambda case: list(TASKS).index(case.split(" ")[0]))
        if not cases:
            continue
        columns = min(3, len(cases))
        lines = -(-len(cases) // columns)
        figure, axes = pyplot.subplots(lines, columns, figsize=(5 * columns, 2.6 * lines), squeeze=False)
        for axis in axes.flat[len(cases) :]:
            axis.axis("off")
        for axis, case in zip(axes.flat, cases, strict=False):
            _panel(axis, case, [row for row in found if row.case == case])
        figure.tight_layout()
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / name, dpi=110)
        pyplot.close(figure)
        files.append(folder / name)
    return files


def _panel(axis: Any, case: str, found: list[Row]) -> None:
    found = sorted(found, key=lambda row: -row.median)
    medians = [row.median for row in found]
    below = [row.median - min(row.values) for row in found]
    above = [max(row.values) - row.median for row in found]
    names = [row.system for row in found]
    bars = axis.barh(names, medians, xerr=(below, above), color=[_colour(name) for name in names], ecolor="#222222")
    axis.bar_label(bars, [f" {median:.3g}" for median in medians], fontsize=8)
    axis.set_title(f"{case} ({found[0].unit})", fontsize=10)
    axis.margins(x=0.18)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _colour(system: str) -> str:
    return next((colour for name, colour in COLOURS.items() if system.startswith(name)), OTHER)
