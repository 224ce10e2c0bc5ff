"""What release 0.5.0 says of upgrades, byte by byte: recorded from its programs (commit b947486), which know none."""

from __future__ import annotations

import socket
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Sequence, Tuple

ANSWERS = {
    "target": (b'{"done": true, "error": "there is no command \'upgrade\' here, only: query, snapshot"}\n'),
    "proxy": (
        b'{"done": true, "error": "there is no command \'upgrade\' here, only: query, snapshot, cache-all, switch, '
        b'reconnect"}\n'
    ),
    "wrapper": (
        b'{"done": true, "error": "there is no command \'upgrade\' here, only: list, add-target, add-proxy, '
        b"remove-by-exportname, remove-by-file, remove-by-index, bgctl-query, bgctl-cache-all, bgctl-switch, "
        b'bgctl-reconnect, save, orphan, shutdown"}\n'
    ),
}
"""To ``{"command": "upgrade"}`` on the control sockets."""

REFUSAL = "xnbd-server: there is no option --take-over-check (xnbd-server --help shows the usage)"
"""What the program says, with status 2, if another version executes it to check whether it could go on."""


def ask_old(control: Path, answer: bytes, command: Sequence[str]) -> Tuple[int, str]:
    """The status of *command*, and what it prints, if the socket *control* gives this *answer*."""
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(control))
        listener.listen()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as asking:
            with closing(listener.accept()[0]) as client:
                client.recv(4096)
                client.sendall(answer)
            out, _ = asking.communicate()
    return asking.returncode, out
