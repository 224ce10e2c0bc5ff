"""xnbd-bgctl: steer a running xnbd-server through its control socket.

Usage:
  xnbd-bgctl --query [--json] [--map] CONTROL_SOCKET
  xnbd-bgctl [--force] (--switch | --shutdown) CONTROL_SOCKET
  xnbd-bgctl [--progress] [--blocks-per-request COUNT]
             [--limit-rate RATE] --cache-all CONTROL_SOCKET
  xnbd-bgctl [--blocks-per-request COUNT]
             [--limit-rate RATE] --cache-all2 CONTROL_SOCKET
  xnbd-bgctl [--exportname NAME] --reconnect
             CONTROL_SOCKET REMOTE_HOST REMOTE_PORT
  xnbd-bgctl [--exportname NAME] --reconnect CONTROL_SOCKET ORIGIN_URI
  xnbd-bgctl --snapshot [--progress] CONTROL_SOCKET
  xnbd-bgctl --help
  xnbd-bgctl --version

Commands:
  --query               Show what the server does, how much is cached, and its
                        clients.
  --switch              Make a proxy a plain target on its cache file, with its
                        clients connected; refused while blocks are missing.
  --shutdown            The old name of --switch.
  --cache-all           Copy what is not cached yet, and wait for it. Ctrl-C
                        stops the copy and nothing else; run again, it goes on.
  --cache-all2          The same, but return at once.
  --reconnect           Use the disk at REMOTE_HOST REMOTE_PORT, or at an NBD
                        URI, as origin.
  --snapshot            Make an image of the disk as it is now, and print its
                        path. A proxy has to be switched first.

Options:
  --json                Print the server's answer as JSON, for programs.
  --map                 Draw which parts of the disk are cached.
  --force               Switch although blocks are missing: they read as zeros
                        then.
  --progress            Show how far it is, how fast, and how long it will
                        take.
  --blocks-per-request COUNT
                        Ask the origin for so many blocks of 4 KiB at once, at
                        most 8192.
  --limit-rate RATE     Copy no more bytes a second than RATE: 200M, 512K, ...
  --exportname NAME     The export to ask the new origin for (default: its
                        default one).
  -h, --help            Show this text.
  --version             Show the version.

Exit status: 0, 1 if the server says no or cannot be reached, 2 if the command
line makes no sense, 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from typing import List, NoReturn, Optional

from .. import __version__
from ..errors import ConfigurationError
from .values import parse_command_line

PROGRAM = "xnbd-bgctl"


def main(argv: Optional[List[str]] = None) -> NoReturn:
    """The program: leaves with one of the statuses that the usage text lists."""
    status = 0
    try:
        arguments = parse_command_line(
            PROGRAM, __doc__, sys.argv[1:] if argv is None else argv, f"{PROGRAM} {__version__}"
        )
        from .steering import steer

        steer(arguments)
    except ConfigurationError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        status = error.exit_status
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
