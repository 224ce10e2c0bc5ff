"""A client's stream of bytes over TLS. Imported when the first client begins it: `ssl` takes time and memory."""

from __future__ import annotations

from ...tls.server import ServerChannel
from .transport import Transport


class TlsTransport(ServerChannel, Transport):
    """The server's end of TLS as the `Transport` of a connection."""
