"""The page for people, ``page.html``: one file that needs no other, and may load none.

Its policy names the page's own script and style by their hashes. So whatever name a client or an origin has, a browser
runs nothing of it. ``trusted-types`` has browsers refuse text that would become markup.
"""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Dict, List

from .http import Response

_NAME = "page.html"
_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


def page() -> Response:
    """The page as it is in the package now; raises `OSError`."""
    body = Path(__file__).with_name(_NAME).read_bytes()
    headers = (("Content-Security-Policy", policy(body)), ("Referrer-Policy", "no-referrer"))
    return Response(body, "text/html; charset=utf-8", headers=headers)


def policy(body: bytes) -> str:
    """What a browser may do with the page *body*: run its scripts, use its styles, and ask the server it comes from."""
    hashes: Dict[bytes, List[str]] = {b"script": [], b"style": []}
    for kind, text in _INLINE.findall(body):
        hashes[kind].append(f"'sha256-{b64encode(sha256(text).digest()).decode()}'")
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(hashes[b'script'])}",
            f"style-src {' '.join(hashes[b'style'])}",
            "img-src data:",  # the icon
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
