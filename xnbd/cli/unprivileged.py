"""Giving root's rights up (``--user``), and what could not be done without them later.

What is opened at the start stays open. What is opened by its name later is tried out before the rights are gone, in a
process that has given them up already. What a server cannot do without is a reason not to start; the rest is told.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from ..errors import ConfigurationError
from ..logs import log
from ..system.user import Finding, User, ask_as, become, blocked_path
from ..wrapper.exports import ProxyExport, StoredExport
from .options import CowOptions, LogOptions, ManyClients, ServerOptions, TargetOptions, TlsOptions

if TYPE_CHECKING:
    from .proxy_options import ProxyOptions
    from .wrapper_options import WrapperOptions

READ, WRITE, RUN = os.R_OK, os.W_OK, os.X_OK
MAKE_FILES = os.W_OK | os.X_OK
"""In a directory."""

_VERBS = {READ: "read", WRITE: "write to", READ | WRITE: "write to", RUN: "run", MAKE_FILES: "make or remove files in"}


_MOST_LINES = 20
_SOCKET_STAYS = "the socket stays there at the end"


class Need(NamedTuple):
    """What is done with *path* later; the *consequence* if the user has not the *rights* to, which may be *vital*."""

    path: str
    rights: int
    consequence: str
    vital: bool = False


def needs_of_server(options: ServerOptions) -> List[Need]:
    """What a server does by name when its disk is open; one that serves a single client is not asked for as much."""
    clients = options.clients
    if not isinstance(clients, ManyClients):
        return []
    return [
        *_of_disk(options.disk),
        *of_reload(options.rules_path, options.limits_path, options.log, options.tls),
        *directory_of(clients.pid_path, "the pid file is emptied at the end, and not removed"),
        *directory_of(clients.listen.unix_path, _SOCKET_STAYS),
        *directory_of(options.metrics and options.metrics.unix_path, _SOCKET_STAYS),
        *directory_of(options.control_path, _SOCKET_STAYS),
    ]


def needs_of_wrapper(options: WrapperOptions, exports: Mapping[str, StoredExport]) -> List[Need]:
    """What a wrapper and the servers of its clients do by name."""
    programs = [command[0] for command in (options.server_command, options.bgctl_command) if command]
    return [
        *(Need(path, RUN, "no client could be served", vital=True) for path in programs),
        *directory_of(options.database_path, "the exports could not be changed", vital=True),
        *of_reload(options.rules_path, options.limits_path, options.log, options.tls),
        *directory_of(options.control_path, _SOCKET_STAYS),
        *directory_of(options.listen.unix_path, _SOCKET_STAYS),
        *directory_of(options.metrics and options.metrics.unix_path, _SOCKET_STAYS),
        *(need for name, export in exports.items() for need in _of_export(name, export, options)),
    ]


def _of_export(name: str, export: StoredExport, options: WrapperOptions) -> Iterator[Need]:
    consequence = f"the export {name!r} is not served"
    if not isinstance(export, ProxyExport):
        yield Need(export.image_path, READ if options.readonly or options.cow else READ | WRITE, consequence)
        return
    for path in (export.image_path, export.bitmap_path):
        yield Need(path, READ | WRITE, consequence) if os.path.exists(path) else directory_of(path, consequence)[0]
    yield from directory_of(export.control_socket_path, f"the export {name!r} is not steered")
    for path, rights in export.origin.local_files.items():
        yield Need(path, rights, f"no block is fetched for the export {name!r}")


def _of_disk(disk: Union[TargetOptions, CowOptions, ProxyOptions]) -> List[Need]:
    if isinstance(disk, (TargetOptions, CowOptions)):
        return directory_of(disk.path, "there are no snapshots")
    origin = [Need(path, rights, "no block is fetched") for path, rights in disk.origin.local_files.items()]
    return [*origin, *directory_of(disk.cache_path, "there are no snapshots, which a proxy has after --switch")]


def of_reload(
    rules_path: Optional[str], limits_path: Optional[str], log_options: LogOptions, tls: Optional[TlsOptions]
) -> List[Need]:
    """What a reload or an upgrade opens again. The log's file is made anew, besides, whenever it was moved away."""
    consequence = "a reload and an upgrade are refused"
    log_path = None if (log_options.path or "").startswith("/dev/") else log_options.path
    return [
        *(Need(path, READ, consequence) for path in (rules_path, limits_path) if path),
        *(_of_tls(tls.directory, consequence) if tls else []),
        *([Need(log_path, WRITE, consequence)] if log_path else []),
        *directory_of(log_path, "no new log file is made when this one is moved away"),
    ]


def directory_of(path: Optional[str], consequence: str, *, vital: bool = False) -> List[Need]:
    """Files are made or removed in the directory of *path*, if that is given."""
    return [] if path is None else [Need(os.path.dirname(path), MAKE_FILES, consequence, vital)]


def _of_tls(directory: str, consequence: str) -> List[Need]:
    """Those files of TLS that are in *directory* now."""
    from ..tls.credentials import FILES

    paths = [os.path.join(directory, name) for name in FILES]
    return [Need(path, READ, consequence) for path in paths if os.path.lexists(path)]


class Change:
    """From root to *user*, or no change at all if there is none, or this process is that user's already."""

    def __init__(self, user: Optional[User]) -> None:
        self._user = None if user is None or user.is_this_one else user

    def try_out(self, needs: Sequence[Need], work: Callable[[], None]) -> None:
        """Do *work* as the user, in another process, and look for all *needs*; warn of those that are not vital.

        Raises `ConfigurationError` for the first one that is.
        """
        user = self._user
        if user is None:
            return
        findings = ask_as(user, lambda: [*_try(work), *_missing([*_of_program(), *needs])])
        for vital, text in findings:
            if vital:
                raise ConfigurationError(f"--user {user.name}: {text}")
        for _, text in findings[:_MOST_LINES]:
            log.warning("--user %s: %s", user.name, text)
        if len(findings) > _MOST_LINES:
            log.warning("--user %s: and %d more like these", user.name, len(findings) - _MOST_LINES)

    def make(self) -> None:
        """Give the rights up, in this process. Raises `ConfigurationError`."""
        if self._user is not None:
            become(self._user)


def _try(work: Callable[[], None]) -> Iterator[Finding]:
    try:
        work()
    except OSError as error:
        path = blocked_path(error)
        reason = f"that user cannot open {path}" if path else f"the disk cannot be opened: {error}"
        yield True, f"{reason}, which every process does for a new client: chown or chmod it, or say NAME:GROUP"


def _missing(needs: Sequence[Need]) -> Iterator[Finding]:
    """A line for each path."""
    missing: Dict[Tuple[str, int], List[Need]] = {}
    for need in needs:
        if not os.access(need.path, need.rights):
            missing.setdefault((need.path, need.rights), []).append(need)
    for (path, rights), lacking in missing.items():
        consequences = "; ".join(dict.fromkeys(need.consequence for need in lacking))
        yield any(need.vital for need in lacking), f"that user cannot {_VERBS[rights]} {path}: {consequences}"


def _of_program() -> List[Need]:
    """Modules are loaded when they are needed."""
    consequence = "the program is not installed for all users, and would miss its modules"
    return [Need(os.path.realpath(module), READ, consequence, vital=True) for module in (__file__, os.__file__)]
