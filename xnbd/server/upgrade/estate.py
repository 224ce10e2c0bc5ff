"""What a master leaves to the program that it becomes: a JSON object in a file without a name.

``contrib/doc/protocols.rst`` lists its fields. The rules:

- `FORMAT` counts up when a field means something else, or one is gone. A program that meets
  another number refuses, and that is known before anything happens. A new field needs no new
  number if a program that does not know it may pass over it.
- `FORMAT` speaks for all that the workers and the steward of one program share with the master of
  another one besides: reports, retirements, the pool, the steward's link, and how a client is
  handed over.
- The scoreboard, the state file and the bitmap have versions of their own.
"""

from __future__ import annotations

import json
import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from ...errors import ConfigurationError
from ...system.kept import Kept
from ...system.process import closed_on_error

FORMAT = 1
_MAGIC = "xnbd-upgrade"
_CHUNK = 1 << 20

Packed = Dict[str, Any]


class Estate(NamedTuple):
    """What there is when the program changes; the parts are packed by those whose state they are."""

    version: str
    """The version of the program that leaves it."""
    directory: Optional[str]
    """The working directory when the server was started, to which its command line belongs; None: it was gone."""
    mode: str
    disk: Packed
    scoreboard: int
    premises: Packed
    crew: Packed
    pool: List[int]
    steward: Packed
    number: int
    """Of the steward's request, which is answered when the next program is at work."""
    former_stewards: List[int]
    """Process ids of those that have given way to a steward of a later program, and have not ended yet."""
    descriptors: List[int]
    """All that outlive the exec, the estate's own but for one."""
    tallies: Sequence[int] = ()
    """What programs of this server have counted, for metrics; the youngest first."""
    rates: Optional[int] = None
    """The limits that hold (`scoreboard.rates`)."""
    observers: Sequence[int] = ()
    """Process ids of those who answer ``--metrics``, and end when there is another one."""

    @property
    def number_of_clients(self) -> int:
        return len(self.crew["clients"])

    def write(self) -> int:
        """A descriptor of the file that holds it. Raises `OSError`."""
        return write_fields(_MAGIC, FORMAT, self._asdict())


def write_fields(magic: str, number: int, fields: Packed) -> int:
    """A descriptor of the file that holds *fields* in the format *number*. Raises `OSError`."""
    data = json.dumps({"magic": magic, "format": number, **fields}).encode()
    fd = os.memfd_create("xnbd-upgrade")
    with closed_on_error(fd):
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    return fd


def read_fields(magic: str, number: int, fd: int) -> Packed:
    """What the program before has left in *fd*. Raises `ConfigurationError` if this one does not understand it."""
    try:
        data = b"".join(iter(lambda: os.read(fd, _CHUNK), b"")) if os.lseek(fd, 0, os.SEEK_SET) == 0 else b""
        fields = json.loads(data)
    except (OSError, ValueError):
        fields = {}
    if not isinstance(fields, dict) or fields.pop("magic", None) != magic:
        raise ConfigurationError(f"descriptor {fd} holds nothing that a server has left for its next program")
    found = fields.pop("format", None)
    if found != number:
        raise ConfigurationError(
            f"what version {fields.get('version', 'unknown')} leaves has format {found}, this program knows {number}"
        )
    return fields


def read_estate(fd: int) -> Estate:
    """What a server has left. Raises `ConfigurationError`."""
    fields = read_fields(_MAGIC, FORMAT, fd)
    return Estate(**{name: value for name, value in fields.items() if name in Estate._fields})


def take(estate: Estate) -> None:
    """In the program that goes on: others that it executes do not get the descriptors. Raises `OSError`."""
    Kept(estate.descriptors).hold_back()
