"""Options that say how fast clients may be."""

from __future__ import annotations

from typing import Any, Dict

from ..errors import ConfigurationError
from .values import USAGE_ERROR, CommandLine

RATES = {
    "--limit-rate": "rate",
    "--limit-iops": "iops",
    "--limit-rate-total": "rate_total",
    "--limit-iops-total": "iops_total",
    "--limit-burst": "burst",
}
"""The options, and their fields of `scoreboard.rates.Rates`."""


def given_rates(line: CommandLine) -> Dict[str, Any]:
    """What *line* says of them, by those fields. Raises `ConfigurationError`."""
    return {field: _number(line, option) for option, field in RATES.items() if line.knows(option) and line.has(option)}


def _number(line: CommandLine, option: str) -> float:
    from ..scoreboard.rates import LARGEST_LIMIT, LONGEST_BURST

    if option == "--limit-burst":
        seconds = line.seconds(option)
        if seconds > LONGEST_BURST:
            raise ConfigurationError(
                f"{option} {line.needed(option)}: expected at most {LONGEST_BURST:g} seconds", USAGE_ERROR
            )
        return seconds
    return line.integer(option, 0, LARGEST_LIMIT) if "iops" in option else line.size_or_zero(option)
