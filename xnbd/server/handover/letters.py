"""What two processes say to each other about a client that one of them hands over, and how that goes over sockets.

An offer goes, with one end of a channel, over a socket of which all read who might take a client
(`SOCK_DGRAM`). To those who do not have the disk yet it brings that along: a `Kit`. All the rest goes
over that channel (`SOCK_SEQPACKET`), each letter with one byte in front:

======  ========  ===================================================================================
letter  from      meaning
======  ========  ===================================================================================
R       the new   I wait for your client; my process id
N       the new   no, for this reason
S       the old   the session, with the client's descriptor and the file of the session
(end)   either    I do not wait any more: I have what I wanted, or am dead
======  ========  ===================================================================================

The session's file is a token, too. Both processes have it, and whoever seals it first has the client: the new
one does so when it has understood the session, and serves the client at once; the old one when it does not want to
wait any more. So both never serve the client, and for the client's sake only one process has to be woken
up. The old process keeps the client's descriptor until it knows: a new one that refuses or dies before it has sealed
the file takes nothing from it.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ...system.kept import Kept

MAGIC = b"XNBDMOVE"
VERSION = 1

READY, REFUSED, SESSION = b"R", b"N", b"S"

PATIENCE = 8.0
"""Seconds until the other process has to have answered. The client is served meanwhile."""

_LONGEST = 160 << 10
_MOST_DESCRIPTORS = 32
"""A disk whose cache has checksums and a limit needs eleven."""

_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_TAKE_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


class Letter(NamedTuple):
    """What has come; the descriptors are the receiver's, who closes them. No *data*: the other end is closed."""

    data: bytes
    fds: List[int]

    def close(self) -> None:
        """Let go of the descriptors."""
        for fd in self.fds:
            os.close(fd)


class Enclosed(Kept):
    """Descriptors that go with a letter, in which each has a number below zero."""

    def __call__(self, fd: int) -> int:
        self.fds.append(fd)
        return -len(self.fds)


def unfold(packed: Any, fds: Sequence[int]) -> Any:
    """What has come with the descriptors *fds*: these in place of their numbers. Raises `IndexError`."""
    if isinstance(packed, dict):
        return {name: unfold(value, fds) for name, value in packed.items()}
    if isinstance(packed, list):
        return [unfold(value, fds) for value in packed]
    return fds[~packed] if isinstance(packed, int) and packed < 0 else packed


class Kit(NamedTuple):
    """What a process needs to serve a disk that it does not have: *fields*, packed with the descriptors *fds*."""

    fields: Mapping[str, Any]
    fds: Sequence[int]


NO_KIT = Kit({}, ())


def send_letter(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """All of it, or nothing. Raises `OSError`, of which `BlockingIOError` says that too much is under way."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary, _SEND_FLAGS)


def receive_letter(sock: socket.socket) -> Optional[Letter]:
    """The next letter, None if there is none yet. Raises `OSError`."""
    while True:
        try:
            data, ancillary, flags, _ = sock.recvmsg(_LONGEST, socket.CMSG_SPACE(_MOST_DESCRIPTORS * 4), _TAKE_FLAGS)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            continue  # the other end was closed with something unread; what it said before that comes all the same
        letter = Letter(data, _descriptors_in(ancillary))
        if not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            return letter
        letter.close()
        return Letter(b"?", [])


def _descriptors_in(ancillary: List[Tuple[int, int, bytes]]) -> List[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def claim(fd: int) -> bool:
    """Seal the session's file *fd*: from now on this process has the client; or False, because the other one has it.

    Raises `OSError` if that cannot be known.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        return False
    return True


def pack_offer(disk: Sequence[int], kit: Mapping[str, Any] = NO_KIT.fields, *, origin: bool = False) -> bytes:
    """An offer of a client of *disk*, as `Source.identity` names it, with the fields of a *kit* perhaps.

    It may need blocks of the *origin*.
    """
    import json

    fields = {
        "format": VERSION,
        "disk": list(disk),
        **({"kit": kit} if kit else {}),
        **({"origin": 1} if origin else {}),
    }
    return MAGIC + json.dumps(fields).encode()


def parse_offer(data: bytes) -> Dict[str, Any]:
    """Raises `ValueError` unless it is one that this program understands."""
    import json

    if not data.startswith(MAGIC):
        raise ValueError("this is no offer of a client")
    fields = json.loads(data[len(MAGIC) :])
    if not isinstance(fields, dict) or fields.get("format") != VERSION:
        raise ValueError("the offer is in the format of another version")
    return fields
