"""Where clients come in, and who of them may open which disk."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Optional

from ..access.rights import EVERYBODY, Access
from ..errors import ConfigurationError
from ..logs import log
from ..making import file_mode
from ..system.listen import DEFAULT_PORT, Listeners
from .options import ListenOptions, MetricsOptions

if TYPE_CHECKING:
    from ..server.session.handshake import Tls


def open_listeners(options: ListenOptions, listeners: Listeners) -> None:
    """Listen where *options* say, besides what was handed over. Raises `ConfigurationError`."""
    if options.port is not None or options.addresses or not (options.unix_path or listeners.sockets):
        listeners.listen_tcp(options.addresses, DEFAULT_PORT if options.port is None else options.port)
    if options.unix_path:
        listeners.listen_unix(options.unix_path)


def open_metrics(options: Optional[MetricsOptions]) -> Optional[Listeners]:
    """Listen where metrics are to be asked for, if they are. Raises `ConfigurationError`."""
    if options is None:
        return None
    listeners = Listeners("--metrics", "--metrics")
    if options.unix_path is not None:
        listeners.listen_unix(options.unix_path, file_mode())
    else:
        listeners.listen_tcp([options.address], options.port)
    return listeners


def open_access(rules_path: Optional[str]) -> Access:
    """What the rules say now. Raises `ConfigurationError` if there is something wrong with them."""
    if rules_path is None:
        return EVERYBODY
    from ..access.rules import read_rules

    return Access(read_rules(rules_path))


def check_access(access: Access, listeners: Listeners, tls: Optional[Tls]) -> None:
    """Raises `ConfigurationError` if nobody could open anything: on TCP clients prove nothing but by *tls*."""
    rules = access.rules
    if tls is not None and tls.credentials.identify_clients:
        return
    on_tcp = [sock.family != socket.AF_UNIX for sock in listeners.sockets]
    if rules is None or rules.know_anonymous or not any(on_tcp):
        return
    if all(on_tcp):
        raise ConfigurationError(
            f"--tls-authz {rules.path}: clients on TCP prove nothing, so no line is for them: "
            "use --tls with ca-cert.pem or keys.psk, listen on a Unix socket with --unix, or have a line for anonymous"
        )
    log.warning("clients on TCP prove nothing, so no line of %s is for them: they can open nothing", rules.path)
