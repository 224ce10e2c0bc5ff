"""What can change while a server or a wrapper runs.

It is read at the start, and again for every reload: from the command line, and from the
files that are named there. What is read is whole and valid, or there is an error and the
former one stays. What is forked later works with the later one; who has a client goes on
with what it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Dict, List, NamedTuple, Optional, Tuple

from ..access.rights import EVERYBODY, Access
from ..errors import ConfigurationError
from ..scoreboard.layout import count_lines
from ..scoreboard.rates import DEFAULT_BURST, Rates
from .session.parking import QueueLimits

if TYPE_CHECKING:
    from .session.handshake import Tls


class Configuration(NamedTuple):
    """Of one server or wrapper; times in seconds, numbers as of the options of these names.

    *access* says who may open which disk, *tls* by what clients are encrypted and prove who they are.
    """

    max_clients: int = 4096
    spare_workers: int = 4
    handshake_timeout: float = 10.0
    max_queue_size: int = 0
    max_buf_size: int = 0
    limit_rate: int = 0
    limit_iops: int = 0
    limit_rate_total: int = 0
    limit_iops_total: int = 0
    limit_burst: float = DEFAULT_BURST
    access: Access = EVERYBODY
    tls: Optional[Tls] = None

    @property
    def processes(self) -> int:
        """As many workers as may be there at once, those that are just leaving included."""
        return 2 * self.max_clients + 4 * self.spare_workers

    @property
    def queue_limits(self) -> QueueLimits:
        return QueueLimits(self.max_queue_size, self.max_buf_size)

    @property
    def rates(self) -> Rates:
        """How fast clients may be, from the start on."""
        return Rates(self.limit_rate, self.limit_iops, self.limit_rate_total, self.limit_iops_total, self.limit_burst)

    def with_rates(self, rates: Rates) -> Configuration:
        """The same, but for how fast clients may be."""
        return self._replace(**{f"limit_{name}": number for name, number in rates._asdict().items()})

    def changes(self, before: Configuration) -> List[str]:
        """What is another than *before*, for people."""
        old, new = before.figures(), self.figures()
        limits = [
            f"{name.replace('_', '-')} {_shown(old[name])} -> {_shown(new[name])}"
            for name in new
            if old[name] != new[name]
        ]
        rules = ["rules"] if self.access != before.access else []
        return [*limits, *rules, *(["certificates or keys"] if self.tls != before.tls else [])]

    def expiries(self) -> List[Tuple[str, float, float]]:
        """Files of certificates, until when they are valid, in seconds since 1970, and how long before that is told."""
        valid = [] if self.tls is None else self.tls.credentials.valid
        return [(path, when.timestamp(), notice.total_seconds()) for path, when, notice in valid]

    def figures(self) -> Dict[str, float]:
        """What another process may be told in numbers."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, (int, float))}


def _shown(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def refuse_without_room(configuration: Configuration, scoreboard_fd: int) -> None:
    """Raises `ConfigurationError` if the scoreboard, which a server makes at its start, is too small for it."""
    room = count_lines(scoreboard_fd)
    if configuration.max_clients + 4 * configuration.spare_workers > room:
        raise ConfigurationError(
            f"max-clients {configuration.max_clients}: this server has room for {room} processes: restart it for more"
        )


Load = Callable[[], Configuration]
"""Reads it again. Raises `ConfigurationError`."""
