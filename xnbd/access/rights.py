"""What one client may do with which disks.

A disk that a client may not open does not exist for it: it is in no list, and to ask for it is answered as any
unknown name is. Only the server's own log says that it was denied, and to whom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Optional

from ..protocol.server_handshake import Denied, Export, readonly_flags
from .identity import Identity

if TYPE_CHECKING:
    from .rules import Rules, Selection


class Rights:
    """The rights of the client with *identity*, as `Access` has them when its handshake begins."""

    def __init__(self, identity: Identity, selection: Optional[Selection]) -> None:
        """Without a *selection* of rules everything is allowed."""
        self._identity = identity
        self._selection = selection

    def may_open(self, name: str) -> bool:
        """Whether the export *name* is there for this client."""
        return self._selection is None or self._selection.writable(name) is not None

    def check(self, name: str) -> None:
        """Raises `Denied` if the export *name* is not there for this client."""
        if not self.may_open(name):
            raise Denied(f"export {name!r} is denied to {self._identity}")

    def offer(self, export: Export) -> Export:
        """*export* as this client gets it: read-only perhaps. Raises `Denied`."""
        self.check(export.name)
        if self._selection is None or self._selection.writable(export.name):
            return export
        return export._replace(flags=readonly_flags(export.flags))


class Access(NamedTuple):
    """Who may open which disk: what *rules* say, or everybody every one without them."""

    rules: Optional[Rules] = None

    def rights_of(self, identity: Identity) -> Rights:
        return Rights(identity, self.rules.select(identity) if self.rules else None)


EVERYBODY = Access()
