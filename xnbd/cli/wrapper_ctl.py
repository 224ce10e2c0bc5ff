"""xnbd-wrapper-ctl: steer a running xnbd-wrapper.

Usage:
  xnbd-wrapper-ctl [--socket PATH] --list [--json]
  xnbd-wrapper-ctl [--socket PATH] --add-target [--] NAME FILE
  xnbd-wrapper-ctl [--socket PATH] --add [--] FILE
  xnbd-wrapper-ctl [--socket PATH] [--origin URI]...
                   [--target-exportname NAME] --add-proxy [--] NAME
                   REMOTE_HOST REMOTE_PORT
                   CACHE_IMAGE BITMAP_IMAGE CONTROL_SOCKET_PATH
  xnbd-wrapper-ctl [--socket PATH] [--origin URI]...
                   [--target-exportname NAME] --add-proxy [--] NAME
                   REMOTE_URI CACHE_IMAGE BITMAP_IMAGE CONTROL_SOCKET_PATH
  xnbd-wrapper-ctl [--socket PATH] --remove-by-exportname [--] NAME
  xnbd-wrapper-ctl [--socket PATH] --remove-by-file [--] FILE
  xnbd-wrapper-ctl [--socket PATH] --remove INDEX
  xnbd-wrapper-ctl [--socket PATH] --bgctl-query [--] NAME
  xnbd-wrapper-ctl [--socket PATH] --bgctl-cache-all [--] NAME
  xnbd-wrapper-ctl [--socket PATH] --bgctl-switch [--] NAME
  xnbd-wrapper-ctl [--socket PATH] [--origin URI]...
                   [--target-exportname NAME] --bgctl-reconnect [--] NAME
                   REMOTE_HOST REMOTE_PORT
  xnbd-wrapper-ctl [--socket PATH] [--origin URI]...
                   [--target-exportname NAME] --bgctl-reconnect [--] NAME
                   REMOTE_URI
  xnbd-wrapper-ctl [--socket PATH] (--save | --reload | --orphan | --shutdown)
  xnbd-wrapper-ctl [--socket PATH] --upgrade [--check] [--program PATH]
  xnbd-wrapper-ctl [--socket PATH] [--limit-rate RATE] [--limit-iops N]
                   [--limit-rate-total RATE] [--limit-iops-total N]
                   [--limit-burst SECONDS] --limit [--] NAME
  xnbd-wrapper-ctl --help
  xnbd-wrapper-ctl --version

Commands:
  -l, --list            Show the exports and how many clients each has.
  --add-target          Serve FILE, a disk image or a block device, under NAME.
  -a, --add             The same, with FILE as it stands there as its name.
  --add-proxy           Serve the disk of another server, at REMOTE_HOST
                        REMOTE_PORT or a URI (nbd://, https://, s3://, rbd:,
                        ...), under NAME; cache it here.
  --remove-by-exportname
                        Refuse new clients of NAME; the connected ones stay.
  --remove-by-file      The same for all exports whose disk or cache image is
                        FILE.
  -r, --remove          The same for the export that has INDEX in the list, as
                        long as the wrapper runs.
  --bgctl-query         Show how much of a proxy is cached.
  --bgctl-cache-all     Copy what is not cached yet, and wait for it.
  --bgctl-switch        Make a proxy, all of which is cached, a target; its
                        clients stay.
  --bgctl-reconnect     Use the disk at REMOTE_HOST REMOTE_PORT, or at a URI,
                        as a proxy's origin, instead of all former ones.
  --save                Write the database, which the wrapper does at every
                        change anyway.
  --reload              Have the wrapper read the files of its configuration
                        again. Clients that come from now on get what they say;
                        the connected ones go on. If something is wrong with a
                        file, all stays as it was.
  --upgrade             Have the wrapper and its clients' servers become the
                        xnbd-wrapper that is installed now. Clients stay
                        connected, and so do exports, sockets and process id;
                        how many clients have moved is printed. If the new
                        program cannot go on, nothing has changed.
  --limit               Change how fast clients of an export may be by the
                        options whose names begin so, at once, and show what
                        holds then. A reload changes only what is another one
                        in the files than before, an upgrade nothing; after a
                        restart the command line holds for all exports.
  --orphan              End the wrapper and leave the servers to their clients.
  -d, --shutdown        End the wrapper and all servers.

Options:
  -s, --socket PATH     Control socket of the wrapper
                        [default: /var/run/xnbd-wrapper.ctl].
  --check               Say whether an upgrade would work; change nothing.
  --program PATH        Become the xnbd-wrapper at PATH (default: the one that
                        was started).
  --json                Print the list as JSON, for programs.
  --target-exportname NAME
                        The export to ask the origin for (default: its
                        default one).
  --origin URI          The same disk is there, too; may be given several times.
  --limit-rate RATE     Let each client read and write RATE bytes a second, both
                        together: 30M, 512K, ...; 0 is no limit.
  --limit-iops N        Let each client make N requests a second.
  --limit-rate-total RATE
                        Let all clients of the export together read and write
                        RATE bytes a second, each of them an equal part.
  --limit-iops-total N  Let them make N requests a second together.
  --limit-burst SECONDS
                        Who has done nothing for a while may do as much as in
                        so many seconds at once.
  -h, --help            Show this text.
  --version             Show the version.

A NAME or FILE that begins with a dash has -- before it.

Exit status: 0, 1 if the wrapper says no or cannot be reached, 2 if the command
line makes no sense, 130 after Ctrl-C; with --bgctl-... that of xnbd-bgctl.
"""

from __future__ import annotations

import sys
from typing import List, NoReturn, Optional

from .. import __version__
from ..system.process import keep_standard_streams
from .program import run_program
from .values import parse_command_line

PROGRAM = "xnbd-wrapper-ctl"


def main(argv: Optional[List[str]] = None) -> NoReturn:
    """The program: leaves with one of the statuses that the usage text lists."""
    words = sys.argv[1:] if argv is None else argv

    def body() -> int:
        keep_standard_streams()
        line = parse_command_line(PROGRAM, __doc__, words, f"{PROGRAM} {__version__}")
        from .wrapper_ctl_options import ctl_options
        from .wrapper_steering import steer

        return steer(ctl_options(line))

    run_program(PROGRAM, body)
