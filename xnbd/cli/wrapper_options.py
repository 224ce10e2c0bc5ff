"""From the command line of xnbd-wrapper to its options; whatever of it makes no sense is refused here."""

from __future__ import annotations

import logging
import shlex
import shutil
from functools import partial
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

from ..errors import ConfigurationError
from ..server.configuration import Configuration
from ..system.process import whole_path
from .limits import OF_ALL, OF_PROXIES, load_limits
from .options import (
    ListenOptions,
    LogOptions,
    listen_options,
    log_options,
    whole_paths,
)
from .values import USAGE_ERROR, CommandLine, refuse_same_file

_PATHS = ("--dbpath", "--socket", "--logpath", "--limits")
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

    @property
    def own_files(self) -> Dict[str, str]:
        """The wrapper's own files, by the names of their options."""
        files = {"--dbpath": self.database_path, "--socket": self.control_path}
        return {**files, "--logpath": self.log.path} if self.log.path else files


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
        listen=listen_options(line),
        cow=line.has("--cow"),
        readonly=line.has("--readonly"),
        daemonize=line.has("--daemonize"),
    )


def _load(line: CommandLine, limits_path: Optional[str]) -> Tuple[Configuration, AsGiven]:
    line, configuration = load_limits(line, limits_path, (*OF_ALL, *OF_PROXIES))
    given = AsGiven(line.text("--max-queue-size"), line.text("--max-buf-size"), line.text("--file-mode"))
    return configuration, given


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
