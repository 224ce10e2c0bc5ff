"""What ``ssl`` tells of the certificate at the other end."""

from __future__ import annotations

import ssl
from typing import Any, Dict, Union


def certificate_of(tls: Union[ssl.SSLObject, ssl.SSLSocket]) -> Dict[str, Any]:
    """As ``getpeercert`` has it; empty if there is none. Raises `ValueError` if one of its names cannot be read."""
    try:
        return dict(tls.getpeercert() or {})
    except ssl.SSLError as error:  # ``ssl`` takes all texts for UTF-8, and does not know all kinds
        raise ValueError(str(error)) from error
