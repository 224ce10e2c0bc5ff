"""What the files of a bitmap tell of a disk, to those who do not open them for use."""

from __future__ import annotations

import os
from contextlib import closing
from typing import Iterator, NamedTuple, Optional, Tuple

from ...errors import ConfigurationError
from ...scoreboard.layout import TARGET
from ...scoreboard.scoreboard import Scoreboard
from ...storage.blocks import steps
from ...storage.extents import file_extents
from . import belonging, files
from .belonging import UNKNOWN
from .format import NO_BOOT, SCOREBOARD_SUFFIX, SUFFIX, BadHeader, layout_of

_STEP = 1 << 16

BOOT_ID = "/proc/sys/kernel/random/boot_id"


def has_cached_blocks(bitmap_path: str) -> bool:
    """Whether some block is cached, as far as the bitmap or its durable copy say."""
    path = os.path.realpath(bitmap_path)
    return _has_bits(path, durable=False) or _has_bits(path + SUFFIX, durable=True)


def _has_bits(path: str, *, durable: bool) -> bool:
    """In the file, which is a bitmap, or has a *durable* one where its header says."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            start, length = 0, os.fstat(file.fileno()).st_size
            if durable:
                layout = layout_of(files.read_header(file.fileno()).disk_size)
                start, length = layout.durable, layout.bitmap_size
            parts = (os.pread(file.fileno(), count, at) for at, count in _data(file.fileno(), start, length))
            return any(part.count(0) != len(part) for part in parts)
    except (OSError, BadHeader):
        return False


def _data(fd: int, offset: int, length: int) -> Iterator[Tuple[int, int]]:
    """Where there is any: an empty bitmap of a large disk takes long to read."""
    for extent in file_extents(fd, offset, length):
        if not extent.hole:
            yield from steps(offset, extent.length, _STEP)
        offset += extent.length


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
        fd = _open_without_waiting(os.path.realpath(bitmap_path) + SUFFIX, os.O_RDONLY)
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
            return was_switched(path, state_fd, read_boot_id(BOOT_ID))
        return scoreboard_says_target(path)
    except (OSError, ValueError, ConfigurationError, BadHeader):
        return False
    finally:
        os.close(state_fd)


def scoreboard_says_target(path: str) -> bool:
    """Raises `OSError`, `ValueError` and `ConfigurationError` if there is no scoreboard to be read."""
    with closing(Scoreboard(files.open_regular(path + SCOREBOARD_SUFFIX))) as scoreboard:
        return scoreboard.mode == TARGET


def was_switched(path: str, state_fd: int, boot_id: bytes) -> bool:
    """Whether the last servers, which are gone, have left the disk as a plain target. Raises `BadHeader`.

    The state file says so from before the switch: who died then has left a scoreboard that says otherwise.
    """
    if not files.read_steering(state_fd).switched:
        return False
    header = files.read_header(state_fd)
    if header.boot_id != boot_id or header.tie.state_mount not in (belonging.mount_of(state_fd), UNKNOWN):
        return True  # and nobody knows what a power failure has left of the scoreboard
    try:
        return scoreboard_says_target(path)
    except (OSError, ValueError, ConfigurationError):
        return True


def read_boot_id(path: str) -> bytes:
    """Raises `ConfigurationError`."""
    try:
        with open(path, encoding="ascii") as file:
            boot_id = bytes.fromhex(file.read().strip().replace("-", ""))
    except FileNotFoundError:
        raise ConfigurationError(f"there is no {path}: mount /proc") from None
    if len(boot_id) != len(NO_BOOT):
        raise ConfigurationError(f"{path} holds no boot id")
    return boot_id
