"""System calls of a running process that are made to fail."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import Iterator, Sequence, Union

NO_PROCESSES = "clone,clone3:error=EAGAIN"
"""There can be no more processes."""


@contextmanager
def injected(pid: Union[int, Sequence[int]], fault: str, *, children: bool = False) -> Iterator[None]:
    """What process *pid* suffers, or each of several, in strace's words, from when it is attached until it is let go.

    With *children* each of those that it forks then suffers the same.
    """
    pids = [word for one in ([pid] if isinstance(pid, int) else pid) for word in ("-p", str(one))]
    words = ["strace", *(["-f"] if children else []), "-o", "/dev/null", *pids, "-e", f"inject={fault}"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        for _ in pids[::2]:
            assert "attached" in tracer.stderr.readline()
        try:
            yield
        finally:
            tracer.terminate()
