"""Who a client is: the names that its transport has proved."""

from __future__ import annotations

from typing import NamedTuple, Tuple


class Identity(NamedTuple):
    """The names of one client, the most telling one first; none at all for a client that has proved nothing.

    A name is the subject of a certificate as RFC 4514 writes it (``CN=alice,O=Example``), one of its subject
    alternative names (``dns:``, ``uri:``, ``email:``), ``psk:NAME`` for a pre-shared key, or ``uid:N`` for the
    user at the other end of a Unix socket (``SO_PEERCRED`` of ``unix(7)``).
    """

    names: Tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.names[0] if self.names else "nobody"


NOBODY = Identity()
