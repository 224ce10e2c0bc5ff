"""What is left of the programs before, in the master after an exec, until all of it has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Optional, Set

from ..crew import Crew

if TYPE_CHECKING:
    from .estate import Estate


class Former:
    """The workers and stewards of the programs before this one."""

    def __init__(self, estate: Optional[Estate]) -> None:
        self.crews: List[Crew] = []
        self.stewards: Set[int] = set()
        if estate is not None:
            self.crews = [Crew.unpack(crew) for crew in estate.crews]
            self.stewards = set(estate.former_stewards)

    @property
    def clients(self) -> int:
        return sum(len(crew.clients) for crew in self.crews)

    def pids(self) -> List[int]:
        return [*self.stewards, *(pid for crew in self.crews for pid in crew.pids())]

    def dismiss(self) -> None:
        """End the spare workers, and the others when their clients leave."""
        for crew in self.crews:
            crew.dismiss()

    def read_reports(self) -> None:
        for crew in self.crews:
            crew.read_reports()

    def forget_empty(self) -> List[Crew]:
        """The crews that have no workers any more. A steward has its crew's lifeline: they go after the stewards."""
        if self.stewards:
            return []
        empty = [crew for crew in self.crews if not len(crew)]
        self.crews = [crew for crew in self.crews if len(crew)]
        return empty

    def close(self) -> None:
        """In a child of the master."""
        for crew in self.crews:
            crew.close()
