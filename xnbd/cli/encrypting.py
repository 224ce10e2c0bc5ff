"""From the options of TLS to what clients are encrypted by. Without ``--tls`` nothing of it is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from ..logs import log

if TYPE_CHECKING:
    from ..server.session.handshake import Tls
    from .options import TlsOptions


def open_tls(options: Optional[TlsOptions]) -> Optional[Tls]:
    """What *options* ask for; what expires soon is told in the log. Raises `ConfigurationError`."""
    if options is None:
        return None
    from ..server.session import tls_transport  # noqa: F401 - before the fork
    from ..server.session.handshake import Tls
    from ..tls.credentials import ServerCredentials

    credentials = ServerCredentials(options.directory, anonymous=options.anonymous, ciphers=options.ciphers)
    for warning in credentials.warnings():
        log.warning("%s", warning)
    return Tls(credentials, options.required)
