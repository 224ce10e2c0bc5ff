"""Whether a cache image and a state file belong together, and whether their file systems have lived since.

A state file notes of its cache image (`Tie`): a random id, and the *session*, a number
that every server draws anew which is the first to use the files. Both stand on the
cache image too, as the extended attribute `ATTRIBUTE`, so that another file in its
place is noticed, and an older copy of it. Besides, the inode is noted, of a block device
its number and size; and, once the files are closed cleanly, when the cache image was
last changed: nobody has done anything to it since.

A copy of all files that keeps attributes and times (``cp -a``, ``rsync -aX``) is
believed, if they were closed cleanly before. Where the file system has no extended
attributes, inode and time have to do.

A mount is told by its number, which is never used twice while a system runs, and a
block device by its sequence number (``BLKGETDISKSEQ``): what the page cache held of
another one is gone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import struct
from typing import NamedTuple, Optional, Union

from ...storage import space

ATTRIBUTE = "user.xnbd.cache"
NO_ID = bytes(16)
SESSION_SIZE = 8
NO_SESSION = bytes(SESSION_SIZE)
UNKNOWN = 0

_MARK = re.compile(rb"([0-9a-f]{32})\.([0-9a-f]{16})")
_NO_ATTRIBUTES = (errno.EOPNOTSUPP, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.ENOSYS, errno.EINVAL)
_STICKY = stat.S_ISVTX

_MOST_TO_SEARCH = 1 << 30
_SEARCH_STEP = 1 << 20

_STATX_MNT_ID_UNIQUE = 0x4000
_AT_EMPTY_PATH = 0x1000
_STATX_SIZE, _STATX_MNT_ID_AT = 256, 144
_BLKGETDISKSEQ = 0x80081280


class Tie(NamedTuple):
    """What a state file notes of its cache image; all zeros: nothing, for it is of version 1.

    The cache image is *marked* if its file system has attributes. It may still bear the
    *previous* session after a power failure. *number* is the inode, or of a block device
    (*size* > 0) the device's number; *changed* the time of the last change in ns, and
    *checksum* of the bitmap, after a clean end only. *cache_mount* and *state_mount* as
    `mount_of`.
    """

    id: bytes = NO_ID
    session: bytes = NO_SESSION
    previous: bytes = NO_SESSION
    marked: bool = False
    number: int = 0
    size: int = 0
    changed: int = UNKNOWN
    cache_mount: int = UNKNOWN
    state_mount: int = UNKNOWN
    checksum: int = 0


NO_TIE = Tie()


class Mark(NamedTuple):
    """What stands on a cache image."""

    id: bytes
    session: bytes


class Place(NamedTuple):
    """Of a cache image: *number*, *size* and *changed* as in `Tie`."""

    number: int
    size: int
    changed: int


def new_tie(cache_fd: int, state_fd: int) -> Tie:
    """For a bitmap that is made, or has had none."""
    return renewed(Tie(id=os.urandom(16)), cache_fd, state_fd)._replace(previous=NO_SESSION)


def renewed(tie: Tie, cache_fd: int, state_fd: int) -> Tie:
    """*tie* in a new session, with the files where they are now."""
    place = place_of(cache_fd)
    return tie._replace(
        session=os.urandom(SESSION_SIZE),
        previous=tie.session,
        number=place.number,
        size=place.size,
        changed=UNKNOWN,
        cache_mount=mount_of(cache_fd),
        state_mount=mount_of(state_fd),
        checksum=0,
    )


def read_mark(cache_fd: int) -> Optional[Mark]:
    """None if there is none, or none that can be read."""
    try:
        match = _MARK.fullmatch(os.getxattr(cache_fd, ATTRIBUTE))
    except OSError:
        return None
    return Mark(*(bytes.fromhex(text.decode()) for text in match.groups())) if match else None


def write_mark(cache_fd: int, tie: Tie) -> bool:
    """Put id and session on the cache image, not yet durably; False where there are no attributes."""
    try:
        os.setxattr(cache_fd, ATTRIBUTE, f"{tie.id.hex()}.{tie.session.hex()}".encode())
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTES:
            raise
        return False
    return True


def mark_bitmap(bitmap_fd: int) -> None:
    """Show that the bitmap is of this program, also where there are no attributes: by a bit of no use for files."""
    os.fchmod(bitmap_fd, stat.S_IMODE(os.fstat(bitmap_fd).st_mode) | _STICKY)


def is_marked_bitmap(bitmap: Union[int, str]) -> bool:
    """Of a descriptor or a path."""
    return bool(os.stat(bitmap).st_mode & _STICKY)


def file_number(status: os.stat_result) -> int:
    return status.st_ino


def place_of(cache_fd: int) -> Place:
    status = os.fstat(cache_fd)
    if stat.S_ISBLK(status.st_mode):
        return Place(status.st_rdev, space.device_size(cache_fd), UNKNOWN)
    return Place(file_number(status), 0, status.st_mtime_ns)


def stranger(tie: Tie, cache_fd: int, *, clean: bool, switched: bool) -> str:
    """Why the cache image is not the one that *tie* speaks of, or not as it was; empty if it is.

    *clean*: the files were closed; *switched*: as a plain target, whose image anybody may change.
    """
    place, mark = place_of(cache_fd), read_mark(cache_fd)
    if tie.id == NO_ID:
        return "is known to a newer state file: this one is an older copy" if mark is not None else ""
    untouched = clean and place.changed == tie.changed != UNKNOWN
    if tie.marked and mark is None:
        return "is another file than the cache of this bitmap: its mark is missing"
    if mark is not None and mark.id != tie.id:
        return "is the cache of another bitmap"
    if tie.marked and mark is not None and mark.session not in (tie.session, tie.previous):
        return "and the state file were not used together last: one of them is an older copy"
    if (place.number, place.size) != (tie.number, tie.size) and not untouched:
        return "is another file than the cache of this bitmap"
    if clean and not switched and tie.changed != place.changed:
        return "was changed since its proxy has closed it"
    return ""


def holds_data(fd: int) -> bool:
    """Whether anything but zeros is in the image; also if it has so much allocated that nobody wants to wait."""
    searched, at = 0, _data_from(fd, 0)
    while at is not None:
        data = os.pread(fd, _SEARCH_STEP, at)
        searched += len(data)
        if data.count(0) != len(data) or searched > _MOST_TO_SEARCH:
            return True
        at = _data_from(fd, at + len(data)) if data else None
    return False


def _data_from(fd: int, offset: int) -> Optional[int]:
    """Where data may begin from *offset* on; None if there is no more."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno == errno.EINVAL:  # a block device
            return offset
        raise


def mount_of(fd: int) -> int:
    """A number for the mount through which *fd* was opened, or the block device that it is, as attached now."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        try:
            return int(struct.unpack("Q", fcntl.ioctl(fd, _BLKGETDISKSEQ, bytes(8)))[0])
        except OSError:
            pass  # a kernel before 5.15
    return _unique_mount(fd) or _mount_line(fd)


def _unique_mount(fd: int) -> int:
    """From Linux 6.8 on, else 0."""
    import ctypes

    statx = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
    if statx is None:
        return UNKNOWN
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if statx(fd, b"", _AT_EMPTY_PATH, _STATX_MNT_ID_UNIQUE, buffer):
        return UNKNOWN
    (mask,) = struct.unpack_from("I", buffer.raw)
    (number,) = struct.unpack_from("Q", buffer.raw, _STATX_MNT_ID_AT)
    return int(number) if mask & _STATX_MNT_ID_UNIQUE else UNKNOWN


def _mount_line(fd: int) -> int:
    """What ``/proc`` says of the mount, as a number: it may be the same after an end and a new beginning."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        match = re.search(r"^mnt_id:\s*(\d+)$", info.read(), re.MULTILINE)
    number = match[1] if match else ""
    with open("/proc/self/mountinfo", "rb") as mounts:
        line = next((line for line in mounts if line.split(b" ", 1)[0] == number.encode()), b"")
    told = b"%d %s" % (os.fstat(fd).st_dev, line or number.encode())
    return int.from_bytes(hashlib.sha256(told).digest()[:8], "little")
