"""Whether what an open image reads is still there: its snapshot, and for a clone the snapshots that it stands on.

Ceph does not tell who only reads that a snapshot is removed. What was in it then reads as zeros, or as what was
written since, without an error. So what has been read counts only if the cluster, asked afterwards, still has
the snapshot of each image in the lineage. These rules make that certain:

- The one who removes a snapshot marks it in the header of its image first, as being in the trash, and only then
  gives up its id (librbd's ``SnapshotRemoveRequest``; before Ceph 13 it was taken out of the header first).
- A snapshot in the trash stays as long as it has children, and a clone is taken off that count before it
  makes the cluster let go of it (``DetachChildRequest``).
- A flattened clone stands on less than before. So an image that is opened after its lineage was looked up stands
  on nothing else.

An image without a snapshot has only the time of its last write, which the cluster notes now and then.

The questions are calls of the class ``rbd``, the same that librbd asks when it opens an image (``cls_rbd.cc``),
so they need no more rights. Their answers are laid out as ``cls_rbd_types.cc`` says, all numbers little-endian.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

from ..base import OriginLost

_TRASH = 2
"""The kind of a snapshot that is removed, or will be when its last child is gone."""


class Parent(NamedTuple):
    """The snapshot that a clone stands on."""

    pool: int
    namespace: str
    image: str
    snapshot: int


class Pin(NamedTuple):
    """One question to the object *header* in *pool*, and whether its answer tells that all is as it was."""

    pool: Any
    header: str
    method: str
    question: bytes
    holds: Callable[[bytes], bool]


class Lineage:
    """What an image stands on, itself included. Used by threads that wait, after `look_up` by several at once."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._pools: List[Any] = []
        self._pins: List[Pin] = []

    @property
    def has_parents(self) -> bool:
        return len(self._pins) > 1

    def look_up(self, pin: Pin) -> None:
        """*pin* is the image's own. Waits; raises ``rados.Error``."""
        self._pins.append(pin)
        parent = _parent_of(pin)
        while parent:
            pool = self._cluster.open_ioctx2(parent.pool)
            self._pools.append(pool)
            pool.set_namespace(parent.namespace)
            pin = pin_snapshot(pool, parent.image, parent.snapshot, is_there)
            self._pins.append(pin)
            parent = _parent_of(pin)

    def is_intact(self) -> bool:
        """Whether all of it is still there. Waits; raises ``rados.Error``, with ENOENT if an image is not."""
        return all(pin.holds(_ask(pin)) for pin in self._pins)

    def close(self) -> None:
        """Call it when no other call is under way."""
        for pool in self._pools:
            pool.close()


def pin_snapshot(pool: Any, image: str, snapshot: int, holds: Callable[[bytes], bool]) -> Pin:
    """Images and snapshots are known by their ids."""
    return Pin(pool, _header_of(image), "snapshot_get", struct.pack("<Q", snapshot), holds)


def pin_last_write(pool: Any, image: str) -> Tuple[Pin, datetime]:
    """Of an image without a snapshot, with that time as far as the cluster notes it. Waits; raises ``rados.Error``."""
    pin = Pin(pool, _header_of(image), "get_modify_timestamp", b"", lambda answer: answer == first)
    first = _ask(pin)
    return pin, parse_time(first)


def _header_of(image: str) -> str:
    """The object that has all that is known of an image."""
    return f"rbd_header.{image}"


def _parent_of(pin: Pin) -> Optional[Parent]:
    return parse_parent(_ask(pin._replace(method="parent_get", question=b"")))


def _ask(pin: Pin) -> bytes:
    answer: bytes = pin.pool.execute(pin.header, "rbd", pin.method, pin.question)[1]
    return answer


# Answers of the cluster


def parse_time(answer: bytes) -> datetime:
    """``utime_t``: seconds and nanoseconds."""
    try:
        seconds, _ = struct.unpack("<II", answer)
    except struct.error as error:
        raise _not_understood() from error
    return datetime.fromtimestamp(seconds, timezone.utc)


def parse_parent(answer: bytes) -> Optional[Parent]:
    """``ParentImageSpec``: version, its length; number of the pool or -1, namespace, image, snapshot."""
    try:
        pool, *_ = struct.unpack_from("<q", answer, 6)
        if pool < 0:
            return None
        namespace, at = _string(answer, 14)
        image, at = _string(answer, at)
        snapshot, *_ = struct.unpack_from("<Q", answer, at)
    except (struct.error, UnicodeDecodeError) as error:
        raise _not_understood() from error
    return Parent(pool, namespace, image, snapshot)


def _not_understood() -> OriginLost:
    return OriginLost("its header is not understood", refused=True)


def _string(answer: bytes, at: int) -> Tuple[str, int]:
    """The one that begins there, and where it ends."""
    length, *_ = struct.unpack_from("<I", answer, at)
    end = at + 4 + length
    return answer[at + 4 : end].decode(), end


def parse_snapshot(answer: bytes) -> Tuple[bool, int]:
    """Whether it is in the trash, and the number of clones that stand on it. Raises `struct.error`.

    ``SnapshotInfo``: version, its length; id; namespace (version, its length; kind, and what the kind has);
    length of the name, name; size; time; children.
    """
    length, kind = struct.unpack_from("<II", answer, 16)
    name_length, *_ = struct.unpack_from("<I", answer, 20 + length)
    children, *_ = struct.unpack_from("<I", answer, 20 + length + 4 + name_length + 16)
    return kind == _TRASH, children


def is_kept(answer: bytes) -> bool:
    """Whether nobody has removed the snapshot."""
    with suppress(struct.error):
        return not parse_snapshot(answer)[0]
    return False


def is_there(answer: bytes) -> bool:
    """Whether what was in the snapshot can be read, though it may be removed when its last clone is gone."""
    with suppress(struct.error):
        in_trash, children = parse_snapshot(answer)
        return not in_trash or children > 0
    return False
