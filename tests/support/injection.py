"""System calls of a running process that are made to fail."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import Iterator

NO_PROCESSES = "clone,clone3:error=EAGAIN"
"""There can be no more processes."""


@contextmanager
def injected(pid: int, fault: str, *, children: bool = False) -> Iterator[None]:
    """What process *pid* suffers, in the words of strace, from when it is attached until it is let go.

    With *children* each of those that it forks then suffers the same.
    """
    words = ["strace", *(["-f"] if children else []), "-o", "/dev/null", "-p", str(pid), "-e", f"inject={fault}"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        try:
            yield
        finally:
            tracer.terminate()
