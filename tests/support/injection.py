"""System calls of a running process that are made to fail."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, List, Sequence, Tuple, Union

NO_PROCESSES = "clone,clone3:error=EAGAIN"
"""There can be no more processes."""


@contextmanager
def injected(pid: Union[int, Sequence[int]], fault: str, *, children: bool = False) -> Iterator[None]:
    """What process *pid* suffers, or each of several, in strace's words, from when it is attached until it is let go.

    With *children* each of those that it forks then suffers the same.
    """
    with _traced(pid, *(["-f"] if children else []), "-o", "/dev/null", "-e", f"inject={fault}"):
        yield


@contextmanager
def broken(pid: int, fault: str, path: Path) -> Iterator[None]:
    """Process *pid* suffers *fault* in those calls only that concern the file at *path*."""
    with _traced(pid, "-o", "/dev/null", "-P", str(path), "-e", f"inject={fault}"):
        yield


@contextmanager
def stopped_after(pid: int, calls: str, file: Path) -> Iterator[Callable[[], bool]]:
    """Have process *pid* stop once the first of *calls* (``a,b``) has returned, and go on at the end.

    What is given tells whether it has stopped; *file* is for the tracer.
    """
    with _traced(pid, "-o", str(file), "-e", f"trace={calls}", "-e", f"inject={calls}:signal=SIGSTOP:when=1"):
        try:
            yield lambda: "stopped by SIGSTOP" in file.read_text()
        finally:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def listed_calls(pid: Union[int, Sequence[int]], file: Path) -> Iterator[List[Tuple[str, int]]]:
    """All system calls of the processes meanwhile, each as ``(name, number)``: the first of its name, the second, ...

    They are there at the end; *file* is for the tracer.
    """
    calls: List[Tuple[str, int]] = []
    with _traced(pid, "-c", "-U", "name,calls", "-o", str(file)):
        yield calls
    for line in file.read_text().splitlines():
        name, *counts = line.split()
        if len(counts) == 1 and counts[0].isdigit() and name != "total":
            calls += [(name, number) for number in range(1, int(counts[0]) + 1)]


@contextmanager
def _traced(pid: Union[int, Sequence[int]], *options: str) -> Iterator[None]:
    pids = [word for one in ([pid] if isinstance(pid, int) else pid) for word in ("-p", str(one))]
    with subprocess.Popen(["strace", *options, *pids], stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        for _ in pids[::2]:
            assert "attached" in tracer.stderr.readline()
        try:
            yield
        finally:
            tracer.terminate()
