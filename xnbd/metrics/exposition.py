"""Families of metrics as text: the format of OpenMetrics 1.0, and the older one of Prometheus (0.0.4).

The two differ in the names of counters and of infos, and in the last line. Pure.
"""

from __future__ import annotations

from typing import Iterator, List, NamedTuple, Sequence, Tuple, Union

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PLAIN = "text/plain; version=0.0.4; charset=utf-8"

Labels = Tuple[Tuple[str, str], ...]
Number = Union[int, float]


class Histogram(NamedTuple):
    """How many observations there are in each bucket (one more than *bounds*), and their *total*."""

    bounds: Sequence[float]
    buckets: Sequence[int]
    total: float


class Family(NamedTuple):
    """All samples of one name. *kind*: counter, gauge, histogram or info. The *unit* is the end of the name."""

    name: str
    kind: str
    help: str
    samples: List[Tuple[Labels, Union[Number, Histogram]]]
    unit: str = ""


def openmetrics(families: Sequence[Family]) -> bytes:
    """The text of ``application/openmetrics-text``."""
    lines: List[str] = []
    for family in families:
        lines.append(f"# TYPE {family.name} {family.kind}\n")
        if family.unit:
            lines.append(f"# UNIT {family.name} {family.unit}\n")
        lines.append(f"# HELP {family.name} {_escaped(family.help)}\n")
        lines.extend(_samples(family))
    return _encoded([*lines, "# EOF\n"])


def plain(families: Sequence[Family]) -> bytes:
    """The text of ``text/plain; version=0.0.4``, which knows neither infos nor units."""
    lines: List[str] = []
    for family in families:
        name = family.name + _SUFFIXES.get(family.kind, "")
        kind = "gauge" if family.kind == "info" else family.kind
        help_text = family.help.replace("\\", "\\\\").replace("\n", "\\n")
        lines += [f"# HELP {name} {help_text}\n", f"# TYPE {name} {kind}\n"]
        lines.extend(_samples(family))
    return _encoded(lines)


_SUFFIXES = {"counter": "_total", "info": "_info"}


def _samples(family: Family) -> Iterator[str]:
    name = family.name + _SUFFIXES.get(family.kind, "")
    for labels, value in family.samples:
        inner = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
        if isinstance(value, Histogram):
            yield from _histogram(name, inner, value)
        else:
            yield f"{name}{{{inner}}} {value}\n" if inner else f"{name} {value}\n"


def _histogram(name: str, inner: str, value: Histogram) -> Iterator[str]:
    count, before = 0, f"{inner}," if inner else ""
    for bound, number in zip((*value.bounds, None), value.buckets):
        count += number
        yield f'{name}_bucket{{{before}le="{"+Inf" if bound is None else bound}"}} {count}\n'
    labels = f"{{{inner}}}" if inner else ""
    yield f"{name}_count{labels} {count}\n"
    yield f"{name}_sum{labels} {value.total}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _encoded(lines: List[str]) -> bytes:
    """What is no UTF-8, as in the name of a file perhaps, stays legible."""
    return "".join(lines).encode("utf-8", "backslashreplace")
