"""Files with settings that operators write: read whole, within bounds, and without waiting for anybody."""

from __future__ import annotations

import errno
import os
import stat

from ..errors import ConfigurationError

LARGEST = 64 << 20
"""Bytes: more than any file of certificates, keys or revocation lists has."""


def read_settings(path: str, what: str, largest: int) -> bytes:
    """The content of the file at *path*, which is *what* in messages. Raises `ConfigurationError`."""
    try:
        return read_whole(path, largest)
    except _Unfit as error:
        raise ConfigurationError(f"{what} {path}: {error.strerror}") from error
    except OSError as error:
        raise ConfigurationError(f"{what} {path}: it cannot be read: {error.strerror}") from error


class _Unfit(OSError):
    """There is something that can be read, and that is no file of settings."""


def read_whole(path: str, largest: int) -> bytes:
    """The content of the file at *path*, which has at most *largest* bytes.

    Raises `OSError` for anything else, too: a pipe would be waited for, and a device may never end.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _Unfit(errno.EINVAL, "this is no regular file", path)
        data = file.read(largest + 1)
    if len(data) > largest:
        raise _Unfit(errno.EINVAL, f"it has more than {largest} bytes", path)
    return data
