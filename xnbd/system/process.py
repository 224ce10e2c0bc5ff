"""This process as the operating system sees it: descriptors, title, daemon, pid file."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import sys
from contextlib import contextmanager, suppress
from typing import Any, Dict, Iterator, Mapping, Optional

from ..errors import ConfigurationError
from ..making import is_at, open_or_make
from .kept import Kept


def take_client_socket(fd: int) -> Optional[int]:
    """Take the client's socket *fd* off the standard streams.

    inetd gives it as descriptors 0, 1 and 2: whatever a library prints would end up
    in the client's data. Returns a higher descriptor of that socket, or None if *fd*
    is none. Standard output and standard error stay as they are unless they are
    that same socket.
    """
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    if not stat.S_ISSOCK(status.st_mode):
        return None
    client = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        if not _is_open(stream) or os.path.samestat(os.fstat(stream), status):
            os.dup2(null, stream)
    if null > 2:
        os.close(null)
    return client


def is_super_servers_child() -> bool:
    """Whether standard input and standard error are one socket: only a super-server starts a program like that."""
    try:
        status, errors = os.fstat(0), os.fstat(2)
    except OSError:
        return False
    return stat.S_ISSOCK(status.st_mode) and os.path.samestat(status, errors)


def pid_namespace() -> int:
    """Number of the namespace in which this process's id means something; 0 if the system does not tell."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def keep_standard_streams() -> None:
    """Let no file or socket get the number of a standard stream that this program was started without."""
    while True:
        null = os.open(os.devnull, os.O_RDWR)
        if null > 2:
            os.close(null)
            return
        os.set_inheritable(null, True)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


_directory = [""]
"""To which paths belong; empty: the working directory."""


@contextmanager
def paths_from(directory: Optional[str]) -> Iterator[None]:
    """Inside, paths belong to *directory*: a command line's, which was given there. None: to the working directory."""
    before = _directory[0]
    _directory[0] = directory or ""
    try:
        yield
    finally:
        _directory[0] = before


def whole_path(path: str, name: str) -> str:
    """*path*, which *name* is given, from the root on. Raises `ConfigurationError` if the working directory is gone."""
    try:
        return os.path.abspath(os.path.join(_directory[0], path))
    except FileNotFoundError:
        raise ConfigurationError(
            f"{name} {path}: the working directory does not exist any more: give the whole path"
        ) from None


def require_descriptors(number: int) -> None:
    """Raises `ConfigurationError` unless a process of this program can open so many more files."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    used = os.dup(0)  # the lowest that is free
    os.close(used)
    if limit - used < number:
        raise ConfigurationError(f"ulimit -n is {limit}, which is too low: {used + number} are needed here")


@contextmanager
def closed_on_error(fd: int) -> Iterator[None]:
    """Close *fd* if something goes wrong before its owner has it."""
    try:
        yield
    except BaseException:
        os.close(fd)
        raise


def set_title(role: str, *details: str, program: str = "xnbd-server") -> None:
    """What ``ps`` shows for this process."""
    from setproctitle import setproctitle

    title = " ".join((f"{program}:", role, *details))
    setproctitle(title.encode("utf-8", "backslashreplace").decode())


def leave_terminal() -> None:
    """Keep nobody waiting who reads what this process might say."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if null > 2:
        os.close(null)


class Daemon:
    """A process that goes into the background: its parent stays until the child is ready or has failed."""

    def __init__(self) -> None:
        """Fork; only the daemon returns from here, the parent leaves with its verdict."""
        verdict, self._report = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        if os.fork():
            os.close(self._report)
            _leave_by_verdict(verdict)
        os.close(verdict)
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir("/")

    def ready(self) -> None:
        """Let the parent leave with success, and the terminal go."""
        leave_terminal()
        os.write(self._report, b"0")
        os.close(self._report)

    def failed(self, status: int) -> None:
        """Let the parent leave with *status* as soon as this process has said why and ended."""
        os.write(self._report, str(status).encode())


def _leave_by_verdict(verdict: int) -> None:
    """End of the parent, with the status that the daemon tells; 1 if it ends without a word."""
    status = int(os.read(verdict, 16) or b"1")
    if status:
        os.read(verdict, 1)  # nothing comes but the daemon's end, and before that its complaint
    os._exit(status)


_PID_FILE = re.compile(rb"[\d\n\0]{0,32}")
"""What a pid file may hold: zeros are what a power failure can make of it."""


class PidFile:
    """A file with the master's process id, written when clients can connect; locked for as long as the master lives."""

    def __init__(self, path: str) -> None:
        """What a dead process has left there goes: who waits for the file must not find it too early.

        Raises `ConfigurationError` if another live process holds *path*, or if that is no pid file.
        """
        self._path = path
        self._fd: Optional[int] = None
        self._pid = 0
        try:
            with suppress(FileNotFoundError):
                self._take(_open_locked(path))
                self._remove()
        except OSError as error:
            raise ConfigurationError(_pid_file_trouble(path, error)) from error
        directory = os.path.dirname(path)
        if not os.access(directory, os.W_OK | os.X_OK):
            number = errno.EACCES if os.path.isdir(directory) else errno.ENOENT
            raise ConfigurationError(f"cannot write pid file {path}: {os.strerror(number)}")

    def write(self) -> None:
        """Make the file, in the process whose id it is to hold. Raises `ConfigurationError` like the constructor."""
        try:
            self._take(_open_locked(self._path, make=True))
            # A server that was just ending may have removed it before it was locked.
            while not is_at(self._path, self._held):
                os.close(self._held)
                self._take(_open_locked(self._path, make=True))
            self._pid = os.getpid()
            os.ftruncate(self._held, 0)
            os.pwrite(self._held, f"{self._pid}\n".encode(), 0)
        except OSError as error:
            raise ConfigurationError(_pid_file_trouble(self._path, error)) from error

    def pack(self, kept: Kept) -> Dict[str, Any]:
        """For the next program of this process. The lock ends when the process closes any descriptor of the file."""
        return {"path": self._path, "fd": kept(self._held)}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> PidFile:
        """What the program before has written."""
        file = cls.__new__(cls)
        file._path, file._fd, file._pid = packed["path"], packed["fd"], os.getpid()
        return file

    @property
    def _held(self) -> int:
        assert self._fd is not None
        return self._fd

    def _take(self, fd: int) -> None:
        """Hold *fd* if it is of a pid file."""
        with closed_on_error(fd):
            if not _PID_FILE.fullmatch(os.read(fd, 512)):
                raise ConfigurationError(f"{self._path} is no pid file: remove it, or choose another --pidfile")
        self._fd = fd

    def remove(self) -> None:
        """Remove the file, if this process has written it and nobody else's stands in its place."""
        if self._fd is not None and os.getpid() == self._pid:
            self._remove()

    def _remove(self) -> None:
        """Remove the file, or empty it if this process has not the right to: it has given root's rights up."""
        try:
            if is_at(self._path, self._held):
                os.unlink(self._path)
        except PermissionError:
            os.ftruncate(self._held, 0)
        os.close(self._held)
        self._fd = None


def _open_locked(path: str, *, make: bool = False) -> int:
    """A descriptor of the file at *path*. Raises `OSError` if another process has locked it."""
    flags = os.O_RDWR | os.O_NONBLOCK
    fd = open_or_make(path, flags) if make else os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    with closed_on_error(fd):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ConfigurationError(f"{path} is no regular file: choose another --pidfile")
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def _pid_file_trouble(path: str, error: OSError) -> str:
    if error.errno == errno.EAGAIN:
        return f"pid file {path} is held by a running server: stop that one, or choose another --pidfile"
    if error.errno == errno.ELOOP:
        return f"pid file {path} is a symbolic link, which is not followed: name the file itself"
    return f"cannot write pid file {path}: {error.strerror}"
