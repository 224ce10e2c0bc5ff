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
from typing import Any, Dict, List, NamedTuple, Optional

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
    tallies: List[int] = []
    """What former programs of this server have counted, for metrics; the youngest first."""
    observers: List[int] = []
    """Process ids of those who answer ``--metrics``, who end when there is another one."""
    """All that outlive the exec, the estate's own but for one."""


def write_estate(estate: Estate) -> int:
    """A descriptor of the file that holds it. Raises `OSError`."""
    data = json.dumps({"magic": _MAGIC, "format": FORMAT, **estate._asdict()}).encode()
    fd = os.memfd_create("xnbd-upgrade")
    with closed_on_error(fd):
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    return fd


def read_estate(fd: int) -> Estate:
    """What the program before has left in *fd*. Raises `ConfigurationError` if this one does not understand it."""
    try:
        data = b"".join(iter(lambda: os.read(fd, _CHUNK), b"")) if os.lseek(fd, 0, os.SEEK_SET) == 0 else b""
        fields = json.loads(data)
    except (OSError, ValueError):
        fields = {}
    if not isinstance(fields, dict) or fields.pop("magic", None) != _MAGIC:
        raise ConfigurationError(f"descriptor {fd} holds nothing that a server has left for its next program")
    number = fields.pop("format", None)
    if number != FORMAT:
        raise ConfigurationError(
            f"what version {fields.get('version', 'unknown')} leaves has format {number}, this program knows {FORMAT}"
        )
    return Estate(**{name: value for name, value in fields.items() if name in Estate._fields})


def take(estate: Estate) -> None:
    """In the program that goes on: others that it executes do not get the descriptors. Raises `OSError`."""
    Kept(estate.descriptors).hold_back()
