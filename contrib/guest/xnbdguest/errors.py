"""What can go wrong with a guest."""

from __future__ import annotations


class GuestError(Exception):
    """A guest cannot be made, or does not do what it should; the message says what to do or what it did last."""
