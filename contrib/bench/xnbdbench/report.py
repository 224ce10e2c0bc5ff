"""Results as tables for the terminal: one per set of contenders."""

from __future__ import annotations

from collections import Counter
from typing import Any, Dict, List, Optional, Tuple

from .results import TIMES, Result, Unit


def format_value(value: Optional[float], unit: Unit) -> str:
    if value is None:
        return "failed"
    if unit == "iops":
        return f"{value / 1000:.1f} k/s" if value < 100_000 else f"{value / 1000:.0f} k/s"
    if unit == "MB/s":
        return f"{value / 1000:.2f} GB/s" if value >= 100 else f"{value:.1f} MB/s"
    return f"{value:.2f} {unit}" if value < 10 else f"{value:.0f} {unit}"


def format_goal(result: Result) -> str:
    if result.goal.kind == "ratio":
        of_limit = f", {result.goal.of_limit:g} of limit" if result.goal.of_limit else ""
        return f"≥ {TIMES}{result.goal.bound:g}{of_limit}"
    sign = "≤" if result.goal.kind == "at most" else "≥"
    return f"{sign} {result.goal.bound:g} {result.unit}"


def format_report(results: List[Result], about: Dict[str, Any]) -> str:
    """The whole text: machine, tables, how many targets were reached."""
    groups: Dict[Tuple[str, ...], List[Result]] = {}
    for result in results:
        groups.setdefault(tuple(result.contenders), []).append(result)
    parts = [_format_head(about), *(_format_group(group) for group in groups.values()), _format_tail(results)]
    return "\n\n".join(parts)


def _format_head(about: Dict[str, Any]) -> str:
    machine, settings = about["machine"], about["settings"]
    versions = ", ".join(f"{name}: {text}" for name, text in about["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"Linux {machine['kernel']}, Python {machine['python']}\n{versions}\n"
        f"image {settings['image_bytes'] >> 20} MiB in {settings['directory']}; "
        f"medians of {settings['rounds']} rounds of {settings['seconds']:g} s; "
        f"other load before {about['foreign_load_percent']:.0f} %, stolen {about['stolen_percent']:.1f} %"
    )


def _format_group(group: List[Result]) -> str:
    contenders = group[0].contenders
    compared = len(contenders) > 1
    limited = any(result.share_of_limit is not None for result in group)
    ratios = [*(["ratio", "in rounds"] if compared else []), *(["of limit"] if limited else [])]
    head = ["", *contenders, *ratios, "target", "reached"]
    return _align([head, *(_format_row(result, compared, limited) for result in group)])


def _format_row(result: Result, compared: bool, limited: bool) -> List[str]:
    values = [format_value(result.median(name), result.unit) for name in result.contenders]
    ratios = [_format_ratio(result.ratio), _format_range(result.ratio_range)] if compared else []
    if limited:
        ratios.append("-" if result.share_of_limit is None else f"{result.share_of_limit:.2f}")
    return [result.title, *values, *ratios, format_goal(result), "yes" if result.is_reached else "NO"]


def _format_ratio(ratio: Optional[float]) -> str:
    return "-" if ratio is None else f"{TIMES}{ratio:.2f}"


def _format_range(bounds: Optional[Tuple[float, float]]) -> str:
    return "-" if bounds is None else f"{bounds[0]:.2f}..{bounds[1]:.2f}"


def _format_tail(results: List[Result]) -> str:
    reached = sum(result.is_reached for result in results)
    failures = Counter(f"{result.name}: {failure}" for result in results for failure in result.failures)
    lines = [f"failed {count} times: {failure}" for failure, count in failures.items()]
    return "\n".join([f"{reached} of {len(results)} targets reached.", *lines])


def _align(rows: List[List[str]]) -> str:
    """Columns as wide as their longest cell, all but the first flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
