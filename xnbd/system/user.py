"""Another user's rights in place of root's: found, tried out, and taken for good.

Root's rights are gone then in every way that Linux has: all four user and group ids, the supplementary groups, all
capabilities, and what a program could give them back by when it is executed (``PR_SET_NO_NEW_PRIVS``).
"""

from __future__ import annotations

import errno
import json
import os
from typing import Any, Callable, NamedTuple, Optional, Sequence, Tuple

from ..errors import ConfigurationError
from ..making import set_owner
from .forking import fork_with_pipe

_LARGEST_ID = (1 << 32) - 2

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_CAPABILITY_VERSION_3 = 0x20080522


class User(NamedTuple):
    """A user by *name*, or by number if there is no name, with the *groups* besides the main one."""

    name: str
    uid: int
    gid: int
    groups: Tuple[int, ...]

    @property
    def is_this_one(self) -> bool:
        """Whether this process has that user's rights already, and no others."""
        return (self.uid,) * 3 == os.getresuid() and (self.gid,) * 3 == os.getresgid()


def find_user(text: str) -> User:
    """The user that *text*, ``NAME[:GROUP]``, names; numbers will do. Raises `ConfigurationError`."""
    name, colon, group = text.partition(":")
    if not name or (colon and not group):
        raise ConfigurationError(f"--user {text}: expected NAME or NAME:GROUP", 2)
    entry = _find_entry(name)
    if entry is None and not name.isdecimal():
        raise ConfigurationError(f"--user {text}: there is no user {name}")
    gid = _find_group(text, group) if group else None if entry is None else int(entry.pw_gid)
    if gid is None:
        raise ConfigurationError(f"--user {text}: no user has this number, so say the group too: {name}:GROUP")
    if entry is None:
        user = User(name, _number(text, name), gid, (gid,))
    else:
        user = User(entry.pw_name, entry.pw_uid, gid, tuple(os.getgrouplist(entry.pw_name, gid)))
    return _checked(text, user)


def _checked(text: str, user: User) -> User:
    """Raises `ConfigurationError` if this process cannot become *user*, or would have won nothing."""
    if not user.uid:
        raise ConfigurationError(f"--user {text}: that is root, whose rights are to be given up: name another user")
    if os.geteuid() and not user.is_this_one:
        raise ConfigurationError(f"--user {text}: only root can start a server that becomes another user")
    return user


def _find_entry(name: str) -> Any:
    """The entry of the user called *name*, or of that number; None if there is none."""
    import pwd

    try:
        return pwd.getpwnam(name)
    except KeyError:
        pass
    try:
        return pwd.getpwuid(int(name)) if name.isdecimal() else None
    except (KeyError, OverflowError):
        return None


def _find_group(text: str, name: str) -> int:
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        if name.isdecimal():
            return _number(text, name)
        raise ConfigurationError(f"--user {text}: there is no group {name}") from None


def _number(text: str, digits: str) -> int:
    number = int(digits) if len(digits) < 20 else _LARGEST_ID + 1
    if number > _LARGEST_ID:
        raise ConfigurationError(f"--user {text}: {digits} is too large for a number of a user or group", 2)
    return number


def become(user: User) -> None:
    """Have *user*'s rights from now on, in this process and those that it forks. Raises `ConfigurationError`."""
    set_owner(None)  # what is made from now on is that user's by itself
    try:
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        _forgo_capabilities()
    except OSError as error:
        raise ConfigurationError(
            f"the server cannot become {user.name}: {error.strerror} (root needs CAP_SETUID and CAP_SETGID for that)"
        ) from error
    if _is_root_again():
        raise ConfigurationError(f"{user.name} could become root again, so the server does not start")


def _forgo_capabilities() -> None:
    """Raises `OSError`.

    The processes of a server look at each other's descriptors, which Linux forbids after a change of the user until
    the process allows it: to this user, who has it in any server that he starts.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    nothing = (ctypes.c_uint32 * 6)()
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    for outcome in (
        libc.capset(header, nothing),
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0),
    ):
        if outcome:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _is_root_again() -> bool:
    try:
        os.setresuid(-1, 0, -1)
    except PermissionError:
        return False
    return True


Finding = Tuple[bool, str]
"""What would fail later, and whether the server would be of no use then."""


def ask_as(user: User, question: Callable[[], Sequence[Finding]]) -> Sequence[Finding]:
    """What *question* finds in a process that has become *user*. Raises `ConfigurationError`."""

    def live(answer: int) -> int:
        try:
            become(user)
            found = list(question())
        except ConfigurationError as error:
            found = [(True, str(error))]
        with os.fdopen(answer, "w") as stream:
            json.dump(found, stream)
        return 0

    try:
        pid, reading = fork_with_pipe("a process to try the user's rights", live)
    except OSError as error:
        raise ConfigurationError(f"cannot start a process: {error.strerror}") from error
    with os.fdopen(reading) as stream:
        answer = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise ConfigurationError(f"the rights of {user.name} could not be tried out: status {status}")
    return [(bool(vital), str(text)) for vital, text in json.loads(answer)]


def blocked_path(error: OSError) -> Optional[str]:
    """The file that could not be opened for want of rights; None if that was not the trouble."""
    if error.errno not in (errno.EACCES, errno.EPERM):
        return None
    path = str(error.filename)
    return os.readlink(path) if path.startswith("/proc/self/fd/") else path
