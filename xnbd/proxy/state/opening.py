"""The files of a cache's bitmap: made, taken over, recovered or refused when a server starts.

This module is the way in. `creation` makes files or takes them over, `resumption` goes on
with those that are there, `verdict` decides which copy counts, `shared` keeps them until
the end, and `known` tells others of them.

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

The **checksums** of blocks that were fetched lie in ``CACHE_BITMAP_IMAGE.sums`` (`proxy.state.sums`).

With a limit, ``CACHE_BITMAP_IMAGE.used`` says when what was used (`proxy.state.use_map`).

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
from typing import Optional

from ...errors import ConfigurationError
from ...origin.address import places_of
from ...storage import image_use
from ...system.file_locks import RangeLocks
from ...system.process import closed_on_error
from . import files
from .belonging import NO_TIE, Tie
from .creation import create
from .entry import Entry
from .files import NEW
from .format import OPENING, BadHeader, Header, identity, layout_of
from .known import BOOT_ID, read_boot_id
from .resumption import resume
from .scoreboard_file import open_scoreboard
from .shared import SharedState
from .sums_file import forget_checkpoints, open_integrity
from .use_map_file import open_use_map


def open_state(
    bitmap_path: str,
    cache_fd: int,
    *,
    disk_size: int,
    origin: str,
    clear: bool = False,
    adopt: bool = False,
    thorough: bool = True,
    cache_limit: Optional[int] = None,
    boot_id_path: str = BOOT_ID,
) -> SharedState:
    """The bitmap at *bitmap_path* of a cache of *disk_size* bytes of the disk at *origin*.

    For the master, before it forks. *cache_fd* is the cache image: it is synced
    before the durable copy speaks of it. With *clear* no block is cached, whatever
    the files said, if nobody uses them. With *adopt* somebody vouches that the cache
    image has what the bitmap says, whatever speaks against it. Unless it has to be *thorough*,
    a start after a kill leaves pages of the bitmap to be looked at before their first use. Of *cache_limit* bytes, if
    that is not None, clean blocks may take up. *origin* is where the disk
    was when the bitmap was made, or where it has been moved to since, however it is reached. Raises
    `ConfigurationError`, and `image_use.ImageInUse` if another server serves the cache image
    as a disk by itself, or `image_use.OtherBitmap`.
    """
    path = os.path.realpath(bitmap_path)
    try:
        header = Header(disk_size, identity(places_of(origin)[0]), read_boot_id(boot_id_path), clean=False)
        for _ in image_use.attempts():
            try:
                layout = layout_of(disk_size)
                entry = Entry(
                    path,
                    cache_fd,
                    layout,
                    header,
                    origin=origin,
                    adopt=adopt,
                    thorough=thorough,
                    cache_limit=cache_limit,
                )
                return _enter(entry, clear=clear)
            except image_use.ImageInUse as error:
                in_use = error
    except OSError as error:
        raise ConfigurationError(f"cannot use cache bitmap {path} with its state file: {error.strerror}") from error
    raise in_use


def _enter(entry: Entry, *, clear: bool) -> SharedState:
    while True:
        try:
            state_fd = files.open_locked(entry.state_path)
        except FileNotFoundError:
            state_fd = files.open_new_locked(entry.state_path + NEW, entry.owners)
            with closed_on_error(state_fd):
                if not os.path.lexists(entry.state_path):
                    create(entry, state_fd, clear)
                    return _share(entry, state_fd)
                files.remove_unfinished(entry.state_path)
            os.close(state_fd)  # another server was quicker
        else:
            with closed_on_error(state_fd):
                if clear:
                    return _replace(entry, state_fd)
                resume(entry, state_fd)
                return _share(entry, state_fd)


def _replace(entry: Entry, old_fd: int) -> SharedState:
    if not files.is_alone(old_fd):
        raise ConfigurationError(f"cache bitmap {entry.path} is in use: stop its servers before --clear-bitmap")
    forget_checkpoints(entry)
    state_fd = files.open_new_locked(entry.state_path + NEW, entry.owners)
    with closed_on_error(state_fd):
        create(entry, state_fd, True, _tie_of(old_fd))
        shared = _share(entry, state_fd)
    os.close(old_fd)
    return shared


def _tie_of(state_fd: int) -> Tie:
    try:
        return files.read_header(state_fd).tie
    except BadHeader:
        return NO_TIE


def _share(entry: Entry, state_fd: int) -> SharedState:
    bitmap_fd = entry.open_bitmap()
    with closed_on_error(bitmap_fd):
        scoreboard_fd = open_scoreboard(entry, state_fd)
        with closed_on_error(scoreboard_fd):
            integrity_fds = open_integrity(entry, state_fd)
            fds = (bitmap_fd, state_fd, scoreboard_fd, *integrity_fds)
            use_fd = open_use_map(entry, state_fd, scoreboard_fd)
            shared = SharedState(entry.path, fds, entry.layout, entry.header, use_fd)
            files.become_user(state_fd)
    RangeLocks(state_fd).release(OPENING, 1)
    return shared
