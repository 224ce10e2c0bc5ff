"""What a disk can do, whatever it is made of.

Offsets and lengths are bytes and lie within the disk: whoever calls has checked
that. Data that was written is seen by every other process that serves the same
disk as soon as the call returns. Errors are `OSError` with the errno that the
operating system gave.

Mapped memory is handed out, never looked at: a fault inside a system call is an
error to answer, the same fault in Python code would kill the process.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import (
    Any,
    Callable,
    Dict,
    Generic,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    TypeVar,
    Union,
)

from ..system.file_locks import do_nothing
from ..system.kept import Kept
from .writeback import Record, WriteBack

Buffer = Union[bytes, bytearray, memoryview]

FETCH_STEP = 16 << 20
"""Bytes whose blocks one `Image.fetch` waits for at once; what lies behind them comes after."""


class Extent(NamedTuple):
    """*length* bytes that are alike: all data, or all a *hole* that reads as zeros."""

    length: int
    hole: bool


class Part(NamedTuple):
    """*length* bytes of which something is *so*, or is not."""

    length: int
    so: bool


class Parcel(bytearray):
    """*data* of the blocks from ``first`` up to ``end``, which have come and could not be kept."""

    def __init__(self, first: int, end: int, data: bytes) -> None:
        super().__init__(data)
        self.first = first
        self.end = end


class Ticket:
    """What a request waits for: it is done once nothing is ``pending``, with an errno in ``error`` if that failed.

    ``parcels`` are blocks that have come and could not be kept, if there are any. ``locked`` tells for how
    many seconds, of those that somebody waits for it, it waits itself for what another process has locked.
    """

    __slots__ = ("error", "locked", "parcels", "pending")

    def __init__(self) -> None:
        self.locked = 0.0
        self.pending = 0
        self.error = 0
        self.parcels: Optional[List[Parcel]] = None


class NotLocal(Exception):
    """A request needs blocks that are not here: try again once *ticket* is done.

    Of a write, nothing was written, or something that writing again makes no worse.
    """

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket

    def __str__(self) -> str:
        return "blocks are not local"


class Background(ABC):
    """Work on behalf of a disk that goes on while its server waits for a client."""

    finished: List[Ticket]
    """Tickets that are done; whoever does their requests again takes them off."""

    @property
    @abstractmethod
    def trouble(self) -> str:
        """Why the origin cannot be reached, while that is so; else empty."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether anything is under way or might come; if not, `progress` has nothing to do."""

    @property
    @abstractmethod
    def quiet(self) -> bool:
        """Whether nothing has come for a while, so that nothing is likely to come in the next moment."""

    @property
    @abstractmethod
    def health(self) -> int:
        """What is told of the origin: `layout.REACHED` of the scoreboard, and its like."""

    @abstractmethod
    def news(self) -> Optional[Sequence[Tuple[int, float, int, str]]]:
        """If the disk has several origins, how they are, each time that there is something to tell.

        Each is a health as in `layout`, the seconds to an answer, the bytes that it has sent since, and its trouble.
        """

    @property
    @abstractmethod
    def returns(self) -> int:
        """How often the origin has answered again after it was lost, or could not be reached."""

    @abstractmethod
    def interests(self) -> List[Tuple[int, int]]:
        """Descriptors to wait for, each with its poll events."""

    @abstractmethod
    def deadline(self) -> Optional[float]:
        """When `progress` wants to be called in any case, in monotonic seconds."""

    @abstractmethod
    def progress(self) -> None:
        """Do all that can be done without waiting."""

    @abstractmethod
    def approach(self) -> bool:
        """Connect to the origin, if that is not done; whether it is there. There is a result when it is."""

    @abstractmethod
    def abandon(self) -> None:
        """Nobody waits any more: let go of everything but what is on its way already."""

    @abstractmethod
    def take_leave(self) -> None:
        """The process is about to end: say so to whom it works with, without waiting."""


class Image(ABC):
    """A disk of ``size`` bytes.

    ``flat`` is a view of the whole disk if all of it lies in one mapping: readers
    then slice it themselves, which is the fastest way there is. Else it is None,
    and `read` finds the pieces. ``flat_fd`` is the same for writers: the file that is
    the disk, byte for byte, or None if `write` has to find the places.
    """

    size: int
    readonly: bool
    flat: Optional[memoryview] = None
    flat_fd: Optional[int] = None
    background: Optional[Background] = None
    """What brings blocks that are not local; without it no method raises `NotLocal`."""

    on_wait: Callable[[], None] = staticmethod(do_nothing)
    """Called again and again while a method waits for another process; what it raises ends the wait."""

    readable: Callable[[], int]
    """How many bytes from the start can be reached now: less than ``size`` if the file shrank."""

    def count_in(self, counts: List[int]) -> None:
        """Count what was missed and fetched in *counts*, at the places that the scoreboard's `counters` have for it."""
        del counts  # but for a proxy nothing is

    def tell_coming_by(self, tell: Callable[[int], None]) -> None:
        """Have *tell* hear how many blocks are on their way, where that is counted (`scoreboard.room`)."""
        del tell  # but for a cache with a limit nothing is

    @abstractmethod
    def read(self, offset: int, length: int) -> List[memoryview]:
        """The pieces of mapped memory that hold *length* bytes at *offset*, in order."""

    def take(self, parcels: Optional[List[Parcel]]) -> None:
        """Until the next call the blocks in *parcels* count as if they were here."""
        del parcels  # only for a proxy there are any

    def wait_with(self, on_wait: Callable[[], None]) -> None:
        """Have *on_wait* called while a method waits."""
        self.on_wait = on_wait

    @abstractmethod
    def pread(self, offset: int, length: int) -> bytes:
        """A copy of *length* bytes at *offset*, for who looks at bytes: encrypts, sums up or traces them.

        Raises `NotLocal` as `read` does, and `OSError` (EIO) if the file has shrunk.
        """

    def read_fresh(self, offset: int, length: int) -> List[memoryview]:
        """What `read` does, for bytes that have just come and nobody has mapped yet."""
        return self.read(offset, length)

    def on_unreadable(self, offset: int, length: int) -> None:
        """Of what `read` has given the kernel could not read some, and a client has had an error."""
        del offset, length  # only a proxy has its blocks from somewhere else

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
        """Return when all that any process has written to this disk is on stable storage.

        Raises `WriteBackFailed` if any write-back of the disk has failed since the server's start.
        """

    @abstractmethod
    def prefetch(self, offset: int, length: int) -> None:
        """Begin to bring *length* bytes at *offset* closer."""

    def fetch(self, offset: int, length: int) -> None:
        """Have *length* bytes at *offset* at hand, as near as they can be."""
        self.prefetch(offset, length)

    @abstractmethod
    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What *length* bytes at *offset* are made of, in order, without gaps."""

    def cached(self, offset: int, length: int) -> Iterator[Part]:
        """Which of *length* bytes at *offset* need no origin, in order, without gaps."""
        yield Part(length, so=True)

    def written(self, offset: int, length: int) -> Iterator[Part]:
        """Which of them are nowhere else, likewise."""
        yield Part(length, so=True)

    @abstractmethod
    def data_until(self, offset: int) -> int:
        """Where the data at *offset* ends, as far as that is known; *offset* itself in a hole.

        What was data may be a hole by now, which still reads as zeros.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of descriptors and mappings; the image must not be used afterwards."""


class Shared(Protocol):
    """What a disk needs of the memory that all its processes share: the file, and room for a `Record` in it."""

    fd: int
    failure_at: int


AnyShared = TypeVar("AnyShared", bound=Shared, contravariant=True)


Identity = Tuple[int, ...]


def file_identity(fd: int) -> Identity:
    """Device and inode of the file behind *fd*; and its own device number, for one that is a device."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_rdev


class Source(ABC, Generic[AnyShared]):
    """A disk as the master holds it: opened and checked once, opened again by every worker.

    What all processes of the disk share is handed in, as that of the process that calls.

    A worker needs descriptors of its own: record locks belong to a process, and
    errors of delayed writes are reported once per open file (`storage.writeback`).
    """

    mode: str
    path: str
    name: str
    description: str
    size: int
    readonly: bool

    @abstractmethod
    def open(self, shared: AnyShared) -> Image:
        """The disk for this process. Called after the fork; raises `OSError`."""

    def is_whole(self, shared: AnyShared) -> bool:
        """Whether all of the disk is here, so that there can be snapshots of it."""
        del shared  # but for a proxy's it is
        return True

    def allocated(self) -> int:
        """Bytes of storage that the disk's content takes, about."""
        return self.size

    @abstractmethod
    def length(self) -> int:
        """Bytes of the file that the disk is read from: fewer than the disk's if it has shrunk. Raises `OSError`."""

    @abstractmethod
    def identity(self) -> Identity:
        """The file that holds what clients write, whatever it is called: two sources with the same one are one disk."""

    @property
    def scoreboard_fd(self) -> Optional[int]:
        """The file that all processes of the disk share, if servers that are started separately share it too."""
        return None

    def write_back(self, shared: AnyShared) -> WriteBack:
        """How a process syncs the disk, and knows whether that has failed."""
        return WriteBack(Record(shared.fd, shared.failure_at))

    @abstractmethod
    def pack(self, kept: Kept) -> Dict[str, Any]:
        """What the next program of the master needs, to go on with the disk without opening it: see its ``unpack``."""

    @abstractmethod
    def flush(self, shared: AnyShared) -> None:
        """What `Image.flush` does, for the master, when the workers are gone."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the image in this process; once all of the server's have, others may use it as they like."""
