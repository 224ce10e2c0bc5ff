"""xnbd: a Network Block Device server."""

__version__ = "0.5.0"
