"""Why a client's handshake has failed, in words for the server's log."""

from __future__ import annotations

import ssl
from typing import Dict

from .psk import NO_TEXT, ServerKeys

_REASONS: Dict[str, str] = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the client shows no certificate (--tls-anonymous lets such clients in)",
    "UNSUPPORTED_PROTOCOL": "the client knows neither TLS 1.2 nor TLS 1.3",
    "VERSION_TOO_LOW": "the client knows neither TLS 1.2 nor TLS 1.3",
    "NO_SHARED_CIPHER": "the client has no cipher that is allowed here",
    "NO_SUITABLE_SIGNATURE_ALGORITHM": "the client has no signature algorithm that fits the server's certificate",
    "WRONG_VERSION_NUMBER": "what the client says is no TLS",
    "HTTP_REQUEST": "what the client says is no TLS",
    "HTTPS_PROXY_REQUEST": "what the client says is no TLS",
    NO_TEXT: "the name of the client's pre-shared key is no UTF-8",
    "PSK_IDENTITY_NOT_FOUND": "there is no pre-shared key of the name that the client gives",
    "BINDER_DOES_NOT_VERIFY": "the client has another key",
    "DIGEST_CHECK_FAILED": "the client has another key",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": "what the client sends cannot be decrypted",
}

_ALERTS: Dict[str, str] = {
    "UNKNOWN_CA": "the client does not trust the authority of the server's certificate",
    "BAD_CERTIFICATE": "the client does not accept the server's certificate",
    "UNSUPPORTED_CERTIFICATE": "the client does not accept the server's certificate",
    "CERTIFICATE_UNKNOWN": "the client does not accept the server's certificate",
    "CERTIFICATE_EXPIRED": "the server's certificate has expired, says the client",
    "CERTIFICATE_REVOKED": "the server's certificate is revoked, says the client",
    "PROTOCOL_VERSION": "the client knows no version of TLS that is allowed here",
    "HANDSHAKE_FAILURE": "the client finds no cipher or key to agree on",
    "INSUFFICIENT_SECURITY": "the client finds no cipher or key to agree on",
    "ACCESS_DENIED": "the client does not accept the server's certificate",
    "DECRYPT_ERROR": "the client has another key",
}


def explain(error: ssl.SSLError, keys: ServerKeys) -> str:
    """One line for *error*, in which also the user's name stands if it was about a pre-shared key."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate is refused: {error.verify_message}"
    reason = error.reason or ""
    if keys.unknown is not None and keys.user is None:
        return f"there is no pre-shared key for {keys.unknown!r}"
    if keys.user is None and keys.alone and reason in _NO_KEY:
        return "the client has no pre-shared key, and there is nothing else here"
    if keys.user is not None and reason in _WRONG_KEY:
        return f"the client has another pre-shared key for {keys.user!r}"
    _, is_alert, alert = reason.partition("ALERT_")
    known = _ALERTS.get(alert) if is_alert else _REASONS.get(reason)
    if known is not None:
        return known
    return reason.lower().replace("_", " ") or str(error)


_NO_KEY = ("NO_SUITABLE_SIGNATURE_ALGORITHM", "NO_SHARED_CIPHER", "NO_CERTIFICATE_SET")
_WRONG_KEY = (
    "BINDER_DOES_NOT_VERIFY",
    "DIGEST_CHECK_FAILED",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC",
    "SSLV3_ALERT_BAD_RECORD_MAC",
    "TLSV1_ALERT_DECRYPT_ERROR",
)
