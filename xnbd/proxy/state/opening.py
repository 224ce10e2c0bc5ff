"""The files of a cache's bitmap: made, taken over, recovered or refused when a server starts.

The **live** bitmap has the layout of the C xNBD and is what all processes share. It
is true as long as the system runs, whatever dies. A power failure may leave bits in
it whose data never reached the disk, so beside it, in ``CACHE_BITMAP_IMAGE.state``
(`proxy.state.format`), lies the **durable** copy, which speaks only of what is on
stable storage (`proxy.state.checkpoint`). Which of them counts, the header tells:

- closed cleanly: they are alike. Where they are not, the one that has the checksum
  that was noted;
- not closed, in this boot and on these mounts: the live bitmap, which differs from the
  durable copy only where that is noted;
- not closed, in another boot or on another mount, or after a write-back that failed
  (`storage.writeback`): the durable copy, which replaces the live one;
- no boot at all: the files are being made. The state file comes into its place
  before the bitmap, and whoever finds it so makes an empty bitmap;
- no state file: the bitmap of a C xNBD, which is taken over as it is, unless the cache
  image says that it was not.

The state file names the cache image that it speaks of (`proxy.state.belonging`).

The **scoreboard** (`scoreboard.scoreboard`) lies in ``CACHE_BITMAP_IMAGE.board``. Once no server uses
it, it means nothing, but its space is kept: on a full disk there is no other for the next.

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

from ...errors import ConfigurationError
from ...logs import log
from ...making import file_mode, is_own_file
from ...scoreboard.layout import (
    TARGET,
    OtherVersion,
    check_header,
    create_scoreboard,
    scoreboard_size,
    write_header,
)
from ...scoreboard.scoreboard import Scoreboard
from ...storage import image_use
from ...storage.target import reopen
from ...storage.writeback import WriteBack, WriteBackFailed, drop_cached
from ...system.file_locks import RangeLocks
from ...system.process import closed_on_error
from . import belonging, files
from .belonging import NO_ID, NO_TIE, UNKNOWN, Tie
from .checkpoint import ProcessState
from .files import LEAVING_TIME, NEW
from .format import NO_BOOT, OPENING, BadHeader, Header, Layout, Steering, identity, layout_of, readable

SUFFIX = ".state"
SCOREBOARD_SUFFIX = ".board"

MAXIMUM_PROCESSES = 8192
"""Processes of all servers together that may use a cache."""

BOOT_ID = "/proc/sys/kernel/random/boot_id"


def open_state(
    bitmap_path: str,
    cache_fd: int,
    *,
    disk_size: int,
    origin: str,
    clear: bool = False,
    adopt: bool = False,
    boot_id_path: str = BOOT_ID,
) -> SharedState:
    """The bitmap at *bitmap_path* of a cache of *disk_size* bytes of the disk at *origin*.

    For the master, before it forks. *cache_fd* is the cache image: it is synced
    before the durable copy speaks of it. With *clear* no block is cached, whatever
    the files said, if nobody uses them. With *adopt* somebody vouches that the cache
    image has what the bitmap says, whatever speaks against it. *origin* is where the disk
    was when the bitmap was made, or where it has been moved to since. Raises
    `ConfigurationError`, and `image_use.ImageInUse` if another server serves the cache image
    as a disk by itself, or `image_use.OtherBitmap`.
    """
    path = os.path.realpath(bitmap_path)
    try:
        header = Header(disk_size, identity(origin), _read_boot_id(boot_id_path), clean=False)
        for _ in image_use.attempts():
            try:
                return _Opening(path, cache_fd, layout_of(disk_size), header, adopt).run(clear)
            except image_use.ImageInUse as error:
                in_use = error
    except OSError as error:
        raise ConfigurationError(f"cannot use cache bitmap {path} with its state file: {error.strerror}") from error
    raise in_use


def has_cached_blocks(bitmap_path: str) -> bool:
    """Whether some block is cached, as far as the bitmap or its durable copy say."""
    path = os.path.realpath(bitmap_path)
    return _has_bits(path, 0) or _has_bits(path + SUFFIX, None)


def _has_bits(path: str, start: Optional[int]) -> bool:
    """In the bitmap at *start* of the file; None: where its header says."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if start is None:
                start = layout_of(files.read_header(file.fileno()).disk_size).durable
            file.seek(start)
            return any(part.count(0) != len(part) for part in iter(lambda: file.read(1 << 20), b""))
    except (OSError, BadHeader):
        return False


def _open_without_waiting(path: str, flags: int) -> int:
    """A FIFO keeps nobody waiting; whoever opens it to use it refuses it."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


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
        return _scoreboard_says_target(path)
    except (OSError, ValueError, ConfigurationError, BadHeader):
        return False
    finally:
        os.close(state_fd)


def _scoreboard_says_target(path: str) -> bool:
    """Raises `OSError`, `ValueError` and `ConfigurationError` if there is no scoreboard to be read."""
    with closing(Scoreboard(files.open_regular(path + SCOREBOARD_SUFFIX))) as scoreboard:
        return scoreboard.mode == TARGET


def _was_switched(path: str, state_fd: int, boot_id: bytes) -> bool:
    """Whether the last servers, which are gone, have left the disk as a plain target. Raises `BadHeader`.

    The state file says so from before the switch: who died then has left a scoreboard that says otherwise.
    """
    if not files.read_steering(state_fd).switched:
        return False
    header = files.read_header(state_fd)
    if header.boot_id != boot_id or header.tie.state_mount not in (belonging.mount_of(state_fd), UNKNOWN):
        return True  # and nobody knows what a power failure has left of the scoreboard
    try:
        return _scoreboard_says_target(path)
    except (OSError, ValueError, ConfigurationError):
        return True


def _read_boot_id(path: str) -> bytes:
    try:
        with open(path, encoding="ascii") as file:
            boot_id = bytes.fromhex(file.read().strip().replace("-", ""))
    except FileNotFoundError:
        raise ConfigurationError(f"there is no {path}: mount /proc") from None
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
        self._bitmap_fd, self._state_fd, self.scoreboard_fd = fds
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

    def open_scoreboard(self) -> Scoreboard:
        """The scoreboard for this process. Called after the fork; raises `OSError`."""
        return Scoreboard(reopen(self.scoreboard_fd, readonly=False))

    def steer(self, steering: Steering) -> None:
        """Have servers of another day begin with *steering*. Raises `OSError`; `ValueError` as `pack_steering`."""
        state_fd = reopen(self._state_fd, readonly=False)  # this process's own: the lock has to end with it
        try:
            with files.opening(state_fd):
                files.write_steering(state_fd, steering)
        finally:
            os.close(state_fd)

    @property
    def steering(self) -> Steering:
        return files.read_steering(self._state_fd)

    def mark_clean(self, cache_fd: int) -> bool:
        """Make everything durable, and mark the files as closed cleanly unless another server uses them.

        For the master, when its workers are gone; tells whether they were marked.
        Raises `OSError`, and then they are not: `WriteBackFailed` if any write-back has failed.
        """
        try:
            self._checkpoint(cache_fd)  # while others need not wait: it may take long
            with files.opening(self._state_fd):
                return self._close_if_alone(cache_fd)
        except WriteBackFailed:
            self.write_back.keep()
            raise

    def _close_if_alone(self, cache_fd: int) -> bool:
        try:
            alone = files.is_alone(self._state_fd)
            self._checkpoint(cache_fd)
            if alone:
                self.write_back.sync(self._bitmap_fd)
                self.write_back.sync(cache_fd, metadata=True)  # its mark and its time of change, too
                self._forget_broken_switch()
                files.write_header(self._state_fd, self._closed_header(cache_fd))
        except WriteBackFailed:
            files.put_header(self._state_fd, self._header)
            raise
        finally:
            files.leave(self._state_fd)
        return alone

    def _checkpoint(self, cache_fd: int) -> None:
        with closing(self._open()[0]) as process:
            process.checkpoint(cache_fd, timeout=LEAVING_TIME)

    def _closed_header(self, cache_fd: int) -> Header:
        tie = self._header.tie._replace(
            previous=belonging.NO_SESSION,
            changed=belonging.place_of(cache_fd).changed,
            checksum=files.checksum(self._bitmap_fd, self._layout, 0),
        )
        return self._header._replace(clean=True, tie=tie)

    def _forget_broken_switch(self) -> None:
        """Before the scoreboard goes, which tells of it."""
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
        for fd in (self._bitmap_fd, self._state_fd, self.scoreboard_fd):
            os.close(fd)


class _Opening:
    """The way of one server into the files, whose header has to become *header*."""

    def __init__(self, path: str, cache_fd: int, layout: Layout, header: Header, adopt: bool) -> None:
        self._path = path
        self._state_path = path + SUFFIX
        self._cache_fd = cache_fd
        self._layout = layout
        self._header = header
        self._adopt = adopt
        self._owners = {os.fstat(cache_fd).st_uid}

    def run(self, clear: bool) -> SharedState:
        while True:
            try:
                state_fd = files.open_locked(self._state_path)
            except FileNotFoundError:
                state_fd = files.open_new_locked(self._state_path + NEW, self._owners)
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
            scoreboard_fd = self._open_scoreboard(state_fd)
            with closed_on_error(scoreboard_fd):
                shared = SharedState(self._path, (bitmap_fd, state_fd, scoreboard_fd), self._layout, self._header)
        RangeLocks(state_fd).release(OPENING, 1)
        return shared

    def _open_scoreboard(self, state_fd: int) -> int:
        """A descriptor of the scoreboard, made anew if nobody uses the files."""
        alone, path = files.is_alone(state_fd), self._path + SCOREBOARD_SUFFIX
        if not alone:
            return self._join_scoreboard(path, state_fd)
        steering = files.read_steering(state_fd)
        if steering.switched:
            files.write_steering(state_fd, steering._replace(switched=False))
        fd = self._clear_scoreboard(path, state_fd)
        with closed_on_error(fd):
            write_header(fd)
            with closing(Scoreboard(reopen(fd, readonly=False))) as scoreboard:
                scoreboard.origin.address = steering.address
        return fd

    def _join_scoreboard(self, path: str, state_fd: int) -> int:
        """A descriptor of the scoreboard of the servers that use the files already."""
        try:
            fd = files.open_regular(path)
        except FileNotFoundError:
            raise ConfigurationError(
                f"{path} is gone, which the servers that use {self._path} share: stop them all first"
            ) from None
        with closed_on_error(fd):
            if not self._is_own(fd, state_fd) or os.fstat(fd).st_size != scoreboard_size(MAXIMUM_PROCESSES):
                raise ConfigurationError(
                    f"{path} is not the one that the servers that use {self._path} share: stop them all first"
                )
        return fd

    def _refuse_other_version(self) -> None:
        """Servers that use the files share a scoreboard, of which they have to mean the same.

        Before anything is believed that it says, and anything changed. Raises `ConfigurationError`.
        """
        with suppress(FileNotFoundError):  # `_join_scoreboard` tells that
            fd = files.open_regular(self._path + SCOREBOARD_SUFFIX)
            try:
                check_header(fd)
            except OtherVersion:
                raise ConfigurationError(
                    f"cache bitmap {self._path} is in use by another version of xnbd-server: stop that one first"
                ) from None
            finally:
                os.close(fd)

    def _clear_scoreboard(self, path: str, state_fd: int) -> int:
        """A descriptor of a scoreboard of zeros; a former one's space is used again, for there may be no other.

        Without space it is one in memory, which other servers cannot share.
        """
        with suppress(OSError, ConfigurationError):
            return self._clear_former_scoreboard(path, state_fd)
        try:
            fd = files.make_new(path)
            with closed_on_error(fd):
                files.allocate(fd, scoreboard_size(MAXIMUM_PROCESSES))
            return fd
        except OSError as error:
            if error.errno not in files.NO_SPACE:
                raise
            files.remove_strange(path)
            log.warning("no space for %s: until the next start no other server can use %s too", path, self._path)
            return create_scoreboard(MAXIMUM_PROCESSES)

    def _clear_former_scoreboard(self, path: str, state_fd: int) -> int:
        """Also of another version. Raises `OSError` or `ConfigurationError` if there is none to be used."""
        size, fd = scoreboard_size(MAXIMUM_PROCESSES), files.open_regular(path)
        with closed_on_error(fd):
            if not self._is_own(fd, state_fd):
                raise ConfigurationError(f"{path} is no board of this program's")
            files.allocate(fd, size)
            os.ftruncate(fd, size)
            files.clear(fd, size)
            os.fchmod(fd, file_mode())
        return fd

    def _is_own(self, fd: int, state_fd: int) -> bool:
        """Whether the file is ours, and not another user's who may write into the directory."""
        return is_own_file(os.fstat(fd), {*self._owners, os.fstat(state_fd).st_uid})

    def _refuse_if_incomplete(self, state_fd: int, *, recover: bool) -> None:
        """A plain target has written to the image since it was a proxy's: fine if no block was missing then.

        That is looked up in the durable copy if that is about to *recover* the live bitmap.
        """
        bitmap_fd = self._open_bitmap()
        try:
            fd, at = (state_fd, self._layout.durable) if recover else (bitmap_fd, 0)
            missing = self._layout.blocks - files.count_set(fd, self._layout, at)
        finally:
            os.close(bitmap_fd)
        if missing:
            raise ConfigurationError(
                f"{self._path}: the proxy was switched to a plain target by force with {missing} blocks missing: "
                "serve the cache image with --target, or start afresh with --clear-bitmap"
            )

    # Making

    def _create(self, state_fd: int, clear: bool, old: Tie = NO_TIE) -> None:
        """Make the new file behind *state_fd* the state file; there is none yet, or the one with *old* may go."""
        try:
            self._bind(self._tie_to_begin_with(state_fd, old))
            self._claim_cache(alone=True)
            take_over = not clear and os.path.lexists(self._path)
            if take_over:
                self._refuse_own_bitmap()
            elif clear:
                self._refuse_to_clear()
            elif belonging.holds_data(self._cache_fd):
                raise self._refusal(f"there is no {self._path}, but the cache image holds data, which would be lost")
            os.ftruncate(state_fd, 0)
            files.allocate(state_fd, self._layout.size)
            if take_over:
                self._take_over(state_fd)
            else:
                self._mark()
                self._make(state_fd)
                log.info("cache bitmap %s: %s", self._path, "cleared" if clear else "new, nothing is cached yet")
        except BaseException:
            self._remove_unfinished()
            raise

    def _tie_to_begin_with(self, state_fd: int, old: Tie) -> Tie:
        """What the *old* state file has put on the cache image stays: until the new one is there the old one counts."""
        tie, mark = belonging.new_tie(self._cache_fd, state_fd), belonging.read_mark(self._cache_fd)
        return tie._replace(id=mark.id, session=mark.session) if mark is not None and mark.id == old.id else tie

    def _refuse_own_bitmap(self) -> None:
        """A bitmap without a state file was left by a C xNBD, but not if this program has made it."""
        bitmap_fd = self._open_bitmap()
        try:
            own = belonging.read_mark(self._cache_fd) is not None or belonging.is_marked_bitmap(bitmap_fd)
        finally:
            os.close(bitmap_fd)
        if own and not self._adopt:
            raise self._refusal(
                f"{self._state_path} is gone, which {self._path} had; --adopt-cache believes the bitmap as it is"
            )

    def _refuse_to_clear(self) -> None:
        """What has no state file and is no bitmap of this disk is something else that was named by mistake."""
        with suppress(FileNotFoundError):
            found = os.stat(self._path, follow_symlinks=False).st_size
            known = os.path.lexists(self._state_path) or belonging.is_marked_bitmap(self._path)
            if found not in (0, self._layout.bitmap_size) and not known:
                raise ConfigurationError(
                    f"{self._path} has {found} bytes and is no bitmap of a disk of {self._header.disk_size} bytes: "
                    "it is not replaced; remove it if it was one"
                )

    def _make(self, state_fd: int) -> None:
        files.write_header(state_fd, self._header._replace(boot_id=NO_BOOT))
        self._make_bitmap()
        os.fsync(state_fd)
        files.publish(self._state_path)
        files.publish(self._path)
        files.write_header(state_fd, self._header)

    def _make_bitmap(self) -> None:
        fd = files.make_new(self._path + NEW)
        try:
            files.allocate(fd, self._layout.bitmap_size)
            belonging.mark_bitmap(fd)
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
        self._mark()  # not before: a bitmap without a state file and a cache image with a mark are no C xNBD's
        files.write_header(state_fd, self._header)
        log.info("cache bitmap %s: taken over, it has no state file: left by a C xNBD?", self._path)

    def _replace(self, old_fd: int) -> SharedState:
        if not files.is_alone(old_fd):
            raise ConfigurationError(f"cache bitmap {self._path} is in use: stop its servers before --clear-bitmap")
        state_fd = files.open_new_locked(self._state_path + NEW, self._owners)
        with closed_on_error(state_fd):
            self._create(state_fd, True, self._tie_of(old_fd))
            shared = self._share(state_fd)
        os.close(old_fd)
        return shared

    @staticmethod
    def _tie_of(state_fd: int) -> Tie:
        try:
            return files.read_header(state_fd).tie
        except BadHeader:
            return NO_TIE

    # Going on

    def _resume(self, state_fd: int) -> None:
        found = self._check_state(state_fd)
        alone, same_boot = files.is_alone(state_fd), found.boot_id == self._header.boot_id
        mounts = belonging.mount_of(self._cache_fd), belonging.mount_of(state_fd)
        lived = same_boot and _has_lived(found.tie, mounts)
        recover = not (found.clean or lived) or files.read_failure(state_fd) is not None
        switched = alone and _was_switched(self._path, state_fd, self._header.boot_id)
        if switched:
            self._refuse_if_incomplete(state_fd, recover=recover)
        if not alone and not same_boot:
            raise ConfigurationError(f"cache bitmap {self._path} is in use on another machine: stop that server first")
        if not alone and found.tie.id == NO_ID:
            raise ConfigurationError(
                f"cache bitmap {self._path} is in use by an older xnbd-server: stop that one first"
            )
        if not alone:
            self._refuse_other_version()
        fresh = belonging.new_tie(self._cache_fd, state_fd) if found.tie.id == NO_ID else found.tie
        self._bind(fresh)
        self._claim_cache(alone=alone)
        if lived and files.shown_session(state_fd) == found.tie.session:
            found = found._replace(tie=found.tie._replace(previous=belonging.NO_SESSION))
        self._check_cache(found, state_fd, alone=alone, switched=switched)
        if found.boot_id == NO_BOOT:
            self._make_bitmap()
            files.publish(self._path)
            log.info("cache bitmap %s: made, which an earlier start did not finish", self._path)
        else:
            bitmap_fd = self._open_bitmap()
            try:
                if alone:
                    recover = recover or self._durable_copy_counts(found, bitmap_fd, state_fd)
                    self._settle_or_recover(bitmap_fd, state_fd, recover=recover, found=found)
                else:
                    log.info("cache bitmap %s: resumed, shared with another server", self._path)
            finally:
                os.close(bitmap_fd)
        if alone:
            self._begin_session(state_fd, found.tie)
        elif found.clean:
            files.write_header(state_fd, self._header)

    def _bind(self, tie: Tie) -> None:
        self._header = self._header._replace(tie=tie)

    def _mark(self) -> None:
        """Put id and session on the cache image, durably."""
        marked = belonging.write_mark(self._cache_fd, self._header.tie)
        if marked:
            os.fsync(self._cache_fd)
        self._bind(self._header.tie._replace(marked=marked))

    def _begin_session(self, state_fd: int, found: Tie) -> None:
        """Tie the files together anew. A power failure may leave the old session on the cache image."""
        # What was killed, or copied here, may not be on the disk yet, nor its mark.
        files.write_back(state_fd).sync(self._cache_fd, metadata=True)
        mark = belonging.read_mark(self._cache_fd)
        self._bind(belonging.renewed(self._header.tie, self._cache_fd, state_fd))
        if not found.marked or mark is None or mark.id != found.id:
            self._bind(self._header.tie._replace(marked=False))
            files.write_header(state_fd, self._header)
            self._mark()
            if self._header.tie.marked:
                files.write_header(state_fd, self._header)
                files.note_shown(state_fd, self._header.tie.session)
            return
        self._bind(self._header.tie._replace(previous=mark.session))
        files.write_header(state_fd, self._header)
        if not belonging.write_mark(self._cache_fd, self._header.tie):
            self._bind(self._header.tie._replace(marked=False))
            files.write_header(state_fd, self._header)
        files.note_shown(state_fd, self._header.tie.session)

    def _check_cache(self, found: Header, state_fd: int, *, alone: bool, switched: bool) -> None:
        """Raises `ConfigurationError` if the files speak of another cache image, or of this one at another time."""
        if self._adopt and alone:
            return
        reason = belonging.stranger(found.tie, self._cache_fd, clean=found.clean, switched=switched)
        if not reason or (alone and self._is_nothing_cached(state_fd) and not belonging.holds_data(self._cache_fd)):
            return
        raise self._refusal(
            f"the cache image {reason}; put the right one back, or if all of {self._path} is in this one believe it "
            "with --adopt-cache"
        )

    def _is_nothing_cached(self, state_fd: int) -> bool:
        if files.count_set(state_fd, self._layout, self._layout.durable):
            return False
        bitmap_fd = self._open_bitmap()
        try:
            return not files.count_set(bitmap_fd, self._layout, 0)
        finally:
            os.close(bitmap_fd)

    def _durable_copy_counts(self, found: Header, bitmap_fd: int, state_fd: int) -> bool:
        """Of files that nobody uses and whose live bitmap has lived, or that were closed cleanly.

        Raises `ConfigurationError` if they contradict each other, and nobody can tell which of them is right.
        """
        different = list(files.differences(bitmap_fd, state_fd, self._layout))
        if not different or self._adopt:
            return False
        if found.clean and found.tie.id != NO_ID:
            if files.checksum(state_fd, self._layout, self._layout.durable) == found.tie.checksum:
                return True
            if files.checksum(bitmap_fd, self._layout, 0) == found.tie.checksum:
                return False
        elif not found.clean and all(files.is_noted(state_fd, self._layout, difference) for difference in different):
            return False
        more, fewer = sum(d.forgotten for d in different), sum(d.missing for d in different)
        raise self._refusal(
            f"{self._path} has {more} blocks that its copy in {self._state_path} has not, and lacks {fewer}; put the "
            "right files back, or believe the bitmap with --adopt-cache"
        )

    def _claim_cache(self, *, alone: bool) -> None:
        """Before anything is changed. Raises `image_use.ImageInUse`, but not for siblings that have been switched."""
        if image_use.try_use_as(self._cache_fd, image_use.CACHE):
            if not image_use.try_claim_for(self._cache_fd, self._header.tie.id):
                raise image_use.OtherBitmap
            return
        if alone or not self._siblings_are_targets():
            raise image_use.ImageInUse
        image_use.turn_into_disk(self._cache_fd)

    def _siblings_are_targets(self) -> bool:
        try:
            return _scoreboard_says_target(self._path)
        except (OSError, ValueError):
            return False

    def _settle_or_recover(self, bitmap_fd: int, state_fd: int, *, recover: bool, found: Header) -> None:
        """`_settle`, which may hear of a write-back that failed under servers that were killed."""
        try:
            self._settle(bitmap_fd, state_fd, recover=recover, found=found)
        except WriteBackFailed:
            self._settle(bitmap_fd, state_fd, recover=True, found=found)

    def _settle(self, bitmap_fd: int, state_fd: int, *, recover: bool, found: Header) -> None:
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
            self._end_recovery(bitmap_fd, state_fd, found, forgotten)
            return
        for difference in different:
            files.claim(state_fd, self._layout, difference.page)
        process = ProcessState(reopen(bitmap_fd, readonly=False), reopen(state_fd, readonly=False), self._layout)
        with closing(process):
            if process.changed:
                process.checkpoint(self._cache_fd)
            else:
                process.write_back.sync(self._cache_fd)
        log.info("cache bitmap %s: resumed", self._path)

    def _end_recovery(self, bitmap_fd: int, state_fd: int, found: Header, forgotten: int) -> None:
        """The durable copy has replaced the live bitmap: after a failed write-back nothing else may come back."""
        failure = files.read_failure(state_fd)
        if failure is not None:
            drop_cached(self._cache_fd)
            files.forget_failure(bitmap_fd, state_fd, self._layout)
            what = f"recovered after a failed write-back ({os.strerror(failure.number)})"
        elif found.clean:
            what = "repaired from its copy in the state file, for it was changed while it was closed"
        elif found.boot_id != self._header.boot_id:
            what = "recovered after a power failure"
        else:
            what = "recovered, for its servers died and the mount is another one than theirs"
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


def _has_lived(tie: Tie, mounts: Tuple[int, int]) -> bool:
    """Whether the files lie on the same *mounts* as when servers used them, as far as that was noted."""
    return tie.id == NO_ID or (tie.cache_mount, tie.state_mount) == mounts
