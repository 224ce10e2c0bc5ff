"""An image that is open: what threads do with it, through librados and librbd.

- It is open for reading only, with no right to do more, and so it is not told when its snapshot or a parent of
  it is removed. Nothing that it tells is believed before a check that begins afterwards (`Disk.check`).
- librbd's own cache is off: everything is read once.
- Calls that wait end some time, whatever has become of the cluster: their time limits are in the settings.
"""

from __future__ import annotations

import errno
import os
from contextlib import closing, contextmanager, suppress
from math import ceil
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from ..base import OriginLost
from .address import RbdAddress
from .lineage import Lineage, Pin, is_kept, pin_last_write, pin_snapshot

_BINDING = (
    "needs Ceph's binding for this Python, which is no pip package: apt-get install python3-rbd "
    "(a venv sees it if it was made with --system-site-packages by /usr/bin/python3)"
)
_CHANGED_BELOW = "an image that it was cloned from has changed"

Extents = List[Tuple[int, bool]]
"""Lengths in bytes, and whether all of it reads as zeros."""


class Limits(NamedTuple):
    """Seconds until the cluster has to have answered: when it is connected to, and later."""

    connect: float
    reply: float


class Found(NamedTuple):
    """What an open image is: *size* in bytes, and *version* as in `Origin.version`."""

    size: int
    version: str


class Disk:
    """The image at *address*. All but `read` wait, so they are for other threads, and raise `OriginLost`.

    `open` comes first and `close` last, and both alone.
    """

    def __init__(self, address: RbdAddress, limits: Limits) -> None:
        self._address = address
        self._limits = limits
        self._cluster: Any = None
        self._pool: Any = None
        self._image: Any = None
        self._lineage: Optional[Lineage] = None
        self._found = Found(0, "")

    def open(self) -> Found:
        """Connect, and open the image. Call `close` in any case."""
        try:
            import rados
            import rbd
        except ImportError as error:
            raise OriginLost(_BINDING, refused=True) from error
        self._rados, self._rbd = rados, rbd
        with self._explained(rados.Error, self._configuration_failed):
            self._cluster = rados.Rados(rados_id=self._address.id or "admin", conffile=self._address.conf)
            self._set_up()
        with self._explained(rados.Error, self._connection_failed):
            self._cluster.connect()
        with self._explained(rados.Error, self._pool_failed):
            self._pool = self._cluster.open_ioctx(self._address.pool)
            self._pool.set_namespace(self._address.namespace)
        self._lineage = Lineage(self._cluster)
        self._image = self._open_image()
        self._found, pin = self._identify(self._image)
        with self._explained(rados.Error, self._parent_failed):
            self._lineage.look_up(pin)
        if self._lineage.has_parents:
            self._reopen()
        return self._found

    def _reopen(self) -> None:
        """Be sure that the image stands on nothing else than what was looked up, see `lineage`."""
        with self._explained(self._rbd.Error, self._image_failed):
            self._image.close()
        self._image = self._open_image()
        if self._identify(self._image)[0] != self._found:
            raise OriginLost(_CHANGED_BELOW)

    def _set_up(self) -> None:
        """After the configuration come the variable of Ceph's tools, and what has to be so here.

        Times are whole seconds, and a little longer than those after which nobody here waits any more.
        """
        self._cluster.conf_parse_env()
        connect, reply = (str(ceil(seconds) + 1) for seconds in self._limits)
        for name, value in (
            ("client_mount_timeout", connect),
            ("rados_mon_op_timeout", connect),
            ("rados_osd_op_timeout", reply),
            ("rbd_cache", "false"),
            ("log_to_stderr", "false"),
            ("err_to_stderr", "false"),
        ):
            self._cluster.conf_set(name, value)

    def _open_image(self, *, at_snapshot: bool = True) -> Any:
        snapshot = (self._address.snapshot or None) if at_snapshot else None
        with self._explained(self._rbd.Error, self._image_failed if at_snapshot else self._no_image):
            return self._rbd.Image(self._pool, self._address.image, snapshot=snapshot, read_only=True)

    def _identify(self, image: Any) -> Tuple[Found, Pin]:
        """A snapshot's id never comes again. Of an image without one the time of the last write is all there is."""
        with self._explained((self._rbd.Error, self._rados.Error), self._image_failed):
            if image.old_format():
                raise OriginLost("it is an image of format 1, which has no id", refused=True)
            if self._address.snapshot:
                number = image.snap_get_id(self._address.snapshot)
                pin, state = pin_snapshot(self._pool, image.id(), number, is_kept), f"snapshot {number}"
            else:
                pin, written = pin_last_write(self._pool, image.id())
                state = f"written {written:%Y-%m-%dT%H:%M:%SZ}"
            return Found(image.size(), f"image {image.id()}, {state}"), pin

    def read(self, offset: int, length: int, on_complete: Callable[[Any, Any], None]) -> None:
        """Begin to read; in a thread of librbd *on_complete* is told the completion, and the bytes or None."""
        self._image.aio_read(offset, length, on_complete)

    def find_extents(self, offset: int, length: int) -> Extents:
        """Where *length* bytes at *offset* are zeros, as far as objects tell that are not there.

        Whole objects are asked for: some versions tell wrong offsets else.
        """
        image = self._image
        with self._explained(self._rbd.Error, self._image_failed):
            period = image.stat()["obj_size"] * image.stripe_count()
        first, end = offset // period * period, min(self._found.size, -(-(offset + length) // period) * period)
        data: List[Tuple[int, int]] = []

        def note(start: int, count: int, exists: bool) -> None:
            if exists:
                data.append((start, start + count))

        with self._explained(self._rbd.Error, self._image_failed):
            image.diff_iterate(first, end - first, None, note, True, self._has_map(image))
        return extents_between(sorted(data), offset, offset + length)

    def _has_map(self, image: Any) -> bool:
        """Whether it is written down which objects there are: then nothing else is asked."""
        wanted = self._rbd.RBD_FEATURE_FAST_DIFF
        return bool(image.features() & wanted) and not image.flags() & self._rbd.RBD_FLAG_FAST_DIFF_INVALID

    def check(self) -> None:
        """What has been told before this call is good, or `OriginLost` is raised."""
        assert self._lineage
        with self._explained(self._rados.Error, self._check_failed):
            if not self._lineage.is_intact():
                raise self._review()

    def _review(self) -> OriginLost:
        """Something is gone: an image that is opened now tells whether it is another disk."""
        with closing(self._open_image()) as image:
            found, _ = self._identify(image)
        if found != self._found:
            return OriginLost(f"it is {found.version} now, no more {self._found.version}", changed=True)
        return OriginLost(_CHANGED_BELOW)

    def close(self) -> None:
        """Wait for what is under way, and let go of everything, as far as it is there. Raises nothing."""
        if self._image is not None:
            with suppress(self._rbd.Error):
                self._image.close()
        if self._lineage is not None:
            self._lineage.close()
        if self._pool is not None:
            self._pool.close()
        if self._cluster is not None:
            self._cluster.shutdown()

    # What errors mean

    @contextmanager
    def _explained(self, kind: Any, explain: Callable[[int], OriginLost]) -> Iterator[None]:
        try:
            yield
        except kind as error:
            raise explain(getattr(error, "errno", None) or errno.EINVAL) from error

    @property
    def _client(self) -> str:
        return f"client.{self._address.id or 'admin'}"

    def _configuration_failed(self, number: int) -> OriginLost:
        where = self._address.conf or "ceph.conf (conf=PATH names it)"
        if number == errno.EINVAL:
            return OriginLost(f"{where} is no configuration of Ceph", refused=True)
        return OriginLost(f"{where} cannot be read: {os.strerror(number)}", refused=True)

    def _connection_failed(self, number: int) -> OriginLost:
        if number == errno.ENOENT:
            return OriginLost(f"there is no keyring with a key of {self._client} that can be read", refused=True)
        if number in (errno.EACCES, errno.EPERM):
            return OriginLost(f"the cluster does not know {self._client}, or not by its key", refused=True)
        if number == errno.ETIMEDOUT:
            return OriginLost(f"no answer from the monitors within {self._limits.connect:g} s")
        return OriginLost(f"the monitors cannot be reached: {os.strerror(number)}")

    def _pool_failed(self, number: int) -> OriginLost:
        if number == errno.ENOENT:
            return OriginLost(f"there is no pool {self._address.pool}", refused=True)
        return self._image_failed(number)

    def _image_failed(self, number: int) -> OriginLost:
        if number == errno.ENOENT:
            return self._missing()
        return self._no_image(number)

    def _missing(self) -> OriginLost:
        """What there was once may be known to have changed: a snapshot's id never comes again."""
        try:
            self._open_image(at_snapshot=False).close()
        except OriginLost as lost:
            return lost
        return OriginLost(f"the image has no snapshot {self._address.snapshot}", refused=True, changed=True)

    def _parent_failed(self, number: int) -> OriginLost:
        return OriginLost(_CHANGED_BELOW) if number == errno.ENOENT else self._no_image(number)

    def _check_failed(self, number: int) -> OriginLost:
        return self._review() if number == errno.ENOENT else OriginLost(reason(number))

    def _no_image(self, number: int) -> OriginLost:
        if number == errno.ENOENT:
            where = "/".join(filter(None, (self._address.pool, self._address.namespace)))
            return OriginLost(f"there is no image {self._address.image} in {where}", refused=True, changed=True)
        if number in (errno.EACCES, errno.EPERM):
            return OriginLost(f"{self._client} has no right to it", refused=True)
        return OriginLost(reason(number))


def reason(number: int) -> str:
    """What a read or another call has failed with, in words."""
    if number == errno.ETIMEDOUT:
        return "the cluster does not answer"
    if number == errno.ESHUTDOWN:
        return "the cluster has shut this client out"
    return os.strerror(number)


def extents_between(data: Sequence[Tuple[int, int]], start: int, stop: int) -> Extents:
    """What lies from *start* to *stop*, where *data*, begins and ends in their order, is all that is no zeros."""
    extents: Extents = []
    for begin, end in data:
        begin, end = max(begin, start), min(end, stop)
        if begin < end:
            extents += [(begin - start, True), (end - begin, False)]
            start = end
    extents.append((stop - start, True))
    return [extent for extent in extents if extent[0]]
