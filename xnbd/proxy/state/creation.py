"""A bitmap's files that are made, or taken over from a C xNBD, which keeps no state file."""

from __future__ import annotations

import os
from contextlib import suppress

from ...errors import ConfigurationError
from ...logs import log
from ...storage.writeback import WriteBackFailed
from . import belonging, copies, files, mending
from .belonging import NO_TIE, Tie
from .entry import Entry
from .format import NO_BOOT
from .known import has_cached_blocks


def create(entry: Entry, state_fd: int, clear: bool, old: Tie = NO_TIE) -> None:
    """Make the new file behind *state_fd* the state file; there is none yet, or the one with *old* may go."""
    try:
        entry.bind(_tie_to_begin_with(entry, state_fd, old))
        entry.use_cache(alone=True)
        take_over = not clear and os.path.lexists(entry.path)
        if take_over:
            _refuse_own_bitmap(entry)
            _refuse_unused_bitmap(entry)
        elif clear:
            _refuse_to_clear(entry)
        elif belonging.holds_data(entry.cache_fd):
            raise entry.refusal(f"there is no {entry.path}, but the cache image holds data, which would be lost")
        os.ftruncate(state_fd, 0)
        files.allocate(state_fd, entry.layout.size)
        if take_over:
            _take_over(entry, state_fd)
        else:
            entry.mark(state_fd)
            _make(entry, state_fd)
            log.info("cache bitmap %s: %s", entry.path, "cleared" if clear else "new, nothing is cached yet")
    except BaseException:
        entry.remove_unfinished()
        raise


def _tie_to_begin_with(entry: Entry, state_fd: int, old: Tie) -> Tie:
    """What the *old* state file has put on the cache image stays: until the new one is there the old one counts."""
    tie, mark = belonging.new_tie(entry.cache_fd, state_fd), belonging.read_mark(entry.cache_fd)
    return tie._replace(id=mark.id, session=mark.session) if mark is not None and mark.id == old.id else tie


def _refuse_own_bitmap(entry: Entry) -> None:
    """A bitmap without a state file was left by a C xNBD, but not if this program has made it."""
    bitmap_fd = entry.open_bitmap()
    try:
        own = belonging.read_mark(entry.cache_fd) is not None or belonging.is_marked_bitmap(bitmap_fd)
    finally:
        os.close(bitmap_fd)
    if own and not entry.adopt:
        raise entry.refusal(
            f"{entry.state_path} is gone, which {entry.path} had; --adopt-cache believes the bitmap as it is"
        )


def _refuse_unused_bitmap(entry: Entry) -> None:
    """A bitmap of which nothing was ever cached belongs to an empty cache image: another one is there by mistake."""
    if not entry.adopt and not has_cached_blocks(entry.path) and belonging.holds_data(entry.cache_fd):
        raise entry.refusal(f"{entry.path} has no cached block, but the cache image holds data, which would be lost")


def _refuse_to_clear(entry: Entry) -> None:
    """What has no state file and is no bitmap of this disk is something else that was named by mistake."""
    with suppress(FileNotFoundError):
        found = os.stat(entry.path, follow_symlinks=False).st_size
        known = os.path.lexists(entry.state_path) or belonging.is_marked_bitmap(entry.path)
        if found not in (0, entry.layout.bitmap_size) and not known:
            raise ConfigurationError(
                f"{entry.path} has {found} bytes and is no bitmap of a disk of {entry.header.disk_size} bytes: "
                "it is not replaced; remove it if it was one"
            )


def _make(entry: Entry, state_fd: int) -> None:
    files.write_header(state_fd, entry.header._replace(boot_id=NO_BOOT))
    entry.make_bitmap()
    mending.make_empty(state_fd, entry.layout)
    os.fsync(state_fd)
    files.publish(entry.state_path)
    files.publish(entry.path)
    files.write_header(state_fd, entry.header)


def _take_over(entry: Entry, state_fd: int) -> None:
    bitmap_fd = entry.open_bitmap()
    files.write_header(state_fd, entry.header)
    try:
        files.allocate(bitmap_fd, entry.layout.bitmap_size)
        files.write_back(state_fd).sync(entry.cache_fd)
        for difference in copies.differences(bitmap_fd, state_fd, entry.layout):
            copies.save_live(state_fd, entry.layout, difference)
        mending.make_of_bitmap(bitmap_fd, state_fd, entry.layout)
    except WriteBackFailed:
        files.publish(entry.state_path)  # the next start has to know that nothing is sure
        raise
    finally:
        os.close(bitmap_fd)
    os.fsync(state_fd)
    files.publish(entry.state_path)
    entry.mark(state_fd)  # not before: a bitmap without a state file and a cache image with a mark are no C xNBD's
    files.write_header(state_fd, entry.header)
    log.info("cache bitmap %s: taken over, it has no state file: left by a C xNBD?", entry.path)
