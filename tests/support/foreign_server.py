"""A stand-in for a C xnbd-server: takes the command lines of a C wrapper's child and no other option.

What it was called with goes to the file $FOREIGN_LOG, a JSON list a line. Targets are
served by our own server. As a proxy it serves the cache image as it is, and listens at
its control socket, where nobody is answered, for as long as it has a client, and then
for as long as the file $FOREIGN_LINGER is there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import List, Optional

SERVER = Path(__file__).resolve().parents[2] / "bin" / "xnbd-server"


def main(words: List[str]) -> int:
    with open(os.environ["FOREIGN_LOG"], "a", encoding="utf-8") as log:
        log.write(json.dumps(words) + "\n")
    if "--help" in words:
        print("usage: xnbd-server --target|--cow-target|--proxy ...")
        return 1
    fd = int(words[words.index("--connected-fd") + 1])
    assert os.get_blocking(fd) and os.get_inheritable(fd), "the descriptor has to be blocking and without CLOEXEC"
    assert "--negotiated" not in words
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    if words[0] != "--proxy":
        os.execv(sys.executable, [sys.executable, str(SERVER), *words])
    cache, _bitmap, control = words[-3:]
    listener = listen(control)
    try:
        status = subprocess.call(
            [sys.executable, str(SERVER), "--target", "--connected-fd", str(fd), cache], pass_fds=[fd]
        )
        os.close(fd)
        while os.path.exists(os.environ.get("FOREIGN_LINGER", "")):
            time.sleep(0.02)
        return status
    finally:
        if listener:
            os.unlink(control)


def listen(path: str) -> Optional[socket.socket]:
    """A socket that listens from when *path* is there; None if another process has it."""
    listener, new = socket.socket(socket.AF_UNIX), f"{path}.{os.getpid()}"
    listener.bind(new)
    listener.listen()
    try:
        os.link(new, path)
    except FileExistsError:
        listener.close()
        return None
    finally:
        os.unlink(new)
    return listener


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
