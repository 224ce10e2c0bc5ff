"""What came of an upgrade, for the operator and for the log."""

from __future__ import annotations

from typing import Any, Dict, Mapping, NamedTuple, Optional


class Outcome(NamedTuple):
    """From version *old* to *new*; *staying* says how many clients stay for each reason."""

    old: str
    new: str
    moved: int
    staying: Mapping[str, int]
    longest_pause: Optional[float]
    """Of all clients that moved, in milliseconds; None if none did."""

    def message(self) -> Dict[str, Any]:
        """The answer on the control socket."""
        return {
            "done": True,
            "from": self.old,
            "to": self.new,
            "moved": self.moved,
            "staying": dict(self.staying),
            "longest_pause_ms": self.longest_pause,
        }

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> Outcome:
        """Raises `KeyError` for an answer that makes no sense."""
        names = ("from", "to", "moved", "staying", "longest_pause_ms")
        return cls(*(answer[name] for name in names))

    def __str__(self) -> str:
        text = f"{self.old} -> {self.new}: {self.moved} client{'s' if self.moved != 1 else ''} moved"
        if self.longest_pause is not None:
            text += f", longest pause {self.longest_pause:.0f} ms"
        if self.staying:
            number = sum(self.staying.values())
            verbs = ("stay", "they leave") if number > 1 else ("stays", "it leaves")
            text += f"; {number} {verbs[0]} with {self.old} until {verbs[1]} ({', '.join(self.staying)})"
        return text
