"""Descriptors that outlive an exec: everything else that this program opens ends with it (``execve(2)``)."""

from __future__ import annotations

import os
from typing import Iterable, List


class Kept:
    """The descriptors that the next program of this process goes on with, as they are collected by calls."""

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self.fds: List[int] = list(fds)

    def __call__(self, fd: int) -> int:
        """Note *fd*, and return it."""
        self.fds.append(fd)
        return fd

    def let_through(self) -> None:
        """For an exec that comes next. Raises `OSError`."""
        for fd in self.fds:
            os.set_inheritable(fd, True)

    def hold_back(self) -> None:
        """After an exec, or one that has failed: other programs that are executed do not get them."""
        for fd in self.fds:
            os.set_inheritable(fd, False)
