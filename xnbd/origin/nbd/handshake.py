"""Over a socket that is connected: the greeting, TLS where the address says so, and agreement on the disk.

- With TLS nothing is asked for before, and nothing is kept that was heard before.
- Each receive asks for no more than the next message. So what comes behind it in the clear is left to TLS, for which it
  is no record.
"""

from __future__ import annotations

import select
import socket
from typing import TYPE_CHECKING, Callable, Optional

from ...errors import ConfigurationError, ProtocolError, TlsFailed, WrongName, XnbdError
from ...protocol.client_handshake import ClientHandshake, RemoteExport, TlsDemanded
from .address import NbdAddress
from .encryption import Encryption
from .stream import PlainStream, Stream, send_from

if TYPE_CHECKING:
    from ...tls.client import ClientStream
    from ...tls.client_credentials import ClientCredentials


class NotReached(XnbdError):
    """There is no way; the message says why. ``refused`` as in `OriginLost`."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


def read_credentials(how: Optional[Encryption]) -> Optional[ClientCredentials]:
    """What TLS needs, if it is asked for. Raises `NotReached`: files on this computer are not as they should be."""
    if how is None:
        return None
    from ...tls.client_credentials import ClientCredentials

    try:
        return ClientCredentials(how.certificates, how.psk_file, how.user, verify_peer=how.verify_peer)
    except ConfigurationError as error:
        raise NotReached(str(error), refused=True) from error


class Handshake:
    """Hands are shaken over *sock*; ``export`` is what was agreed on, None before, and ``stream`` is the way to it.

    *credentials* are those for TLS. With *only_names* TLS is asked for nothing but the names of the origin's
    certificate, of which the error tells then. Methods raise `NotReached`, `WrongName`, and `OSError`.
    """

    def __init__(
        self,
        sock: socket.socket,
        address: NbdAddress,
        credentials: Optional[ClientCredentials],
        *,
        only_names: bool = False,
    ) -> None:
        self.export: Optional[RemoteExport] = None
        self.stream: Stream = PlainStream(sock)
        self._sock = sock
        self._address = address
        self._credentials = credentials
        self._only_names = only_names
        self._dialogue = ClientHandshake(address.export_name, tls=credentials is not None)
        self._greetings = bytearray()
        self._step: Callable[[], None] = self._negotiate
        self._tls_events = 0
        self._in_silence = False  # TLS is set up, and nothing has come through it

    def events(self) -> int:
        """The poll mask to wait for."""
        return self._tls_events or (select.POLLIN | select.POLLOUT if self._greetings else select.POLLIN)

    def go_on(self) -> None:
        """Do what can be done without waiting."""
        try:
            self._step()
        except BlockingIOError:
            return
        except ProtocolError as error:
            raise NotReached(self._advice(error), refused=True) from error
        except WrongName:
            raise
        except TlsFailed as error:
            raise NotReached(error.reason, refused=True) from error
        except ConnectionError as error:
            if self._in_silence or self._tls_events:
                raise self._find_reason() from error
            raise

    def _negotiate(self) -> None:
        """Receives nothing that comes after the handshake: that is not for here."""
        dialogue = self._dialogue
        send_from(self._greetings, self.stream)
        while dialogue.export is None:
            part = memoryview(bytearray(dialogue.wanted))
            received = self.stream.receive_into(part)
            if not received:
                raise NotReached(self._end_means(), refused=True)
            self._in_silence = False
            self._greetings += dialogue.receive(bytes(part[:received]))
            if dialogue.starts_tls:
                self._start_tls()
                return
            send_from(self._greetings, self.stream)
        self.export = dialogue.export

    def _start_tls(self) -> None:
        from ...tls.client import ClientStream

        assert self._credentials
        stream = ClientStream(self._sock, self._credentials, self._address.tls_name, only_names=self._only_names)
        self.stream = stream
        self._step = lambda: self._secure(stream)
        self._step()

    def _secure(self, stream: ClientStream) -> None:
        self._tls_events = stream.shake_hands()
        if self._tls_events:
            return
        if self._only_names:
            names = ", ".join(stream.names()) or "nobody whose name can be read"
            raise NotReached(f"its certificate is for {names}, not for {self._address.tls_name}", refused=True)
        self._in_silence = True
        self._greetings += self._dialogue.on_tls()
        self._step = self._negotiate
        self._step()

    # What went wrong

    def _find_reason(self) -> NotReached:
        """The connection broke while we sent; its last words may still be there."""
        try:
            self.stream.receive_into(memoryview(bytearray(1)))
        except TlsFailed as error:
            return NotReached(error.reason, refused=True)
        except OSError:
            pass
        return NotReached(self._end_means(), refused=True)

    def _end_means(self) -> str:
        if self._credentials and (self._in_silence or self._tls_events):
            return self._credentials.words.end_means()
        return self._dialogue.end_means()

    def _advice(self, error: ProtocolError) -> str:
        if isinstance(error, TlsDemanded) and self._credentials is None:
            how = Encryption(certificates="DIRECTORY")
            return f"{error}: use {self._address._replace(encryption=how)}"
        return str(error)
