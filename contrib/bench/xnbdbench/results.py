"""Samples of a measurement and what follows from them; the form in which they are stored as JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Literal, Optional, Tuple

LIMIT = "limit"
"""The reference that does in C what the subject does."""

Unit = Literal["iops", "MB/s", "ms", "µs", "s", "MiB", "%", "disks"]
Panel = Literal["", "small", "throughput"]

TIMES = "\N{MULTIPLICATION SIGN}"

_MORE_IS_BETTER = ("iops", "MB/s")


@dataclass(frozen=True)
class Goal:
    """``ratio``: at least so many times better than the best of the others; the others: in the measurement's unit.

    With *of_limit* also at least that share of what the C program of the same technique has.
    """

    kind: Literal["ratio", "at most", "at least"]
    bound: float
    of_limit: float = 0.0


def ratio(bound: float, of_limit: float = 0.0) -> Goal:
    return Goal("ratio", bound, of_limit)


def at_most(bound: float) -> Goal:
    return Goal("at most", bound)


def at_least(bound: float) -> Goal:
    return Goal("at least", bound)


@dataclass
class Result:
    """All samples of one measurement; the first contender is the subject.

    It is not compared with those in ``references``.
    """

    name: str
    title: str
    unit: Unit
    goal: Goal
    panel: Panel
    contenders: List[str]
    samples: Dict[str, List[Dict[str, Any]]] = field(default_factory=dict)
    references: List[str] = field(default_factory=list)

    @property
    def subject(self) -> str:
        return self.contenders[0]

    @property
    def failures(self) -> List[str]:
        return [f"{name}: {one['error']}" for name in self.contenders for one in self.samples[name] if "error" in one]

    def median(self, contender: str) -> Optional[float]:
        """None if no sample succeeded."""
        values = [one["value"] for one in self.samples[contender] if "value" in one]
        return statistics.median(values) if values else None

    @property
    def best_rival(self) -> Optional[str]:
        """The one with the best median of those that the subject is compared with."""
        medians = {name: self.median(name) for name in self.contenders[1:] if name not in self.references}
        known = {name: value for name, value in medians.items() if value is not None}
        if not known:
            return None
        return (max if self.unit in _MORE_IS_BETTER else min)(known, key=lambda name: known[name])

    @property
    def ratio(self) -> Optional[float]:
        """How many times better the subject's median is than the best rival's."""
        rival = self.best_rival
        return self._times_better(self.median(self.subject), self.median(rival)) if rival else None

    @property
    def ratio_range(self) -> Optional[Tuple[float, float]]:
        """Least and greatest ratio to the best rival within one round."""
        rival = self.best_rival
        if rival is None:
            return None
        pairs = zip(self.samples[self.subject], self.samples[rival])
        ratios = [self._times_better(ours.get("value"), theirs.get("value")) for ours, theirs in pairs]
        known = [one for one in ratios if one is not None]
        return (min(known), max(known)) if known else None

    @property
    def share_of_limit(self) -> Optional[float]:
        """How near the subject's median comes to that of the C program of the same technique, if that was measured."""
        limits = [name for name in self.references if name.startswith(LIMIT)]
        return self._times_better(self.median(self.subject), self.median(limits[0])) if limits else None

    @property
    def is_reached(self) -> bool:
        reached = self.ratio if self.goal.kind == "ratio" else self.median(self.subject)
        if reached is None or (self.goal.of_limit and (self.share_of_limit or 0.0) < self.goal.of_limit):
            return False
        return reached <= self.goal.bound if self.goal.kind == "at most" else reached >= self.goal.bound

    def to_json(self) -> Dict[str, Any]:
        """The samples, and for readers of the file what follows from them."""
        return {
            **asdict(self),
            "medians": {name: self.median(name) for name in self.contenders},
            "best_rival": self.best_rival,
            "ratio": self.ratio,
            "share_of_limit": self.share_of_limit,
            "reached": self.is_reached,
        }

    @classmethod
    def from_json(cls, stored: Dict[str, Any]) -> Result:
        fields = {name: stored[name] for name in cls.__dataclass_fields__ if name in stored or name != "references"}
        return cls(**{**fields, "goal": Goal(**stored["goal"])})

    def _times_better(self, ours: Optional[float], theirs: Optional[float]) -> Optional[float]:
        if not ours or not theirs:
            return None
        return ours / theirs if self.unit in _MORE_IS_BETTER else theirs / ours
