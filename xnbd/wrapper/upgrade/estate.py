"""What a wrapper leaves to the program that it becomes: a JSON object in a file without a name.

`FORMAT` is as that of `server.upgrade.estate`: it speaks for all that processes of one program
say to the wrapper of another one, too, reports and offers of clients.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional

from ...server.upgrade.estate import read_fields, write_fields

FORMAT = 1
_MAGIC = "xnbd-wrapper-upgrade"

Packed = Dict[str, Any]


class WrapperEstate(NamedTuple):
    """What there is when the program changes; the parts are packed by those whose state they are."""

    version: str
    """The version of the program that leaves it."""
    directory: Optional[str]
    """The working directory when the wrapper was started, to which its command line belongs; None: it was gone."""
    listeners: Packed
    database: Packed
    control: Packed
    clients: Packed
    exchange: List[int]
    scoreboard: List[int]
    """Version and table of the scoreboards that clients' processes have (`scoreboard.layout`)."""
    verdict: Packed
    """What the check of the next program has said; empty for the check itself."""
    descriptors: List[int]
    """All that outlive the exec, the estate's own but for one."""
    metrics: Optional[Packed] = None
    rates: Optional[int] = None
    """The limits that hold (`scoreboard.rates`)."""
    state: Optional[int] = None
    """Version of the state files that proxies' processes write (`proxy.state.format`)."""

    @property
    def number_of_clients(self) -> int:
        """Those that negotiate are among them."""
        return len(self.clients["reports"])

    def write(self) -> int:
        """A descriptor of the file that holds it. Raises `OSError`."""
        return write_fields(_MAGIC, FORMAT, self._asdict())


def read_wrapper_estate(fd: int) -> WrapperEstate:
    """What a wrapper has left in *fd*. Raises `ConfigurationError` if this program does not understand it."""
    fields = read_fields(_MAGIC, FORMAT, fd)
    return WrapperEstate(**{name: value for name, value in fields.items() if name in WrapperEstate._fields})
