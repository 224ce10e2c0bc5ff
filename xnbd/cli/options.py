"""What the command line of xnbd-server asks for: checked, with types, and never changed.

These are named tuples and no dataclasses: with ``dataclasses`` comes ``inspect``, and both
together take 5 ms to import. A client of ``--inetd`` waits for that.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, Mapping, NamedTuple, Optional, Sequence, Union

from ..errors import ConfigurationError
from ..protocol.server_handshake import Agreement
from ..server.configuration import Configuration, Load
from ..system.process import whole_path
from .values import USAGE_ERROR, CommandLine

if TYPE_CHECKING:
    from ..server.handover.letters import Letter
    from ..server.process_loop import ProcessLoop
    from ..server.session.connection import Connection
    from ..server.single import Passage
    from ..system.user import User
    from .proxy_options import ProxyOptions


LOOPBACK = "127.0.0.1"

_LEAST_LIMIT = 1 << 20
"""Bytes."""

_LONGEST_SLOW = 86_400_000
"""Milliseconds."""


class LogOptions(NamedTuple):
    """Where log lines go, and which of them: those of at least *level*. Without *path* and *syslog*: standard error.

    *slow* is the time in seconds from which on requests are told of.
    """

    path: Optional[str] = None
    syslog: bool = False
    level: int = logging.INFO
    as_json: bool = False
    slow: Optional[float] = None


Begin = Callable[[LogOptions, Optional[int], "Optional[User]"], None]
"""Is told where the log goes, which permissions new files get, and to whom they belong if not to who makes them."""


class ListenOptions(NamedTuple):
    """Where clients connect; with nothing of it on the default port of all addresses."""

    port: Optional[int] = None
    addresses: Sequence[str] = ()
    unix_path: Optional[str] = None


class MetricsOptions(NamedTuple):
    """Where metrics are asked for: a TCP *address* and *port*, or a Unix socket at *unix_path*."""

    address: str = ""
    port: int = 0
    unix_path: Optional[str] = None


class TlsOptions(NamedTuple):
    """TLS by the credentials in *directory*; *ciphers* of TLS 1.2 in OpenSSL's notation."""

    directory: str
    required: bool = True
    anonymous: bool = False
    ciphers: Optional[str] = None


class TargetOptions(NamedTuple):
    """The image at *path*, made with *create* bytes if it is not there."""

    path: str
    readonly: bool = False
    create: Optional[int] = None


class CowOptions(NamedTuple):
    """The base at *path*, made like a target; what clients write goes to *directory*, or where there is room."""

    path: str
    readonly: bool = False
    create: Optional[int] = None
    directory: Optional[str] = None


class OneClient(NamedTuple):
    """A client that is connected: on the descriptor *fd*, or on standard input.

    With an *agreement* somebody else has negotiated with it.
    """

    fd: Optional[int] = None
    agreement: Optional[Agreement] = None


class Introduced(NamedTuple):
    """A client at the other end of *connection*, which this process has; *agreement* as in `OneClient`.

    By the *passage* it may go to another process.
    """

    connection: Connection
    agreement: Optional[Agreement]
    passage: Optional[Passage] = None


class Expected(NamedTuple):
    """A client that another process has, and makes an *offer* of to this one, which sleeps in *loop*.

    The *kit* has the disk. By the *passage* the client may go on to a third process.
    """

    offer: Letter
    kit: Mapping[str, Any]
    loop: ProcessLoop
    passage: Passage


class ManyClients(NamedTuple):
    """Clients that connect, each of which gets a process; *load* reads again what may change meanwhile."""

    listen: ListenOptions
    load: Load
    daemonize: bool = False
    pid_path: Optional[str] = None


class ServerOptions(NamedTuple):
    """A server of one disk. Paths are whole ones, times in seconds."""

    disk: Union[TargetOptions, CowOptions, ProxyOptions]
    clients: Union[OneClient, Introduced, Expected, ManyClients]
    log: LogOptions = LogOptions()
    export_name: Optional[str] = None
    oldstyle: bool = False
    configuration: Configuration = Configuration()
    spin: float = 150e-6
    control_path: Optional[str] = None
    rules_path: Optional[str] = None
    limits_path: Optional[str] = None
    user: Optional[User] = None
    tls: Optional[TlsOptions] = None
    metrics: Optional[MetricsOptions] = None
    tally_fds: Sequence[int] = ()
    rates_fd: Optional[int] = None


def whole_paths(line: CommandLine, names: Iterable[str]) -> Dict[str, str]:
    """The paths of those that are given, by their *names*. Raises `ConfigurationError`."""
    return {name: whole_path(line.needed(name), name) for name in names if line.has(name)}


def log_options(line: CommandLine, path: Optional[str], level: int, *, unattended: bool) -> LogOptions:
    """Raises `ConfigurationError` if the log is to go where a daemon has nothing any more."""
    if path in ("/dev/stdout", "/dev/stderr") and line.has("--daemonize"):
        raise ConfigurationError(f"--daemonize lets go of {path}: name a file for --logpath", USAGE_ERROR)
    form = line.text("--log-format")
    if form not in (None, "text", "json"):
        raise ConfigurationError(f"--log-format {form}: expected text or json", USAGE_ERROR)
    slow = line.integer("--slow-log", 1, _LONGEST_SLOW) / 1e3 if line.has("--slow-log") else None
    return LogOptions(path, line.has("--syslog") or (unattended and not path), level, form == "json", slow)


def user_option(line: CommandLine) -> Optional[User]:
    """Raises `ConfigurationError`."""
    if not line.has("--user"):
        return None
    from ..system.user import find_user

    return find_user(line.needed("--user"))


def listen_options(line: CommandLine, unix_path: Optional[str] = None) -> ListenOptions:
    """Raises `ConfigurationError`."""
    port = line.integer("--lport", 0, 65535) if line.has("--lport") else None
    return ListenOptions(port, line.texts("--laddr"), unix_path)


def metrics_options(line: CommandLine) -> Optional[MetricsOptions]:
    """Raises `ConfigurationError`."""
    if not line.has("--metrics"):
        return None
    text = line.needed("--metrics")
    if "/" in text:
        return MetricsOptions(unix_path=whole_path(text, "--metrics"))
    address, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16) or (not address and ":" in text):
        raise ConfigurationError(
            f"--metrics {text}: expected a port, an address and a port as 0.0.0.0:9555, or a path with a slash in it",
            USAGE_ERROR,
        )
    return MetricsOptions(address or LOOPBACK, int(port))


def tls_options(line: CommandLine, directory: Optional[str]) -> Optional[TlsOptions]:
    """What *line* asks for besides the whole path of the *directory*. Raises `ConfigurationError`."""
    for option in ("--tls-optional", "--tls-anonymous", "--tls-ciphers"):
        if line.has(option) and directory is None:
            raise ConfigurationError(f"{option} is for --tls only", USAGE_ERROR)
    if directory is None:
        return None
    required, anonymous = not line.has("--tls-optional"), line.has("--tls-anonymous")
    return TlsOptions(directory, required, anonymous, line.text("--tls-ciphers"))


def cache_limit(line: CommandLine) -> Optional[int]:
    """Bytes of what was fetched that a cache may keep, if there is a limit. Raises `ConfigurationError`."""
    if not line.has("--cache-limit"):
        return None
    limit = line.size_or_zero("--cache-limit")
    if limit < _LEAST_LIMIT:
        raise ConfigurationError("--cache-limit: at least 1M is needed", USAGE_ERROR)
    return limit
