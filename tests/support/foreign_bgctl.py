"""A stand-in for a C xnbd-bgctl: says what it was called with, and does as $BGCTL tells it.

``ok``; ``fail``: an error message and status 3; ``wait``: a line, then it waits until
the file $BGCTL_GO is there; ``lose``: once, it fails when the control socket has gone.
It refuses to work where nobody listens at the control socket.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path


def main() -> int:
    control = next(word for word in sys.argv if word.startswith("/") and word.endswith(".ctl"))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(control)
    print("called:", *sys.argv[1:], flush=True)
    behaviour = Path(os.environ["BGCTL"]).read_text().strip()
    if behaviour == "fail":
        print("xnbd-bgctl: it cannot be done", file=sys.stderr)
        return 3
    if behaviour == "lose" and not os.path.exists(os.environ["BGCTL_GO"]):
        Path(os.environ["BGCTL_GO"]).touch()
        while os.path.exists(control):
            time.sleep(0.02)
        print("xnbd-bgctl: nobody has answered", file=sys.stderr)
        return 1
    while behaviour == "wait" and not os.path.exists(os.environ["BGCTL_GO"]):
        time.sleep(0.02)
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
