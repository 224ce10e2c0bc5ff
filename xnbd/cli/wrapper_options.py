"""From the command line of xnbd-wrapper to its options; whatever of it makes no sense is refused here."""

from __future__ import annotations

import logging
import shlex
import shutil
from functools import partial
from typing import TYPE_CHECKING, Callable, Dict, List, NamedTuple, Optional, Tuple

from ..errors import ConfigurationError
from ..server.configuration import Configuration
from ..system.process import whole_path
from .limits import OF_ALL, OF_PROXIES, OF_RATES, load_limits
from .options import (
    Begin,
    ListenOptions,
    LogOptions,
    MetricsOptions,
    TlsOptions,
    cache_limit,
    listen_options,
    log_options,
    metrics_options,
    tls_options,
    user_option,
    whole_paths,
)
from .rate_options import RATES
from .values import USAGE_ERROR, CommandLine, refuse_same_file

if TYPE_CHECKING:
    from ..system.user import User

_PATHS = ("--dbpath", "--socket", "--unix", "--logpath", "--limits", "--tls", "--tls-authz")
_OLD_NAMES = {"--port": "--lport", "--xnbd-binary": "--xnbd-server"}


class AsGiven(NamedTuple):
    """Text on the wrapper's command line that a server of the user's choice gets as it stands there."""

    max_queue_size: Optional[str] = None
    max_buf_size: Optional[str] = None
    file_mode: Optional[str] = None


class WrapperOptions(NamedTuple):
    """A wrapper. Paths are whole ones; *images* has them by what the command line says.

    *load* reads what may change while the wrapper runs. The commands are words, of which
    there are none for our own programs.
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
    load: Callable[[], Tuple[Configuration, AsGiven]]
    daemonize: bool
    tls: Optional[TlsOptions] = None
    rules_path: Optional[str] = None
    limits_path: Optional[str] = None
    user: Optional[User] = None
    metrics: Optional[MetricsOptions] = None
    cache_limit: Optional[int] = None

    @property
    def own_files(self) -> Dict[str, str]:
        """The wrapper's own files, by the names of their options."""
        files = {
            "--dbpath": self.database_path,
            "--socket": self.control_path,
            "--unix": self.listen.unix_path,
            "--logpath": self.log.path,
            "--tls-authz": self.rules_path,
            "--metrics": self.metrics.unix_path if self.metrics is not None else None,
        }
        return {option: path for option, path in files.items() if path}


def wrapper_options(line: CommandLine, begin: Begin) -> WrapperOptions:
    """What *line* asks for; *begin* is called as by `server_options`. Raises `ConfigurationError`."""
    line.rename(_OLD_NAMES)
    line.refuse_together("--xnbd-server", [*RATES])
    paths = whole_paths(line, _PATHS)
    images = {path: whole_path(path, "--imgfile") for path in line.texts("--imgfile")}
    metrics = metrics_options(line)
    if metrics is not None and metrics.unix_path is not None:
        paths = {**paths, "--metrics": metrics.unix_path}
    refuse_same_file(paths)
    for image in images.values():
        refuse_same_file({f"--imgfile {image}": image, **paths})
    log = log_options(line, paths.get("--logpath"), logging.INFO, unattended=line.has("--daemonize"))
    user = user_option(line)
    begin(log, line.mode("--file-mode") if line.has("--file-mode") else None, user)
    load = partial(_load, line, paths.get("--limits"))
    load()
    return WrapperOptions(
        database_path=paths["--dbpath"],
        control_path=paths["--socket"],
        images=images,
        log=log,
        server_command=_command(line, "--xnbd-server"),
        load=load,
        bgctl_command=_command(line, "--xnbd-bgctl"),
        listen=listen_options(line, paths.get("--unix")),
        cow=line.has("--cow"),
        cache_limit=_cache_limit(line),
        readonly=line.has("--readonly"),
        daemonize=line.has("--daemonize"),
        rules_path=paths.get("--tls-authz"),
        limits_path=paths.get("--limits"),
        user=user,
        tls=_tls(line, paths.get("--tls")),
        metrics=metrics,
    )


def _load(line: CommandLine, limits_path: Optional[str]) -> Tuple[Configuration, AsGiven]:
    rates = () if line.has("--xnbd-server") else OF_RATES
    line, configuration = load_limits(line, limits_path, (*OF_ALL, *OF_PROXIES, *rates))
    given = AsGiven(line.text("--max-queue-size"), line.text("--max-buf-size"), line.text("--file-mode"))
    return configuration, given


def _cache_limit(line: CommandLine) -> Optional[int]:
    if line.has("--cache-limit") and line.has("--xnbd-server"):
        raise ConfigurationError(
            "--cache-limit and --xnbd-server do not go together: make it a part of that command", USAGE_ERROR
        )
    return cache_limit(line)


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
    name = words[0] if words else ""
    found = shutil.which(whole_path(name, option) if "/" in name else name)
    if found is None:
        raise ConfigurationError(f"{option} {text}: there is no such program")
    return [whole_path(found, option), *words[1:]]
