"""From the command line of xnbd-server to its options; whatever of it makes no sense is refused here."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Dict, Mapping, Optional, Union

from ..errors import ConfigurationError
from ..protocol.constants import MAXIMUM_STRING
from ..protocol.server_handshake import CONTEXTS, Agreement, feature_of
from ..server.configuration import Configuration, Load
from ..server.session.connection import LONGEST_SPIN
from .limits import OF_ALL, OF_MASTERS, OF_PROXIES, OF_RATES, load_limits
from .options import (
    Begin,
    CowOptions,
    LogOptions,
    ManyClients,
    OneClient,
    ServerOptions,
    TargetOptions,
    listen_options,
    log_options,
    metrics_options,
    tls_options,
    user_option,
    whole_paths,
)
from .values import USAGE_ERROR, CommandLine, refuse_same_file

if TYPE_CHECKING:
    from .proxy_options import ProxyOptions

_FILES = ("DISK_IMAGE", "BASE_DISK_IMAGE", "CACHE_DISK_IMAGE", "CACHE_BITMAP_IMAGE", "CONTROL_SOCKET_PATH")
_PATHS = (*_FILES, "--cow-dir", "--control", "--unix", "--pidfile", "--logpath", "--limits", "--tls", "--tls-authz")
_PROXY_OPTIONS = (
    "--target-exportname",
    "--clear-bitmap",
    "--adopt-cache",
    "--max-queue-size",
    "--max-buf-size",
    "--readahead",
    "--fetch-size",
    "--verify",
    "--cache-limit",
    "--connect-timeout",
    "--origin-timeout",
)
_LISTENING = ("--lport", "--laddr", "--unix")
_CONTEXT_FEATURES = {feature_of(context): context for context in CONTEXTS}
_FEATURES = ("newstyle", "structured", *_CONTEXT_FEATURES)


def server_options(line: CommandLine, begin: Begin) -> ServerOptions:
    """What *line* asks for. Raises `ConfigurationError`.

    *begin* is called once it is clear which files the server may touch, and before
    values are looked at: the line that says what is wrong with one is in the log too.
    """
    _refuse_clashes(line)
    paths = whole_paths(line, _PATHS)
    metrics = metrics_options(line)
    unix = {} if metrics is None or metrics.unix_path is None else {"--metrics": metrics.unix_path}
    refuse_shared_files({**paths, **unix})
    log = _log_options(line, paths.get("--logpath"))
    user = user_option(line)
    begin(log, line.mode("--file-mode") if line.has("--file-mode") else None, user)
    load = partial(_load, line, paths.get("--limits"))
    configuration = load()
    clients = _clients(line, paths, load)
    return ServerOptions(
        clients=clients,
        configuration=configuration,
        spin=min(line.integer("--spin", 0, 1_000_000) / 1e6, LONGEST_SPIN),
        disk=_disk(line, paths),
        export_name=_export_name(line),
        oldstyle=line.has("--oldstyle"),
        control_path=paths.get("CONTROL_SOCKET_PATH", paths.get("--control")),
        log=log,
        rules_path=paths.get("--tls-authz"),
        limits_path=paths.get("--limits"),
        user=user,
        tls=tls_options(line, paths.get("--tls")),
        metrics=metrics,
    )


def _refuse_clashes(line: CommandLine) -> None:
    line.refuse_together("--inetd", ["--connected-fd", "--daemonize", "--pidfile", "--metrics", *_LISTENING])
    line.refuse_together("--connected-fd", ["--daemonize", "--pidfile", "--metrics", *_LISTENING])
    line.refuse_together("--verbose", ["--quiet"])
    line.refuse_together("--clear-bitmap", ["--adopt-cache"])
    line.refuse_together("--control", ["--proxy", "--inetd", "--connected-fd"])
    if line.has("--tls-authz") and line.has("--connected-fd") and not line.has("--tls"):
        raise ConfigurationError(
            "--tls-authz is for who negotiates with the client: give it to the wrapper, not with --connected-fd",
            USAGE_ERROR,
        )
    line.refuse_together("--tls", ["--oldstyle", "--negotiated"])
    for option, other in (("--negotiated", "--connected-fd"), ("--cow-dir", "--cow-target")):
        _refuse_without(line, option, other)
    for option in _PROXY_OPTIONS:
        _refuse_without(line, option, "--proxy")
    if line.has("--proxy") and line.has("--create"):
        raise ConfigurationError("--create is not for --proxy: the cache is made as large as the disk", USAGE_ERROR)


def _refuse_without(line: CommandLine, option: str, other: str) -> None:
    if line.has(option) and not line.has(other):
        raise ConfigurationError(f"{option} is for {other} only", USAGE_ERROR)


def refuse_shared_files(paths: Mapping[str, str]) -> None:
    """Raises `ConfigurationError` if one file of a server, by the names of its command line, is another one too."""
    refuse_same_file({**paths, **_files_beside(paths.get("CACHE_BITMAP_IMAGE"))})


def _files_beside(bitmap_path: Optional[str]) -> Dict[str, str]:
    """What is made beside a proxy's bitmap."""
    if bitmap_path is None:
        return {}
    from ..proxy.state.format import CHECKED_SUFFIX, SCOREBOARD_SUFFIX, SUFFIX, SUMS_SUFFIX, USE_MAP_SUFFIX

    suffixes = (SUFFIX, SCOREBOARD_SUFFIX, SUMS_SUFFIX, CHECKED_SUFFIX, USE_MAP_SUFFIX)
    return {f"CACHE_BITMAP_IMAGE{suffix}": bitmap_path + suffix for suffix in suffixes}


def _log_options(line: CommandLine, path: Optional[str]) -> LogOptions:
    level = logging.DEBUG if line.has("--verbose") else logging.WARNING if line.has("--quiet") else logging.INFO
    return log_options(line, path, level, unattended=line.has("--daemonize") or line.has("--inetd"))


def _load(line: CommandLine, limits_path: Optional[str]) -> Configuration:
    """What may change while the server runs."""
    many = not (line.has("--inetd") or line.has("--connected-fd"))
    names = (*OF_ALL, *OF_MASTERS, *(OF_PROXIES if line.has("--proxy") else ()), *OF_RATES)
    return load_limits(line, limits_path, names, many=many)[1]


def _clients(line: CommandLine, paths: Mapping[str, str], load: Load) -> Union[OneClient, ManyClients]:
    if line.has("--inetd"):
        return OneClient()
    if line.has("--connected-fd"):
        agreement = None if line.has("--tls") else _agreement(line.text("--negotiated") or "")
        return OneClient(line.integer("--connected-fd", 0, 1 << 20), agreement)
    listen = listen_options(line, paths.get("--unix"))
    return ManyClients(listen, load, line.has("--daemonize"), paths.get("--pidfile"))


def _agreement(features: str) -> Agreement:
    """What ``--negotiated FEATURES`` says."""
    words = set(features.split(",")) if features else set()
    if not words <= set(_FEATURES):
        raise ConfigurationError(f"--negotiated {features}: expected some of {', '.join(_FEATURES)}", USAGE_ERROR)
    contexts = tuple(context for feature, context in _CONTEXT_FEATURES.items() if feature in words)
    if contexts and "structured" not in words:
        raise ConfigurationError(f"--negotiated: {feature_of(contexts[0])} comes with structured only", USAGE_ERROR)
    return Agreement(structured="structured" in words, contexts=contexts, ordered=not words)


def _disk(line: CommandLine, paths: Mapping[str, str]) -> Union[TargetOptions, CowOptions, ProxyOptions]:
    if line.has("--proxy"):
        from .proxy_options import proxy_options

        return proxy_options(line, paths)
    readonly, create = line.has("--readonly"), line.size("--create") if line.has("--create") else None
    if line.has("--cow-target"):
        return CowOptions(paths["BASE_DISK_IMAGE"], readonly, create, paths.get("--cow-dir"))
    return TargetOptions(paths["DISK_IMAGE"], readonly, create)


def _export_name(line: CommandLine) -> Optional[str]:
    name = line.text("--exportname")
    if name is not None and len(os.fsencode(name)) > MAXIMUM_STRING:
        raise ConfigurationError(f"--exportname: clients cannot ask for more than {MAXIMUM_STRING} bytes", USAGE_ERROR)
    return name
