"""A copy of bytes that lie in mapped files, made by the kernel.

OpenSSL reads what it encrypts in user space, where a page that cannot be read kills the process. So the kernel copies
all pieces of a send at once into memory that always can be: a file without a name, whose mapping is read from. It
meets a bad page as in ``sendmsg(2)``, with EFAULT or a short count.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Sequence, Union

SIZE = 256 << 10
"""Bytes: as much as is encrypted in one go. Memory is taken only for what has been used."""


class Scratch:
    """`SIZE` bytes of memory, and the file by which the kernel fills them."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("xnbd-tls", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, SIZE)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)  # a write ends at its end
        self._memory = mmap.mmap(self._fd, SIZE)
        self._view = memoryview(self._memory)

    def copy(self, buffers: Sequence[Union[bytes, memoryview]]) -> memoryview:
        """The beginning of *buffers*, at most IOV_MAX of them, as it is now; holds until the next call.

        Raises `OSError` (EFAULT) if the first byte cannot be read.
        """
        return self._view[: os.pwritev(self._fd, buffers, 0)]

    def close(self) -> None:
        self._view.release()
        self._memory.close()
        os.close(self._fd)
