"""Files with settings that operators write: read whole, within bounds, and without waiting for anybody."""

from __future__ import annotations

import os
import stat

from ..errors import ConfigurationError


def read_settings(path: str, what: str, largest: int) -> bytes:
    """The content of the file at *path*, which is *what* in messages. Raises `ConfigurationError`."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigurationError(f"{what} {path}: this is no regular file")
            data = file.read(largest + 1)
    except OSError as error:
        raise ConfigurationError(f"{what} {path}: it cannot be read: {error.strerror}") from error
    if len(data) > largest:
        raise ConfigurationError(f"{what} {path}: it has more than {largest} bytes")
    return data
