"""Write-back that has failed, after which nothing of a disk is called durable any more.

The kernel tells of a failed write-back once for each open file description, and takes
the pages for clean: the next ``fdatasync(2)`` succeeds, and so does one through a
description that was opened after somebody else had been told (``errseq_t``). So who
is told notes it before anything else, in a `Record` that all processes of the disk
share, and everybody looks there before and after each sync. Only a restart clears it.

A process has opened its files after others. For what they were told, and died of, it
asks once through the *witness*, a description of the image as old as the server. All
processes have that in common, so it is told once for all of them: asking and noting are
one step, under a lock, and asking takes no time in which a process might be killed.

Servers that share an image but no record tell each other by a lock on the image
(`image_use.FAILED`), which lasts as long as any process of the one that was told.

What is never synced, as the overlay of a copy-on-write disk, is written back all the
same, and lost if that fails: there the kernel is only asked (`WriteBack.hear`).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import time
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Callable, Iterator, NoReturn, Optional

from ..logs import about, log
from ..system.file_locks import RangeLocks
from . import image_use
from .failure import Failure, failure_from, put_mark

RECORD_SIZE = 16

_NUMBER, _LASTING, _TOLD, _TIME = 0, 4, 5, 8
_RECORD = struct.Struct("<I4xQ")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_NO_FAILURE = bytes(RECORD_SIZE)
_WAIT_BEFORE = 1
_WITNESS = 1
_PATIENCE, _PAUSE = 10.0, 1e-3


class WriteBackFailed(OSError):
    """EIO: this sync has failed, or a write-back of the disk before it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(errno.EIO, str(failure))


class Record:
    """The first failure, in 16 bytes at *offset* of the file behind *fd*, opened for writing.

    Little-endian: errno (4 bytes), whether all this is on stable storage, whether the
    log has it (1 byte each), 2 bytes of nothing, seconds since the epoch (8). All
    zeros: none. The lock on the first of these bytes is held for as long as it takes
    to find out who logs it, that on the second one while the witness is asked.
    """

    def __init__(self, fd: int, offset: int, *, lasting: bool = False) -> None:
        """*lasting*: the file outlives the server, and the record has to reach stable storage."""
        self._fd = fd
        self._at = offset
        self.lasting = lasting

    def read(self) -> Optional[Failure]:
        data = os.pread(self._fd, RECORD_SIZE, self._at)
        if data == _NO_FAILURE:
            return None
        number, when = _RECORD.unpack(data.ljust(RECORD_SIZE, b"\0"))
        return failure_from(number, when)

    def note(self, number: int) -> bool:
        """Note the errno, unless there is one; tells whether the log has to have it. Raises `OSError`."""
        if self.read() is None:
            os.pwrite(self._fd, _U32.pack(number or errno.EIO), self._at + _NUMBER)
            os.pwrite(self._fd, _U64.pack(int(time.time())), self._at + _TIME)
        return self._is_first()

    def _is_first(self) -> bool:
        locks = RangeLocks(self._fd)
        try:
            locks.acquire(self._at, 1)
        except OSError:
            return True
        try:
            told = os.pread(self._fd, 1, self._at + _TOLD)
            os.pwrite(self._fd, b"\1", self._at + _TOLD)
        finally:
            locks.release(self._at, 1)
        return told == b"\0"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What other processes do meanwhile they do before or after it. Raises `OSError` if one takes too long.

        The lock belongs to the process (``fcntl(2)``): processes may have *fd* in common.
        """
        until = time.monotonic() + _PATIENCE
        while not self._try_lock():
            if time.monotonic() > until:
                raise OSError(errno.EIO, "another process does not come to the end of a sync")
            time.sleep(_PAUSE)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, self._at + _WITNESS)

    def _try_lock(self) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._at + _WITNESS)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def keep(self) -> None:
        """Bring a failure to stable storage if it is to last; where that fails, it is for another try."""
        with suppress(OSError):
            data = os.pread(self._fd, RECORD_SIZE, self._at)
            if not self.lasting or data == _NO_FAILURE or data[_LASTING]:
                return
            os.pwrite(self._fd, data, self._at)  # what a sync that fails has left counts as written
            os.fdatasync(self._fd)
            os.pwrite(self._fd, b"\1", self._at + _LASTING)

    def clear(self) -> None:
        """Durable on return. Raises `OSError`."""
        os.pwrite(self._fd, _NO_FAILURE, self._at)
        os.fdatasync(self._fd)


class WriteBack:
    """How this process syncs the files of a disk, whose *record* it is.

    *image_fd* is the disk's image, as the master has opened it, where servers may
    serve that without sharing the record.
    """

    def __init__(self, record: Record, image_fd: Optional[int] = None, witness: Optional[int] = None) -> None:
        self._record = record
        self._image_fd = image_fd
        self.witness = witness
        self._own: Optional[Failure] = None

    def noted(self) -> Optional[Failure]:
        """What is known to have failed. Nothing is looked for, and nothing changed."""
        return self._own if self._own is not None else self._record.read()

    def failure(self) -> Optional[Failure]:
        """What has failed, in whatever process."""
        if self._own is not None:
            return self._own
        failure = self._record.read()
        if failure is None and self._image_fd is not None and image_use.is_failed(self._image_fd):
            if self._record.note(errno.EIO):
                log.error("%s: write-back failed in another server of it: %s", _name(self._image_fd), _ADVICE)
            failure = self._record.read()
        return failure

    def check(self) -> None:
        """Raises `WriteBackFailed` if any write-back has failed."""
        failure = self.failure()
        if failure is not None:
            raise WriteBackFailed(failure)

    def sync(self, fd: int, *, metadata: bool = False) -> None:
        """``fdatasync(2)``, which is worth something if no write-back has failed before. Raises `WriteBackFailed`.

        With *metadata* ``fsync(2)``: attributes and times of the file too.
        """
        self._do(fd, os.fsync if metadata else os.fdatasync)

    def hear(self, fd: int) -> None:
        """Raises `WriteBackFailed` if a write-back has failed by now; nothing is written, so one may fail yet."""
        self._do(fd, _ask_kernel)

    def _do(self, fd: int, sync: Callable[[int], None]) -> None:
        self.check()
        self._sync(fd, sync)
        if self.witness is not None:
            with self._record.alone():
                self._sync(self.witness, _sync_page)
            self.witness = None
        self.check()

    def _sync(self, fd: int, sync: Callable[[int], None]) -> None:
        try:
            sync(fd)
        except OSError as error:
            self._fail(fd, error)

    def _fail(self, fd: int, error: OSError) -> NoReturn:
        failure = Failure(error.errno or errno.EIO, int(time.time()))
        try:
            first = self._record.note(failure.number)
        except OSError:  # its file is on the disk that fails, and so will the syncs of all others
            first, self._own = True, failure
        if self._image_fd is not None:
            image_use.tell_failed(self._image_fd)
            if not self._record.lasting:
                put_mark(self._image_fd, failure)
        if first:
            log.error("%s: write-back failed: %s; %s", _name(fd), error.strerror, _ADVICE, extra=about(error=error))
        self._record.keep()
        raise WriteBackFailed(self.failure() or failure)

    def keep(self) -> None:
        """Try again to have a failure outlive this server, if that has not worked yet."""
        self._record.keep()


def _sync_page(fd: int) -> None:
    """``msync(2)`` of the first page, which tells of all of the file as ``fdatasync(2)`` does, and writes but that."""
    try:
        page = mmap.mmap(fd, 1)  # Python flushes only what might be written to
    except (ValueError, PermissionError):  # the file is empty, or opened for reading
        os.fdatasync(fd)
        return
    with page:
        page.flush()


def _ask_kernel(fd: int) -> None:
    """Raises `OSError` for a write-back that has failed since *fd* was opened or has told of one last."""
    import ctypes

    call = _sync_file_range()
    if call is not None and call(fd, 0, 1, _WAIT_BEFORE):
        number = ctypes.get_errno()
        if number != errno.ENOSYS:
            raise OSError(number, os.strerror(number))


@cache
def _sync_file_range() -> Any:
    """The system call, which Python has not; waiting for the first byte's page, it tells of all of the file."""
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is not None:
        call.argtypes = ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
    return call


_ADVICE = (
    "what was written since the last FLUSH may be lost, and no FLUSH succeeds until the server is restarted: "
    "mend the disk, or make room on it, first"
)


def _name(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return "a file of the disk"
