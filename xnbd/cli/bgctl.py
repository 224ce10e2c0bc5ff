"""xnbd-bgctl: steer a running xnbd-server through its control socket.

Usage:
  xnbd-bgctl [options] [--query] CONTROL_SOCKET
  xnbd-bgctl [options] (--switch | --shutdown) CONTROL_SOCKET
  xnbd-bgctl [options] (--cache-all | --cache-all2) CONTROL_SOCKET
  xnbd-bgctl [options] --scrub CONTROL_SOCKET
  xnbd-bgctl [options] [--origin URI]... --reconnect CONTROL_SOCKET
             REMOTE_HOST REMOTE_PORT
  xnbd-bgctl [options] [--origin URI]... --reconnect CONTROL_SOCKET ORIGIN_URI
  xnbd-bgctl [options] (--snapshot | --reload | --upgrade) CONTROL_SOCKET
  xnbd-bgctl [options] --limit CONTROL_SOCKET
  xnbd-bgctl [options] --top CONTROL...
  xnbd-bgctl --help
  xnbd-bgctl --version

Commands:
  -q, --query           Show what the server does, how much is cached, and its
                        clients. This is done if no command is given.
  --top                 Show how fast one or several servers are, live: bytes
                        and requests a second, how long these take, what waits,
                        and which clients read and write most. Up, Down and
                        Enter choose a server, to look at its clients and its
                        map; q ends. Where standard output is no terminal there
                        is a line for each server and interval.
  -s, --switch          Make a proxy a plain target on its cache file, with its
                        clients connected; refused while blocks are missing.
  --shutdown            The old name of --switch.
  -c, --cache-all       Copy what is not cached yet, and wait for it. Ctrl-C
                        stops the copy and nothing else; run again, it goes on.
  -C, --cache-all2      The same, but return at once.
  --scrub               Check all that is cached against the checksums of what
                        was fetched, fetch damaged blocks again, and wait for
                        it. Ctrl-C stops that and nothing else.
  -r, --reconnect       Use the disk at REMOTE_HOST REMOTE_PORT, or at a URI
                        (nbd://, https://, s3://, rbd:...), as origin, instead
                        of all former ones.
  --snapshot            Make an image of the disk as it is now, and print its
                        path. A proxy has to be switched first.
  --upgrade             Have the server become the xnbd-server that is installed
                        now, with its command line, its process id and its
                        clients, who do not notice. If the new program cannot
                        go on with all that, nothing changes.
  --reload              Have the server read the files of its configuration
                        again. Clients that come from now on get what they say;
                        the connected ones go on. If something is wrong with a
                        file, all stays as it was.
  --limit               Change how fast clients may be, by the options whose
                        names begin so, at once and for all clients, and show
                        what holds then. A reload changes only what is another
                        one in the files than before, an upgrade nothing; after
                        a restart the command line holds.

Options, ignored with a warning by a command that has no use for them:
  --json                With --query, print the server's answer as JSON, for
                        programs.
  --map                 With --query, draw which parts of the disk are cached,
                        and which of them clients have written.
  --interval SECONDS    With --top, the time between two looks (default: 1).
  --force               With --switch, do it although blocks are missing: they
                        read as zeros then.
  --progress            With --cache-all, --scrub and --snapshot, show how far
                        it is, how fast, and how long it will take.
  --blocks-per-request COUNT
                        With --cache-all and --cache-all2, ask the origin for so
                        many blocks of 4 KiB at once, at most 8192.
  --limit-rate RATE     With those two and --scrub, copy or check no more bytes
                        a second than RATE: 200M, 512K, ... With --limit, let
                        each client read and write so many, both together; 0 is
                        no limit.
  --limit-iops N        With --limit, let each client make N requests a second.
  --limit-rate-total RATE
                        With --limit, let all clients together read and write
                        RATE bytes a second, each of them an equal part.
  --limit-iops-total N  With --limit, let them make N requests a second
                        together.
  --limit-burst SECONDS
                        With --limit, let who has done nothing for a while do as
                        much as in so many seconds at once.
  --exportname NAME     With --reconnect, the export to ask the new origin for
                        (default: its default one).
  --origin URI          With --reconnect, the same disk is there, too; may be
                        given several times.
  --program PATH        With --upgrade, become the program at PATH instead of
                        the one that the server was started with.
  --check               With --upgrade, only say what would happen.

Other options:
  --timeout SECONDS     Give up when the server has said nothing for so long,
                        not when a command takes long (default: 30).
  -h, --help            Show this text.
  --version             Show the version.

Exit status: 0, 1 if the server says no or cannot be reached, 2 if the command
line makes no sense, 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from typing import List, NoReturn, Optional

from .. import __version__
from ..system.process import keep_standard_streams
from .program import run_program
from .values import parse_command_line

PROGRAM = "xnbd-bgctl"


def main(argv: Optional[List[str]] = None) -> NoReturn:
    """The program: leaves with one of the statuses that the usage text lists."""
    words = sys.argv[1:] if argv is None else argv

    def body() -> int:
        keep_standard_streams()
        line = parse_command_line(PROGRAM, __doc__, words, f"{PROGRAM} {__version__}")
        from .bgctl_options import steering_options
        from .steering import steer

        steer(steering_options(PROGRAM, line))
        return 0

    run_program(PROGRAM, body)
