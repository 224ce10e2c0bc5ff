"""What a proxy needs of an origin, whatever protocol that speaks.

To add a kind of origin, write a module with its `Origin` and an address of its own
(`OriginAddress`), and add one line to `address.SCHEMES`. These rules hold for all of them:

- An origin is opened, used and closed in one process, after the fork, and in one thread.
- No method waits, but `Origin.wait`. What takes time goes on by itself: in the kernel, or in threads.
- What has come makes a descriptor of `Origin.interests` ready, an ``eventfd(2)`` for
  example, and is handed to the sink by the next `Origin.progress`, nowhere else.
  Threads of an origin call no method of the sink, and write nothing to the log.
- Descriptors are closed on exec. Threads block all signals. After `Origin.close` none does
  anything any more; one may still sleep in a call that cannot be broken off.
- Whoever forks has no origin that starts threads (`OriginAddress.starts_threads`).
- The origin is read, never written.
- The origin is not believed: what comes for a request lies within it, block borders
  are kept (`Sink.on_data`), and errors are those that this system knows.
"""

from __future__ import annotations

import select
from abc import ABC, abstractmethod
from enum import IntEnum
from time import monotonic
from typing import Any, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple, Union

from ..errors import ConfigurationError, XnbdError

Data = Union[bytes, memoryview]

BLOCK = 4096
"""Bytes at whose multiples answers are cut (`Sink.on_data`)."""

_USAGE_ERROR = 2


class OriginLost(XnbdError):
    """The origin is no more at hand, or never was; the message names it and says why.

    ``refused`` tells that the origin was there, and that asking again will not help,
    ``changed`` that another disk is there now: of the one that is cached nothing more comes.
    """

    def __init__(self, message: str, *, refused: bool = False, changed: bool = False) -> None:
        super().__init__(message)
        self.refused = refused
        self.changed = changed


class Sink(Protocol):
    """Where replies go. A *token* is what the request was asked under; errors are errno values.

    The methods are called with the origin at work: they may ask for more, but
    neither close it nor raise anything. Offsets and lengths are bytes.
    """

    def on_data(self, token: Any, offset: int, data: Data) -> None:
        """Bytes of the disk at *offset*. A view is valid during the call only.

        A read may be answered in several pieces, in any order. Each piece but a read's
        last one ends where a block of 4,096 bytes ends, so that no block is written twice.
        """

    def on_hole(self, token: Any, offset: int, length: int) -> None:
        """*length* zeros at *offset*, which an origin need not send as data."""

    def on_extents(self, token: Any, extents: List[Tuple[int, bool]]) -> None:
        """The next extents, as pairs of a length and whether all of it reads as zeros.

        May be called several times. They end within the request, perhaps before its end.
        """

    def on_done(self, token: Any, error: int) -> None:
        """The request is over, and nothing comes for it any more. What came is good if *error* is 0, else void."""


class Witness:
    """Knows which disk is cached, for an origin that lies in several places. This one knows nothing."""

    def vouch(self, address: OriginAddress, version: str) -> None:
        """Raises `OriginLost` if the disk at *address* with that `Origin.version` is not the one that is cached."""

    def note_change(self, address: OriginAddress) -> bool:
        """The disk at *address* has changed; whether that is news for all processes. Raises `OSError`."""
        return True


class Terms(NamedTuple):
    """What an origin has to keep to. Times are seconds.

    A disk of another size than *expected_size* bytes is refused. *connect_timeout* bounds
    the time until the origin is ready, *reply_timeout* the time without a byte while
    requests wait (None: for ever). *told* is what the log has of each place of a disk that
    lies in several and is not at hand there; the owner keeps it from one attempt to the next.
    """

    expected_size: Optional[int] = None
    connect_timeout: float = 10.0
    reply_timeout: Optional[float] = None
    witness: Witness = Witness()
    told: Optional[Dict[str, str]] = None


class Health(IntEnum):
    """How one of several origins is."""

    UNTRIED = 0
    REACHED = 1
    UNREACHABLE = 2
    SLOW = 3
    """It is silent, or answers with errors: asked for nothing, unless no other one is there."""

    REFUSED = 4
    """It has another disk."""


class Standing(NamedTuple):
    """How one of several origins is: seconds to an answer, *sent* bytes that were of use since the last news."""

    health: Health
    latency: float = 0.0
    sent: int = 0
    trouble: str = ""


class Origin(ABC):
    """A way to the disk at ``address``, from `start` to `close`, or until it raises `OriginLost`.

    Where a method says that it raises `OriginLost`, it does so once: the origin has let go
    of everything then, and there is only `unfinished` left to ask, and `close`, which does
    nothing more.
    """

    heard_at: float
    """When the last bytes came, in monotonic seconds."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether the disk is known and can be asked for; what the next five tell holds then."""

    @property
    @abstractmethod
    def size(self) -> int:
        """The disk's size in bytes."""

    @property
    def version(self) -> str:
        """One line that another one replaces as soon as anything on the disk changes; empty if the origin has none.

        An origin that has one hands nothing to the sink that is of another version.
        """
        return ""

    @property
    @abstractmethod
    def maximum_read(self) -> int:
        """The most bytes that one `read` may ask for, 4,096 at least."""

    @property
    @abstractmethod
    def can_tell_zeros(self) -> bool:
        """Whether there is an answer to `query_extents`."""

    @property
    @abstractmethod
    def outstanding(self) -> int:
        """Requests that are not done, queued ones included."""

    @property
    def window(self) -> Optional[int]:
        """Bytes that are worth asking for at once where nobody waits; None: the times of the replies tell that."""
        return None

    @property
    def restless(self) -> bool:
        """Whether it looks after its connections, and wants `progress` though nothing is asked."""
        return False

    def news(self) -> Optional[Sequence[Standing]]:
        """If the disk lies in several places, how they are, each time that there is something to tell."""
        return None

    @abstractmethod
    def unfinished(self) -> List[Any]:
        """Tokens of the requests that are not done, in the order in which they were asked."""

    @abstractmethod
    def interests(self) -> List[Tuple[int, int]]:
        """Descriptors to wait for before `progress`, each with its poll events; others after every call perhaps."""

    @property
    @abstractmethod
    def deadline(self) -> Optional[float]:
        """When `progress` has to be called in any case, in monotonic seconds; None if nothing takes its time."""

    @abstractmethod
    def start(self) -> None:
        """Begin to make it ready. Raises `OriginLost`."""

    @abstractmethod
    def read(self, token: Any, offset: int, length: int) -> None:
        """Ask for *length* bytes at *offset*, at most `maximum_read`; may be queued until `push` or `progress`."""

    @abstractmethod
    def query_extents(self, token: Any, offset: int, length: int) -> None:
        """Ask where *length* bytes at *offset*, less than 4 GiB, are zeros; queued like a read.

        Only if it `can_tell_zeros`.
        """

    @abstractmethod
    def push(self) -> None:
        """Send what is queued, as far as that needs no waiting. Raises `OriginLost`."""

    @abstractmethod
    def progress(self) -> None:
        """Send what is queued, hand what has come to the sink, and give up what has taken too long.

        Returns after a while, even if more has come. Raises `OriginLost`.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of everything, whatever is outstanding: nothing goes to the sink any more."""

    def wait(self, seconds: Optional[float] = None) -> None:
        """For who has nothing else to wait for: sleep until there is something to do, then `progress`.

        Sleeps at most *seconds* (None: as long as it takes). Raises `OriginLost`.
        """
        until = [] if seconds is None else [monotonic() + seconds]
        if self.deadline is not None:
            until.append(self.deadline)
        poll = select.poll()
        for fd, events in self.interests():
            poll.register(fd, events)
        poll.poll(max(0.0, min(until) - monotonic()) * 1000 + 1 if until else None)
        self.progress()


class OriginAddress(Protocol):
    """Where an origin is, and how it is reached."""

    def __str__(self) -> str:
        """The address as a URI, which `address.parse_origin` understands."""

    @property
    def local_files(self) -> Dict[str, int]:
        """Paths of this computer that a process uses to get there, each with the rights to it (``access(2)``)."""

    @property
    def fetch_size(self) -> int:
        """Bytes that are worth asking for at once, where less is missing of them: 4,096 at least, a power of 2."""

    @property
    def starts_threads(self) -> bool:
        """Whether an origin from here starts threads."""

    @property
    def place(self) -> str:
        """What tells the disk from all others, however it is reached: the address as a URI, with nothing else in it."""

    def overrules(self, noted: OriginAddress) -> bool:
        """Whether this one, of a command line, counts in place of *noted*, to which a running proxy was moved once.

        Only one that says anew how the same `place` is reached does.
        """

    def common(self, version: str) -> str:
        """What a disk of that `Origin.version` here shares with the same disk elsewhere: another text, another disk.

        Empty if nothing can be told from it.
        """

    def warnings(self) -> List[str]:
        """What will soon keep this computer from getting there, or is no good there, in lines for the operator."""

    def open(self, sink: Sink, terms: Terms) -> Origin:
        """The origin at this address, yet to be started. Imports what it needs; may raise `OSError`."""


def wrong(text: str, what: str) -> ConfigurationError:
    """*text*, which should say where an origin is, cannot be used because of *what*."""
    return ConfigurationError(f"origin {text}: {what}", _USAGE_ERROR)
