"""What the client says when TLS fails: OpenSSL's errors in words that tell what to do."""

from __future__ import annotations

import os
import ssl
from typing import Dict

from ..errors import TlsFailed, WrongName
from .memory_stream import is_end

# See X509_STORE_CTX_get_error(3).
_UNKNOWN_ISSUER = (2, 18, 19, 20, 21)
_NO_CRL, _NOT_YET_VALID, _EXPIRED, _CRL_EXPIRED, _REVOKED = 3, 9, 10, 12, 23
_OTHER_NAME = (62, 63, 64)

_ALERTS_ON_CERTIFICATES: Dict[str, str] = {
    "BAD_CERTIFICATE": "",
    "UNSUPPORTED_CERTIFICATE": "of a kind that it does not support",
    "CERTIFICATE_REVOKED": "revoked",
    "CERTIFICATE_EXPIRED": "expired",
    "CERTIFICATE_UNKNOWN": "",
    "UNKNOWN_CA": "of an authority that it does not trust",
    "ACCESS_DENIED": "access denied",
}
_NO_VERSION = ("PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "WRONG_SSL_VERSION", "UNKNOWN_PROTOCOL")
_NO_CIPHER = ("HANDSHAKE_FAILURE", "INSUFFICIENT_SECURITY", "NO_CIPHERS_AVAILABLE", "NO_SHARED_CIPHER")
_NO_TLS = (
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "UNEXPECTED_MESSAGE",
    "BAD_RECORD_TYPE",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
    "DATA_LENGTH_TOO_LONG",
    "RECORD_TOO_SMALL",
)
_NO_RECORD = ("DECRYPTION_FAILED_OR_BAD_RECORD_MAC", "BAD_RECORD_MAC")


class Words:
    """What all ways to prove who one is have in common."""

    def explain(self, error: ssl.SSLError, name: str) -> TlsFailed:
        """What *error* means for a connection to *name*."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return self._on_certificate(error, name)
        reason = error.reason or ""
        if is_end(error):
            return TlsFailed(self.end_means())
        _, is_alert, alert = reason.partition("ALERT_")
        return TlsFailed((is_alert and self._on_alert(alert)) or _on_failure(alert or reason))

    def end_means(self) -> str:
        """What it means if the other side goes without a word."""
        return "it closed the connection during the handshake of TLS"

    def _on_certificate(self, error: ssl.SSLCertVerificationError, name: str) -> TlsFailed:
        return TlsFailed(f"its certificate is not accepted: {error.verify_message}")

    def _on_alert(self, alert: str) -> str:
        """The meaning of an alert that the other side has sent; empty for those that are not about us."""
        return ""


def _on_failure(reason: str) -> str:
    if reason in _NO_VERSION:
        return "it has no version of TLS that is wanted here: 1.2 or 1.3"
    if reason in _NO_CIPHER:
        return "there is no cipher or key on which both sides agree"
    if reason in _NO_TLS:
        return "what it says is no TLS"
    if reason in _NO_RECORD:
        return "a record of TLS is broken"
    return f"TLS has failed: {reason.lower().replace('_', ' ') or 'no reason is known'}"


class CertificateWords(Words):
    """Where certificates are used: *directory* is the one of our files, and *shown* our own certificate's path."""

    def __init__(self, directory: str, shown: str) -> None:
        self._directory = directory
        self._shown = shown

    def end_means(self) -> str:
        return f"{super().end_means()}; {self._what_we_show()}"

    def _what_we_show(self) -> str:
        if self._shown:
            return f"does it accept our certificate {self._shown}?"
        return f"does it want a certificate from us? {self._none_there()}"

    def _none_there(self) -> str:
        return f"{self._directory} has none" if self._directory else "there is no tls-certificates=DIRECTORY"

    def _on_certificate(self, error: ssl.SSLCertVerificationError, name: str) -> TlsFailed:
        code = error.verify_code
        crl = os.path.join(self._directory, "ca-crl.pem")
        if code in _OTHER_NAME:
            return WrongName(f"its certificate is not for {name}")
        if code in _UNKNOWN_ISSUER:
            authorities = os.path.join(self._directory, "ca-cert.pem") if self._directory else "this system's store"
            return TlsFailed(f"its certificate is not of an authority in {authorities}")
        meanings = {
            _EXPIRED: "its certificate has expired",
            _NOT_YET_VALID: "its certificate is not valid yet (or the clock is wrong)",
            _REVOKED: f"its certificate is revoked by {crl}",
            _NO_CRL: f"{crl} has no list of an authority behind its certificate",
            _CRL_EXPIRED: f"the list of revoked certificates {crl} has expired",
        }
        return TlsFailed(meanings[code]) if code in meanings else super()._on_certificate(error, name)

    def _on_alert(self, alert: str) -> str:
        if alert not in _ALERTS_ON_CERTIFICATES and alert != "CERTIFICATE_REQUIRED":
            return ""
        if not self._shown:
            return f"it wants a certificate from us, and {self._none_there()}"
        why = _ALERTS_ON_CERTIFICATES.get(alert, "")
        return f"it refuses our certificate {self._shown}{f': {why}' if why else ''}"


class PskWords(Words):
    """Where both sides know the key of *user*, which is in the file at *path*."""

    def __init__(self, user: str, path: str) -> None:
        self._user = user
        self._path = path

    def end_means(self) -> str:
        return f"{super().end_means()}; does it know the key of the user {self._user!r}?"

    def _on_certificate(self, error: ssl.SSLCertVerificationError, name: str) -> TlsFailed:
        return TlsFailed("it answers with a certificate, where tls-psk-file asks for a key that both sides know")

    def _on_alert(self, alert: str) -> str:
        if alert in ("UNKNOWN_PSK_IDENTITY", "DECRYPT_ERROR", "BAD_RECORD_MAC", "ILLEGAL_PARAMETER"):
            return f"it does not know the user {self._user!r}, or not with the key in {self._path}"
        if alert in _NO_CIPHER:
            return f"it takes no pre-shared key, or none of the user {self._user!r}"
        return ""
