"""The files of a cache's bitmap: made, taken over, recovered or refused when a server starts.

The **live** bitmap has the layout of the C xNBD and is what all processes share. It
is true as long as the system runs, whatever dies. A power failure may leave bits in
it whose data never reached the disk, so beside it, in ``CACHE_BITMAP_IMAGE.state``
(`storage.state_format`), lies the **durable** copy, which speaks only of what is on
stable storage (`storage.checkpoint`). Which of them counts, the header tells:

- written in this boot, or closed cleanly: the live bitmap;
- in another boot, and not closed, or after a write-back that failed
  (`storage.writeback`): the durable copy, which replaces the live one;
- no boot at all: the files are being made. The state file comes into its place
  before the bitmap, and whoever finds it so makes an empty bitmap;
- no state file: the bitmap of a C xNBD, which is taken over as it is.

The **board** (`storage.board`) lies in ``CACHE_BITMAP_IMAGE.board`` as long as servers
use the files.

What does not belong together is refused, and nothing is changed then. The space of
both files is allocated when they are made, so that storing into their mappings
cannot fail on a full file system.

Everybody who opens or closes the files holds `OPENING` of the state file, or of the
new file that is to become it.
"""

from __future__ import annotations

import os
from contextlib import closing, suppress
from typing import NamedTuple, Optional, Tuple

from ..errors import ConfigurationError
from ..logs import log
from ..process import closed_on_error
from . import claims
from . import state_files as files
from .board import TARGET, Board, board_size
from .checkpoint import ProcessState
from .locks import RangeLocks
from .state_files import NEW
from .state_format import NO_BOOT, OPENING, BadHeader, Header, Layout, Steering, identity, layout_of, readable
from .target import reopen
from .writeback import WriteBack, WriteBackFailed, drop_cached

SUFFIX = ".state"
BOARD_SUFFIX = ".board"

MAXIMUM_PROCESSES = 8192
"""Processes of all servers together that may use a cache."""

BOOT_ID = "/proc/sys/kernel/random/boot_id"


def open_state(
    bitmap_path: str, cache_fd: int, *, disk_size: int, origin: str, clear: bool = False, boot_id_path: str = BOOT_ID
) -> SharedState:
    """The bitmap at *bitmap_path* of a cache of *disk_size* bytes of the disk at *origin*.

    For the master, before it forks. *cache_fd* is the cache image: it is synced
    before the durable copy speaks of it. With *clear* no block is cached, whatever
    the files said, if nobody uses them. *origin* is where the disk was when the
    bitmap was made, or where it has been moved to since. Raises `ConfigurationError`,
    and `claims.ImageInUse` if another server serves the cache image as a disk by itself.
    """
    path = os.path.realpath(bitmap_path)
    try:
        header = Header(disk_size, identity(origin), _read_boot_id(boot_id_path), clean=False)
        for _ in claims.attempts():
            with suppress(claims.ImageInUse):
                return _Opening(path, cache_fd, layout_of(disk_size), header).run(clear)
    except OSError as error:
        raise ConfigurationError(f"cannot use cache bitmap {path} with its state file: {error.strerror}") from error
    raise claims.ImageInUse


class Known(NamedTuple):
    """What a state file tells by itself: the disk's *size* in bytes, and where its origin has *moved to*, if it has."""

    size: int
    moved_to: str


def known_size(bitmap_path: str) -> Optional[int]:
    """Bytes of the disk whose bitmap is at *bitmap_path*, or None if no state file tells it."""
    known = known_state(bitmap_path)
    return known.size if known is not None else None


def known_state(bitmap_path: str) -> Optional[Known]:
    """What is known of the disk whose bitmap is at *bitmap_path*; None without a state file that can be read."""
    try:
        fd = os.open(os.path.realpath(bitmap_path) + SUFFIX, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return Known(files.read_header(fd).disk_size, files.read_steering(fd).address)
    except (OSError, BadHeader):
        return None
    finally:
        os.close(fd)


def is_switched(bitmap_path: str) -> bool:
    """Whether the disk whose bitmap is at *bitmap_path* is a plain target now, of servers that run or for the next one.

    Waits for servers that are opening or closing the files. False without files that can be used.
    """
    path = os.path.realpath(bitmap_path)
    try:
        state_fd = files.open_locked(path + SUFFIX)
    except (OSError, ConfigurationError):
        return False
    try:
        if files.is_alone(state_fd):
            return _was_switched(path, state_fd, _read_boot_id(BOOT_ID))
        return _board_says_target(path)
    except (OSError, ValueError, ConfigurationError, BadHeader):
        return False
    finally:
        os.close(state_fd)


def _board_says_target(path: str) -> bool:
    """Raises `OSError`, `ValueError` and `ConfigurationError` if there is no board to be read."""
    with closing(Board(files.open_regular(path + BOARD_SUFFIX))) as board:
        return board.mode == TARGET


def _was_switched(path: str, state_fd: int, boot_id: bytes) -> bool:
    """Whether the last servers, which are gone, have left the disk as a plain target. Raises `BadHeader`.

    The state file says so from before the switch: who died then has left a board that says otherwise.
    """
    if not files.read_steering(state_fd).switched:
        return False
    if files.read_header(state_fd).boot_id != boot_id:
        return True  # and nobody knows what a power failure has left of the board
    try:
        return _board_says_target(path)
    except (OSError, ValueError, ConfigurationError):
        return True


def _read_boot_id(path: str) -> bytes:
    with open(path, encoding="ascii") as file:
        boot_id = bytes.fromhex(file.read().strip().replace("-", ""))
    if len(boot_id) != len(NO_BOOT):
        raise ConfigurationError(f"{path} holds no boot id")
    return boot_id


class SharedState:
    """The files as the master holds them, opened again by every process that sets bits.

    They are in use, and neither cleared nor marked as closed cleanly, until the last
    process of the last server is gone, or its master has called `mark_clean`.
    """

    def __init__(self, path: str, fds: Tuple[int, int, int], layout: Layout, header: Header) -> None:
        self._path = path
        self._bitmap_fd, self._state_fd, self.board_fd = fds
        self._layout = layout
        self._header = header
        self.failures = files.failure_record(self._state_fd)
        self.write_back = WriteBack(self.failures)
        files.become_user(self._state_fd)

    def open_process(self) -> ProcessState:
        """The bitmap for this process. Called after the fork; raises `OSError`."""
        process, state_fd = self._open()
        try:
            files.become_user(state_fd)
            if files.read_header(state_fd).clean:  # the master was quicker to leave than this process to come
                with files.opening(state_fd):
                    files.write_header(state_fd, self._header)
        except BaseException:
            process.close()
            raise
        return process

    def open_board(self) -> Board:
        """The board for this process. Called after the fork; raises `OSError`."""
        return Board(reopen(self.board_fd, readonly=False))

    def steer(self, steering: Steering) -> None:
        """Have servers of another day begin with *steering*. Raises `OSError`; `ValueError` as `pack_steering`."""
        with files.opening(self._state_fd):
            files.write_steering(self._state_fd, steering)

    @property
    def steering(self) -> Steering:
        return files.read_steering(self._state_fd)

    def mark_clean(self, cache_fd: int) -> bool:
        """Make everything durable, and mark the files as closed cleanly unless another server uses them.

        For the master, when its workers are gone; tells whether they were marked.
        Raises `OSError`, and then they are not: `WriteBackFailed` if any write-back has failed.
        """
        with files.opening(self._state_fd):
            try:
                alone = files.is_alone(self._state_fd)
                with closing(self._open()[0]) as process:
                    process.checkpoint(cache_fd)
                if alone:
                    self.write_back.sync(self._bitmap_fd)
                    self._forget_broken_switch()
                    files.write_header(self._state_fd, self._header._replace(clean=True))
                    os.unlink(self._path + BOARD_SUFFIX)
            except WriteBackFailed:
                files.put_header(self._state_fd, self._header)
                self.write_back.keep()
                raise
            finally:
                files.leave(self._state_fd)
        return alone

    def _forget_broken_switch(self) -> None:
        """Before the board goes, which tells of it."""
        steering = self.steering
        if steering.switched and not _was_switched(self._path, self._state_fd, self._header.boot_id):
            files.write_steering(self._state_fd, steering._replace(switched=False))

    def _open(self) -> Tuple[ProcessState, int]:
        """The files once more, and the descriptor of the state file among them."""
        bitmap_fd = reopen(self._bitmap_fd, readonly=False)
        with closed_on_error(bitmap_fd):
            state_fd = reopen(self._state_fd, readonly=False)
            with closed_on_error(state_fd):
                return ProcessState(bitmap_fd, state_fd, self._layout), state_fd

    def close(self) -> None:
        for fd in (self._bitmap_fd, self._state_fd, self.board_fd):
            os.close(fd)


class _Opening:
    """The way of one server into the files, whose header has to become *header*."""

    def __init__(self, path: str, cache_fd: int, layout: Layout, header: Header) -> None:
        self._path = path
        self._state_path = path + SUFFIX
        self._cache_fd = cache_fd
        self._layout = layout
        self._header = header

    def run(self, clear: bool) -> SharedState:
        while True:
            try:
                state_fd = files.open_locked(self._state_path)
            except FileNotFoundError:
                state_fd = files.open_locked(self._state_path + NEW, os.O_CREAT)
                with closed_on_error(state_fd):
                    if not os.path.lexists(self._state_path):
                        self._create(state_fd, clear)
                        return self._share(state_fd)
                    files.remove_unfinished(self._state_path)
                os.close(state_fd)  # another server was quicker
            else:
                with closed_on_error(state_fd):
                    if clear:
                        return self._replace(state_fd)
                    self._resume(state_fd)
                    return self._share(state_fd)

    def _share(self, state_fd: int) -> SharedState:
        bitmap_fd = self._open_bitmap()
        with closed_on_error(bitmap_fd):
            board_fd = self._open_board(state_fd)
            with closed_on_error(board_fd):
                shared = SharedState(self._path, (bitmap_fd, state_fd, board_fd), self._layout, self._header)
        RangeLocks(state_fd).release(OPENING, 1)
        return shared

    def _open_board(self, state_fd: int) -> int:
        """A descriptor of the board, made anew if nobody uses the files."""
        alone, path = files.is_alone(state_fd), self._path + BOARD_SUFFIX
        if not alone:
            fd = files.open_regular(path)
            with closed_on_error(fd):
                self._check_size(fd, path, board_size(MAXIMUM_PROCESSES))
            return fd
        steering = files.read_steering(state_fd)
        if steering.switched:
            files.write_steering(state_fd, steering._replace(switched=False))
        fd = files.open_regular(path, os.O_CREAT | os.O_TRUNC)
        with closed_on_error(fd):
            files.allocate(fd, board_size(MAXIMUM_PROCESSES))
            with closing(Board(reopen(fd, readonly=False))) as board:
                board.address = steering.address
        return fd

    def _refuse_if_incomplete(self, state_fd: int, *, recover: bool) -> None:
        """A plain target has written to the image since it was a proxy's: fine if no block was missing then.

        That is looked up in the durable copy if that is about to *recover* the live bitmap.
        """
        bitmap_fd = self._open_bitmap()
        try:
            fd, at = (state_fd, self._layout.durable) if recover else (bitmap_fd, 0)
            missing = self._layout.blocks - files.count_set(fd, self._layout.bitmap_size, at)
        finally:
            os.close(bitmap_fd)
        if missing:
            raise ConfigurationError(
                f"{self._path}: the proxy was switched to a plain target by force with {missing} blocks missing: "
                "serve the cache image with --target, or start afresh with --clear-bitmap"
            )

    def _create(self, state_fd: int, clear: bool) -> None:
        """Make the new file behind *state_fd* the state file; there is none yet, or it may go."""
        try:
            self._claim_cache(alone=True)
            os.ftruncate(state_fd, 0)
            files.allocate(state_fd, self._layout.size)
            if not clear and os.path.lexists(self._path):
                self._take_over(state_fd)
            else:
                self._make(state_fd)
                log.info("cache bitmap %s: %s", self._path, "cleared" if clear else "new, nothing is cached yet")
        except BaseException:
            self._remove_unfinished()
            raise

    def _make(self, state_fd: int) -> None:
        files.write_header(state_fd, self._header._replace(boot_id=NO_BOOT))
        self._make_bitmap()
        os.fsync(state_fd)
        files.publish(self._state_path)
        files.publish(self._path)
        files.write_header(state_fd, self._header)

    def _make_bitmap(self) -> None:
        fd = files.open_regular(self._path + NEW, os.O_CREAT | os.O_TRUNC)
        try:
            files.allocate(fd, self._layout.bitmap_size)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _take_over(self, state_fd: int) -> None:
        bitmap_fd = self._open_bitmap()
        files.write_header(state_fd, self._header)
        try:
            files.allocate(bitmap_fd, self._layout.bitmap_size)
            files.write_back(state_fd).sync(self._cache_fd)
            for difference in files.differences(bitmap_fd, state_fd, self._layout):
                files.save_live(state_fd, self._layout, difference)
        except WriteBackFailed:
            files.publish(self._state_path)  # the next start has to know that nothing is sure
            raise
        finally:
            os.close(bitmap_fd)
        os.fsync(state_fd)
        files.publish(self._state_path)
        log.info("cache bitmap %s: taken over, it has no state file: left by a C xNBD?", self._path)

    def _replace(self, old_fd: int) -> SharedState:
        if not files.is_alone(old_fd):
            raise ConfigurationError(f"cache bitmap {self._path} is in use: stop its servers before --clear-bitmap")
        state_fd = files.open_locked(self._state_path + NEW, os.O_CREAT)
        with closed_on_error(state_fd):
            self._create(state_fd, clear=True)
            shared = self._share(state_fd)
        os.close(old_fd)
        return shared

    def _resume(self, state_fd: int) -> None:
        found = self._check_state(state_fd)
        alone, same_boot = files.is_alone(state_fd), found.boot_id == self._header.boot_id
        recover = (not same_boot and not found.clean) or files.read_failure(state_fd) is not None
        if alone and _was_switched(self._path, state_fd, self._header.boot_id):
            self._refuse_if_incomplete(state_fd, recover=recover)
        if not alone and not same_boot:
            raise ConfigurationError(f"cache bitmap {self._path} is in use on another machine: stop that server first")
        self._claim_cache(alone=alone)
        if found.boot_id == NO_BOOT:
            self._make_bitmap()
            files.publish(self._path)
            log.info("cache bitmap %s: made, which an earlier start did not finish", self._path)
        else:
            bitmap_fd = self._open_bitmap()
            try:
                if alone:
                    self._settle_or_recover(bitmap_fd, state_fd, recover=recover)
                else:
                    log.info("cache bitmap %s: resumed, shared with another server", self._path)
            finally:
                os.close(bitmap_fd)
        if found != self._header:
            files.write_header(state_fd, self._header)

    def _claim_cache(self, *, alone: bool) -> None:
        """Before anything is changed. Raises `claims.ImageInUse`, but not for siblings that have been switched."""
        if claims.try_claim(self._cache_fd, claims.CACHE):
            return
        if alone or not self._siblings_are_targets():
            raise claims.ImageInUse
        claims.turn_into_disk(self._cache_fd)

    def _siblings_are_targets(self) -> bool:
        try:
            return _board_says_target(self._path)
        except (OSError, ValueError):
            return False

    def _settle_or_recover(self, bitmap_fd: int, state_fd: int, *, recover: bool) -> None:
        """`_settle`, which may hear of a write-back that failed under servers that were killed."""
        try:
            self._settle(bitmap_fd, state_fd, recover=recover)
        except WriteBackFailed:
            self._settle(bitmap_fd, state_fd, recover=True)

    def _settle(self, bitmap_fd: int, state_fd: int, *, recover: bool) -> None:
        """Make live bitmap and durable copy agree; nobody else uses them."""
        self._remove_unfinished()
        files.allocate(bitmap_fd, self._layout.bitmap_size)
        files.allocate(state_fd, self._layout.size)
        files.reset_numbers(state_fd)
        different = files.differences(bitmap_fd, state_fd, self._layout)
        if recover:
            forgotten = 0
            for difference in different:
                files.restore_durable(bitmap_fd, difference)
                forgotten += difference.forgotten
            self._end_recovery(bitmap_fd, state_fd, forgotten)
            return
        for difference in different:
            files.claim(state_fd, self._layout, difference.page)
        process = ProcessState(reopen(bitmap_fd, readonly=False), reopen(state_fd, readonly=False), self._layout)
        with closing(process):
            if process.changed:
                process.checkpoint(self._cache_fd)
        log.info("cache bitmap %s: resumed", self._path)

    def _end_recovery(self, bitmap_fd: int, state_fd: int, forgotten: int) -> None:
        """The durable copy has replaced the live bitmap: after a failed write-back nothing else may come back."""
        failure = files.read_failure(state_fd)
        if failure is None:
            log.warning("cache bitmap %s: recovered after a power failure, %d blocks forgotten", self._path, forgotten)
            return
        drop_cached(self._cache_fd)
        files.forget_failure(bitmap_fd, state_fd, self._layout)
        what = f"recovered after a failed write-back ({os.strerror(failure.number)})"
        log.warning("cache bitmap %s: %s, %d blocks forgotten", self._path, what, forgotten)

    def _check_state(self, state_fd: int) -> Header:
        """The header, if the file is of this disk. Raises `ConfigurationError`."""
        try:
            header = files.read_header(state_fd)
        except BadHeader as error:
            raise self._refusal(f"state file {self._state_path} {error}") from error
        wanted = self._header
        if header.disk_size != wanted.disk_size:
            raise self._refusal(
                f"{self._path} is of a disk of {header.disk_size} bytes, and the origin has {wanted.disk_size}"
            )
        if header.block_size != wanted.block_size:
            raise self._refusal(f"{self._path} has blocks of {header.block_size} bytes, not {wanted.block_size}")
        if wanted.origin not in (header.origin, identity(files.read_steering(state_fd).address)):
            raise self._refusal(
                f"{self._path} is of the origin {readable(header.origin)}, not of {readable(wanted.origin)}; "
                "if that disk has moved, start with the former address and use xnbd-bgctl --reconnect"
            )
        self._header = wanted._replace(origin=header.origin)
        self._check_size(state_fd, self._state_path, self._layout.size)
        return header

    def _open_bitmap(self) -> int:
        """A descriptor of the live bitmap, if it can be one of this disk. Raises `ConfigurationError`."""
        try:
            fd = files.open_regular(self._path)
        except FileNotFoundError:
            raise self._refusal(f"{self._path} is gone, but {self._state_path} is there") from None
        with closed_on_error(fd):
            self._check_size(fd, self._path, self._layout.bitmap_size)
        return fd

    def _check_size(self, fd: int, path: str, size: int) -> None:
        found = os.fstat(fd).st_size
        if found != size:
            raise self._refusal(
                f"{path} has {found} bytes, not the {size} for a disk of {self._header.disk_size} bytes"
            )

    def _refusal(self, reason: str) -> ConfigurationError:
        return ConfigurationError(f"cannot go on with the cached blocks: {reason} (--clear-bitmap starts afresh)")

    def _remove_unfinished(self) -> None:
        for path in (self._state_path, self._path):
            files.remove_unfinished(path)
