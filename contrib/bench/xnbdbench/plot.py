"""The picture of contrib/doc/performance.rst: small requests and throughput, server by server. Needs matplotlib."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, Dict, List

from .errors import BenchmarkError
from .results import LIMIT, TIMES, Panel, Result

_COLOURS = ["#1f6fb4", "#b8bec6", "#969da6", "#747b84", "#565c64"]
"""The subject's, then the others' in their order."""

_LIMIT_COLOUR = "#c0504d"

_PANELS: Dict[Panel, str] = {"small": "4 KiB requests, thousands per second", "throughput": "large requests, GB/s"}
_BAR_GROUP_WIDTH = 0.84
_TITLE_WIDTH = 15


def draw(results: List[Result], about: Dict[str, Any], path: Path) -> None:
    """Write the plot of the *results* that belong to a panel."""
    try:
        import matplotlib
    except ImportError:
        raise BenchmarkError("the plot needs matplotlib: pip install -e '.[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {panel: [result for result in results if result.panel == panel] for panel in _PANELS}
    groups = {panel: group for panel, group in groups.items() if group}
    if not groups:
        raise BenchmarkError("nothing was measured that the plot shows")
    widths = [len(group) + 0.6 for group in groups.values()]
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(2.0 + 1.15 * sum(widths), 4.9), width_ratios=widths, squeeze=False
    )
    for axis, (panel, group) in zip(axes[0], groups.items()):
        _draw_panel(axis, group, _PANELS[panel])
    bars, names = axes[0][0].get_legend_handles_labels()
    figure.legend(bars, names, loc="upper center", bbox_to_anchor=(0.5, 0.945), ncol=len(names), frameon=False)
    figure.suptitle("xnbd-server and C servers, one image in page cache, loopback TCP", fontweight="bold")
    figure.text(0.5, 0.01, _describe(about), ha="center", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.035, 1, 0.95))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_panel(axis: Any, group: List[Result], title: str) -> None:
    contenders = [name for name in group[0].contenders if not name.startswith(LIMIT)]
    width = _BAR_GROUP_WIDTH / len(contenders)
    for index, name in enumerate(contenders):
        places = [row + width * (index - (len(contenders) - 1) / 2) for row in range(len(group))]
        values = [(result.median(name) or 0) / 1000 for result in group]
        bars = axis.bar(places, values, width, label=name, color=_COLOURS[index % len(_COLOURS)])
        axis.bar_label(bars, [_label(value) for value in values], fontsize=7, color="#444444", padding=1)
        if index == 0:
            _mark_ratios(axis, group, places, values)
    _mark_limits(axis, group)
    axis.set_title(title, fontsize=11)
    axis.set_xticks(range(len(group)), [_fold(result.title) for result in group], fontsize=8.5)
    axis.tick_params(axis="x", length=0)
    axis.margins(y=0.14)
    axis.grid(axis="y", color="#e4e4e4")
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _mark_ratios(axis: Any, group: List[Result], places: List[float], values: List[float]) -> None:
    for result, place, value in zip(group, places, values):
        if result.ratio is not None:
            axis.annotate(
                f"{TIMES}{result.ratio:.1f}",
                (place, value),
                xytext=(0, 11),
                textcoords="offset points",
                ha="center",
                fontweight="bold",
                color=_COLOURS[0],
            )


def _mark_limits(axis: Any, group: List[Result]) -> None:
    """A line across a row's bars, as high as the C program of the subject's technique came."""
    rows = [row for row, result in enumerate(group) if LIMIT in result.references]
    if rows:
        heights = [(group[row].median(LIMIT) or 0) / 1000 for row in rows]
        begins, ends = ([row + side * _BAR_GROUP_WIDTH / 2 for row in rows] for side in (-1, 1))
        axis.hlines(heights, begins, ends, colors=_LIMIT_COLOUR, linestyles="dotted", label="limit (C)")


def _fold(title: str) -> str:
    """A title over several lines, of which none mixes what commas divide."""
    return "\n".join(textwrap.fill(part, _TITLE_WIDTH) for part in title.split(", "))


def _label(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _describe(about: Dict[str, Any]) -> str:
    machine, settings = about["machine"], about["settings"]
    return (
        f"{TIMES} is the ratio to the best C server. Medians of {settings['rounds']} interleaved rounds. "
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, Python {machine['python']}, "
        f"{about['started'][:10]}"
    )
