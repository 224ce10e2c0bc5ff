"""What a disk can do, whatever it is made of.

Offsets and lengths are bytes and lie within the disk: whoever calls has checked
that. Data that was written is seen by every other process that serves the same
disk as soon as the call returns. Errors are `OSError` with the errno that the
operating system gave.

Mapped memory is handed out, never looked at: a fault inside a system call is an
error to answer, the same fault in Python code would kill the process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Callable, Iterator, List, NamedTuple, Optional, Union

Buffer = Union[bytes, bytearray, memoryview]


def do_nothing() -> None:
    """For `Image.on_wait`, where nobody minds a wait."""


class Extent(NamedTuple):
    """*length* bytes that are alike: all data, or all a *hole* that reads as zeros."""

    length: int
    hole: bool


class Image(ABC):
    """A disk of ``size`` bytes.

    ``flat`` is a view of the whole disk if all of it lies in one mapping: readers
    then slice it themselves, which is the fastest way there is. Else it is None,
    and `read` finds the pieces.
    """

    size: int
    readonly: bool
    flat: Optional[memoryview] = None
    on_wait: Callable[[], None] = staticmethod(do_nothing)
    """Called again and again while a method waits for another process; what it raises ends the wait."""

    readable: Callable[[], int]
    """How many bytes from the start can be reached now: less than ``size`` if the file shrank."""

    @abstractmethod
    def read(self, offset: int, length: int) -> List[memoryview]:
        """The pieces of mapped memory that hold *length* bytes at *offset*, in order."""

    @abstractmethod
    def write(self, offset: int, data: Buffer) -> None:
        """Put *data* at *offset*."""

    @abstractmethod
    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fast: bool) -> None:
        """Make *length* bytes at *offset* read as zeros.

        Space is given back if *may_trim*, else it stays allocated. With *fast*,
        raises `OSError` (EOPNOTSUPP) before anything is changed if it would take
        as long as writing.
        """

    @abstractmethod
    def trim(self, offset: int, length: int) -> None:
        """Give the space of *length* bytes at *offset* back where that is possible."""

    @abstractmethod
    def flush(self) -> None:
        """Return when all that any process has written to this disk is on stable storage."""

    @abstractmethod
    def prefetch(self, offset: int, length: int) -> None:
        """Begin to bring *length* bytes at *offset* closer."""

    @abstractmethod
    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What *length* bytes at *offset* are made of, in order, without gaps."""

    @abstractmethod
    def data_until(self, offset: int) -> int:
        """Where the data at *offset* ends, as far as that is known; *offset* itself in a hole.

        What was data may be a hole by now, which still reads as zeros.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of descriptors and mappings; the image must not be used afterwards."""


class Source(ABC):
    """A disk as the master holds it: opened and checked once, opened again by every worker.

    A worker needs descriptors of its own: record locks belong to a process, and
    errors of delayed writes are reported once per open file.
    """

    name: str
    description: str
    size: int
    readonly: bool

    @abstractmethod
    def open(self) -> Image:
        """The disk for this process. Called after the fork; raises `OSError`."""

    @abstractmethod
    def flush(self) -> None:
        """What `Image.flush` does, for the master."""
