"""From the command line of xnbd-wrapper to its options; whatever of it makes no sense is refused here."""

from __future__ import annotations

import logging
import shlex
import shutil
from typing import Callable, Dict, List, NamedTuple, Optional

from ..errors import ConfigurationError
from ..server.session.parking import QueueLimits
from ..system.process import whole_path
from .options import (
    ListenOptions,
    LogOptions,
    TlsOptions,
    listen_options,
    log_options,
    queue_limits,
    tls_options,
    whole_paths,
)
from .values import USAGE_ERROR, CommandLine, refuse_same_file

_PATHS = ("--dbpath", "--socket", "--unix", "--logpath", "--tls", "--tls-authz")
_OLD_NAMES = {"--port": "--lport", "--xnbd-binary": "--xnbd-server"}


class AsGiven(NamedTuple):
    """Text on the wrapper's command line that a server of the user's choice gets as it stands there."""

    max_queue_size: Optional[str] = None
    max_buf_size: Optional[str] = None
    file_mode: Optional[str] = None


class WrapperOptions(NamedTuple):
    """A wrapper. Paths are whole ones, times in seconds; *images* has them by what the command line says.

    The commands are words, of which there are none for our own programs.
    """

    database_path: str
    control_path: str
    images: Dict[str, str]
    listen: ListenOptions
    log: LogOptions
    server_command: List[str]
    bgctl_command: List[str]
    cow: bool
    readonly: bool
    queue_limits: QueueLimits
    as_given: AsGiven
    handshake_timeout: float
    max_clients: int
    daemonize: bool
    tls: Optional[TlsOptions] = None
    rules_path: Optional[str] = None

    @property
    def own_files(self) -> Dict[str, str]:
        """The wrapper's own files, by the names of their options."""
        files = {
            "--dbpath": self.database_path,
            "--socket": self.control_path,
            "--unix": self.listen.unix_path,
            "--logpath": self.log.path,
            "--tls-authz": self.rules_path,
        }
        return {option: path for option, path in files.items() if path}


def wrapper_options(line: CommandLine, begin: Callable[[LogOptions, Optional[int]], None]) -> WrapperOptions:
    """What *line* asks for; *begin* is called as by `server_options`. Raises `ConfigurationError`."""
    line.rename(_OLD_NAMES)
    paths = whole_paths(line, _PATHS)
    images = {path: whole_path(path, "--imgfile") for path in line.texts("--imgfile")}
    refuse_same_file(paths)
    for image in images.values():
        refuse_same_file({f"--imgfile {image}": image, **paths})
    log = log_options(line, paths.get("--logpath"), logging.INFO, unattended=line.has("--daemonize"))
    begin(log, line.mode("--file-mode") if line.has("--file-mode") else None)
    return WrapperOptions(
        database_path=paths["--dbpath"],
        control_path=paths["--socket"],
        images=images,
        log=log,
        server_command=_command(line, "--xnbd-server"),
        queue_limits=queue_limits(line),
        as_given=AsGiven(line.text("--max-queue-size"), line.text("--max-buf-size"), line.text("--file-mode")),
        bgctl_command=_command(line, "--xnbd-bgctl"),
        handshake_timeout=line.seconds("--handshake-timeout"),
        max_clients=line.integer("--max-clients", 1, 1_000_000),
        listen=listen_options(line, paths.get("--unix")),
        cow=line.has("--cow"),
        readonly=line.has("--readonly"),
        daemonize=line.has("--daemonize"),
        rules_path=paths.get("--tls-authz"),
        tls=_tls(line, paths.get("--tls")),
    )


def _tls(line: CommandLine, directory: Optional[str]) -> Optional[TlsOptions]:
    if directory is not None and line.has("--xnbd-server"):
        raise ConfigurationError(
            "--tls and --xnbd-server do not go together: another program cannot go on with a client's TLS", USAGE_ERROR
        )
    return tls_options(line, directory)


def _command(line: CommandLine, option: str) -> List[str]:
    """The words of a command; the program gets its full path, because the wrapper may change its directory."""
    text = line.text(option)
    if text is None:
        return []
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigurationError(f"{option} {text}: {error}", USAGE_ERROR) from error
    found = shutil.which(words[0]) if words else None
    if found is None:
        raise ConfigurationError(f"{option} {text}: there is no such program")
    return [whole_path(found, option), *words[1:]]
