"""Disks as byte ranges. Nothing here knows of NBD, sockets or clients."""
