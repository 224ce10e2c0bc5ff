"""Numbers for people. All of them are rounded down: what looks complete is complete."""

from __future__ import annotations

from typing import List, Mapping, Sequence, Tuple

from ..control.client import shown
from ..text import counted

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_TIMES = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def size(count: float) -> str:
    """``12.3 GiB``; without a fraction where it is exact."""
    number, unit = _scaled(int(count), 1024)
    return f"{number} {_UNITS[unit]}" if (count, unit) != (1, 0) else "1 byte"


def short_size(count: float) -> str:
    """``12.3G``, ``225M``: at most five characters, for tables."""
    number, unit = _scaled(int(count), 1024)
    return _short(number) + " KMGTPE"[unit].strip()


def short_count(count: int) -> str:
    """At most five characters up to 10^20: ``99999``, ``123K``, ``1.2M``."""
    if count < 100_000:
        return str(count)
    number, unit = _scaled(count, 1000)
    return _short(number) + " KMGTPE"[unit]


def _short(number: str) -> str:
    """Without the fraction where that would make it long."""
    return number.partition(".")[0] if len(number) > 4 else number


def _scaled(count: int, base: int) -> Tuple[str, int]:
    """*count* in the largest unit of which it has one, and that unit's power of *base*."""
    unit, value = 0, 1
    while unit < len(_UNITS) - 1 and count >= value * base:
        unit, value = unit + 1, value * base
    whole, rest = divmod(count, value)
    return (f"{whole}.{rest * 10 // value}" if rest else str(whole)), unit


def percentage(part: float, whole: float) -> str:
    """``99.9 %``; 100 % is everything and nothing less, as nothing of nothing is."""
    if part >= whole:
        return "100 %"
    tenths = max(0, int(part * 1000 // whole))
    if part > 0 and not tenths:
        return "< 0.1 %"
    return f"{tenths // 10}.{tenths % 10} %"


def duration(seconds: float) -> str:
    """``2 h 13 min``: the two largest units; below ten seconds with a fraction."""
    if seconds < 10:
        return f"{max(0, int(seconds * 10)) / 10:.1f} s"
    parts: List[str] = []
    rest = int(seconds)
    for unit, length in _TIMES:
        count, rest = divmod(rest, length)
        if count:
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2])


def short_duration(seconds: float) -> str:
    """``21us``, ``1.2ms``, ``350ms``, ``2.3s``: for tables."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f}us"
    if seconds < 1:
        return f"{seconds * 1e3:.{1 if seconds < 0.01 else 0}f}ms"
    return f"{seconds:.1f}s"


def rate(bytes_per_second: float) -> str:
    return f"{size(bytes_per_second)}/s"


def limits(rates: Mapping[str, float]) -> List[str]:
    """Lines: how fast each client may be, and all of them together."""
    lines = []
    for whom, suffix in (("each client", ""), ("all together", "_total")):
        parts = [rate(rates[f"rate{suffix}"])] if rates.get(f"rate{suffix}") else []
        iops = int(rates.get(f"iops{suffix}", 0))
        parts += [f"{counted(iops, 'request')}/s"] if iops else []
        lines.append(f"{whom}: {', '.join(parts) or 'no limit'}")
    if any(rates.get(name) for name in ("rate", "iops", "rate_total", "iops_total")):
        lines.append(f"at once: what {rates['burst']:g} s allow")
    return lines


def reloaded(changes: Sequence[str], clients: int) -> str:
    """What ``--reload`` prints of its success."""
    what = ", ".join(map(shown, changes)) or "nothing has changed"
    return f"configuration read again: {what}; clients that go on: {clients}\n"
