"""Listening sockets: TCP addresses, Unix sockets, and those that systemd hands over."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from ..errors import ConfigurationError
from ..making import give_socket
from .kept import Kept

if TYPE_CHECKING:
    import psutil

DEFAULT_PORT = 8520
_BACKLOG = 4096
_FIRST_PASSED_FD = 3
_ANY_PORT_TRIES = 20
_STARTING_TIME = 5.0
_LEAVING_TIME = 1.0


class Listeners:
    """The non-blocking sockets that a server listens on, and the files that have to be removed with them."""

    def __init__(self, port_option: str = "--lport", address_option: str = "--laddr") -> None:
        """The options are those by which the operator can choose other places."""
        self._advice = (port_option, address_option)
        self.sockets: List[socket.socket] = []
        self._unix_sockets: List[UnixSocket] = []

    def __str__(self) -> str:
        return ", ".join(map(describe, self.sockets))

    def add(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sockets.append(sock)

    def listen_tcp(self, addresses: Sequence[str], port: int) -> None:
        """Listen on *addresses*, or on all of IPv4 and IPv6 if there are none; port 0 picks a free one.

        Raises `ConfigurationError`.
        """
        for sock in _bind_all(addresses or [""], port, self._advice):
            host, number = sock.getsockname()[:2]
            try:
                sock.listen(_BACKLOG)
            except OSError as error:
                raise ConfigurationError(_bind_trouble(host, number, error, self._advice)) from error
            self.add(sock)

    def listen_unix(self, path: str, mode: Optional[int] = None) -> None:
        """Listen on a Unix socket at *path*, with *mode*; one that a dead server has left is replaced.

        Raises `ConfigurationError` if something else is there, or a live server.
        """
        listener = UnixSocket(path, _BACKLOG, mode)
        self._unix_sockets.append(listener)
        self.add(listener.socket)

    def take_passed(self) -> None:
        """Take over the sockets that a service manager passes (``sd_listen_fds(3)``), if it does.

        Raises `ConfigurationError` if one of them is no listening stream socket.
        """
        pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
        os.environ.pop("LISTEN_FDNAMES", None)
        if pid != str(os.getpid()) or not count.isdigit():
            return
        for fd in range(_FIRST_PASSED_FD, _FIRST_PASSED_FD + int(count)):
            try:
                sock = socket.socket(fileno=fd)
                listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            except OSError as error:
                raise ConfigurationError(f"passed descriptor {fd} is no socket: {error.strerror}") from error
            if not listening:
                raise ConfigurationError(f"passed socket {fd} does not listen: use --inetd with Accept=yes")
            os.set_inheritable(fd, False)
            self.add(sock)

    def pack(self, kept: Kept) -> Dict[str, Any]:
        """For the next program of this process."""
        named = {listener.socket.fileno(): listener for listener in self._unix_sockets}
        return {
            "unix": [listener.pack(kept) for listener in self._unix_sockets],
            "others": [kept(sock.fileno()) for sock in self.sockets if sock.fileno() not in named],
        }

    def unpack(self, packed: Mapping[str, Any]) -> None:
        """Listen where the program before did."""
        for fd in packed["others"]:
            self.add(socket.socket(fileno=fd))
        self._unix_sockets = [UnixSocket.unpack(listener) for listener in packed["unix"]]
        for listener in self._unix_sockets:
            self.add(listener.socket)

    def close(self) -> None:
        """Listen no more."""
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()
        self.tidy_up()

    def tidy_up(self) -> None:
        """Close all; remove the Unix sockets, in the process that made them."""
        for sock in self.sockets:
            sock.close()
        for listener in self._unix_sockets:
            listener.remove()


class UnixSocket:
    """A listening Unix socket and its file, which belongs to the process that made it."""

    def __init__(self, path: str, backlog: int, mode: Optional[int] = None) -> None:
        """Listen at *path*, whose file has *mode* from the first moment, less the umask.

        Raises `ConfigurationError` if a live server or something else is there.
        """
        self._path = path
        self._owner = os.getpid()
        with _neighbours_waiting(path, _STARTING_TIME):
            _clear_stale(path)
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                if mode is not None:
                    os.fchmod(self.socket.fileno(), mode)  # Linux: bind makes the file with the socket's own mode
                self.socket.bind(path)
                give_socket(path)
                made = os.lstat(path)
                self._made = made.st_dev, made.st_ino
                self.socket.listen(backlog)
            except OSError as error:
                self.socket.close()
                raise ConfigurationError(_unix_trouble(path, error)) from error

    def pack(self, kept: Kept) -> Dict[str, Any]:
        """For the next program of this process."""
        return {"path": self._path, "fd": kept(self.socket.fileno()), "made": self._made}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> UnixSocket:
        """What listens already, under the program before."""
        listener = cls.__new__(cls)
        listener._path, listener._owner = packed["path"], os.getpid()
        device, inode = packed["made"]
        listener._made = device, inode
        listener.socket = socket.socket(fileno=packed["fd"])
        return listener

    def close(self) -> None:
        """Listen no more, and remove the file; in a forked process only close the descriptor."""
        self.socket.close()
        self.remove()

    def remove(self) -> None:
        """Remove the file, in the process that made it, unless a successor's is there by now, and only once.

        A successor's may have the same inode number. The file stays if this process has not the right to
        remove it: it has given root's rights up.
        """
        if os.getpid() != self._owner:
            return
        self._owner = 0
        with _neighbours_waiting(self._path, _LEAVING_TIME), suppress(FileNotFoundError, PermissionError):
            found = os.lstat(self._path)
            if (found.st_dev, found.st_ino) == self._made:
                os.unlink(self._path)


def describe(sock: socket.socket) -> str:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    host, port = name[:2]
    return f"[{host}]:{port}" if sock.family == socket.AF_INET6 else f"{host}:{port}"


Place = Tuple[int, str, int]
"""Where to bind: family, numeric host, and the zone of an IPv6 address."""

_EVERYWHERE: Dict[int, str] = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


class _NotHere(ConfigurationError):
    """An address to listen on is not one of this computer's."""


Advice = Tuple[str, str]
"""The options that name a port and an address."""


def _bind_all(addresses: Sequence[str], port: int, advice: Advice) -> List[socket.socket]:
    """Bind to every address, once; a port picked for the first one may be taken at the next: then once more."""
    resolved = [_places(address) for address in dict.fromkeys(addresses)]
    everywhere = {family for places in resolved for family, host, _ in places if _EVERYWHERE[family] == host}
    for attempt in range(_ANY_PORT_TRIES):
        bound: Dict[Place, socket.socket] = {}
        try:
            chosen = port
            for places in resolved:
                chosen = _bind_some(_widened(places, everywhere), chosen, bound, advice)
            return list(bound.values())
        except ConfigurationError:
            for sock in bound.values():
                sock.close()
            if port or attempt == _ANY_PORT_TRIES - 1:
                raise
    raise AssertionError("unreachable")


def _widened(places: List[Place], families: Set[int]) -> List[Place]:
    """*places*, those in *families* being part of everywhere."""
    return [(place[0], _EVERYWHERE[place[0]], 0) if place[0] in families else place for place in places]


def _bind_some(places: List[Place], port: int, bound: Dict[Place, socket.socket], advice: Advice) -> int:
    """Add to *bound* what this computer has of *places*, which one address or name stands for; the port.

    /etc/hosts may have ``::1`` for localhost where IPv6 is off. Raises `ConfigurationError` if nothing is here.
    """
    missing: Optional[_NotHere] = None
    for place in places:
        try:
            if place not in bound:
                bound[place] = _bind(place, port, advice)
                port = port or bound[place].getsockname()[1]
        except _NotHere as error:
            missing = error
    if missing is not None and not any(place in bound for place in places):
        raise missing
    return port


def _places(address: str) -> List[Place]:
    """What *address*, in [] perhaps, stands for; the empty one is every address, IPv4 first."""
    name = address[1:-1] if address.startswith("[") and address.endswith("]") else address
    try:
        found = socket.getaddrinfo(name or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"cannot listen on address {address!r}: {reason}") from error
    places = [(family, str(rest[0]), int(rest[-1]) if len(rest) == 4 else 0) for family, _, _, _, rest in found]
    return sorted(set(places), key=lambda place: place[0] == socket.AF_INET6)


def _bind(place: Place, port: int, advice: Advice) -> socket.socket:
    """A socket bound to *port* at *place*. Raises `ConfigurationError`."""
    family, host, zone = place
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            raise _NotHere(_bind_trouble(host, port, error, advice)) from error
        raise ConfigurationError(f"cannot listen on {host}: {error.strerror}") from error
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        sock.bind((host, port, 0, zone) if family == socket.AF_INET6 else (host, port))
    except OSError as error:
        sock.close()
        kind = _NotHere if error.errno == errno.EADDRNOTAVAIL else ConfigurationError
        raise kind(_bind_trouble(host, port, error, advice)) from error
    return sock


def _bind_trouble(host: str, port: int, error: OSError, advice: Advice) -> str:
    port_option, address_option = advice
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use{_holder_of(port)}: stop that program, or choose another {port_option}"
    if error.errno == errno.EACCES:
        return f"port {port} is reserved for root: choose {port_option} of 1024 or more"
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return f"{host} is no address of this computer: choose another {address_option}"
    return f"cannot listen on {host} port {port}: {error.strerror}"


def _holder_of(port: int) -> str:
    """Who listens on *port*, as far as this user may know."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr
            if listens and (port,) == connection.laddr[1:2] and connection.pid:
                holder = _master_of(psutil.Process(connection.pid))
                return f" by {holder.name()} (process {holder.pid})"
    except (psutil.Error, OSError):
        pass  # it is only a detail of a message
    return ""


def _master_of(worker: psutil.Process) -> psutil.Process:
    """The first of *worker*'s ancestors that is of the same program: to stop that one helps."""
    program = worker.name().partition(":")[0]
    parent = worker.parent()
    if parent is None or parent.name().partition(":")[0] != program:
        return worker
    return _master_of(parent)


@contextmanager
def _neighbours_waiting(path: str, seconds: float) -> Iterator[None]:
    """Keep servers that start or end at the same time apart: one would take for stale what another has just bound.

    Anybody can hold the lock of the directory of *path* for ever, so it is only waited for so long.
    """
    fd = -1
    try:
        fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _lock(fd, time.monotonic() + seconds)
    except OSError:
        pass  # no such directory, which bind complains about, or no locks there
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _lock(fd: int, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return None
        time.sleep(0.01)


def _clear_stale(path: str) -> None:
    """Remove the Unix socket of a dead server; whatever else is at *path* stays, with an error."""
    try:
        mode = os.lstat(path).st_mode
        if not stat.S_ISSOCK(mode):
            raise ConfigurationError(f"{path} exists and is no socket: remove it, or choose another path")
        if _nobody_listens(path):
            os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigurationError(_unix_trouble(path, error)) from error


def _unix_trouble(path: str, error: OSError) -> str:
    if error.errno is None:  # Python's own check of what fits into sockaddr_un
        return f"cannot listen on {path}: path too long, a Unix socket's has at most 107 bytes"
    return f"cannot listen on {path}: {error.strerror}"


def _nobody_listens(path: str) -> bool:
    """Whether the socket at *path* is left over. Raises `ConfigurationError` if a server listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except PermissionError:
            raise ConfigurationError(f"{path} is another user's socket: choose another path") from None
        except OSError:
            pass  # it exists and somebody listens
    raise ConfigurationError(f"a running server listens on {path}: stop it, or choose another path")
