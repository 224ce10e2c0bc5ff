"""xnbd-wrapper: serve many disks behind one port, chosen by their export names.

Usage:
  xnbd-wrapper [--imgfile IMAGE]... [--laddr ADDRESS]... [options]
  xnbd-wrapper --help
  xnbd-wrapper --version

Disk options:
  -f, --imgfile IMAGE   Add IMAGE to the database as a target; its export name
                        is the file's name without directories, and IMAGE as
                        it stands there is another. May be given several times.
  --dbpath PATH         Database of the exports, made if it does not exist
                        [default: /var/lib/xnbd/xnbd.state].
  --cow                 Every client of a target gets a copy-on-write disk of
                        its own, which is gone when the client leaves.
  --readonly            Disconnect a client that writes.
  --file-mode MODE      Permissions of files that are made, in octal, by the
                        servers too (default: 0600).

Listening options:
  -p, --lport PORT      TCP port (default: 8520); 0 picks a free one.
  --port PORT           The old name of --lport.
  -l, --laddr ADDRESS   Address to listen on, may be given several times
                        (default: all addresses, IPv4 and IPv6).
  --unix PATH           Listen on a Unix socket; without --lport and --laddr on
                        nothing else.
  -s, --socket PATH     Socket for xnbd-wrapper-ctl
                        [default: /var/run/xnbd-wrapper.ctl].
  --handshake-timeout SECONDS
                        Drop a client that has not negotiated by then
                        [default: 10].

Access options:
  --tls-authz FILE      Let clients open exports as FILE says, and nobody else:
                        lines "IDENTITY EXPORT rw" or "... ro" (read only). The
                        first one that fits decides. IDENTITY is the subject of
                        a certificate, dns:NAME, uri:NAME, email:NAME, psk:NAME
                        or, on Unix sockets, uid:N.
TLS options:
  --tls DIR             Encrypt by what is in DIR: server-cert.pem and
                        server-key.pem, ca-cert.pem and ca-crl.pem to check
                        clients, keys.psk with pre-shared keys. Clients have to
                        begin TLS, and to show a certificate that this CA has
                        signed or to have one of the keys.
  --tls-optional        Serve clients that do not begin TLS, too.
  --tls-anonymous       Serve clients without a certificate, too: what they
                        send and get is encrypted, whoever they are.
  --tls-ciphers CIPHERS
                        Allow only these ciphers with TLS 1.2, in OpenSSL's
                        notation; those of TLS 1.3 are always allowed.

Server options:
  -b, --xnbd-server COMMAND
                        Run COMMAND for each client. Without it the wrapper's
                        own process goes on as xnbd-server, which is quicker.
  --xnbd-binary COMMAND
                        The old name of --xnbd-server.
  --xnbd-bgctl COMMAND  Steer proxies with COMMAND instead of the xnbd-bgctl
                        that comes with this program.
  -Q, --max-queue-size N
                        Passed on to the servers of proxies, see
                        xnbd-server(8).
  -B, --max-buf-size BYTES
                        Likewise.
  --cache-limit SIZE    Keep at most SIZE of what was fetched in the cache of
                        each proxy, see xnbd-server(8).

Metrics options:
  --metrics [ADDRESS:]PORT
                        Answer HTTP there: a page for browsers at /, figures of
                        all exports for Prometheus at /metrics, and as JSON at
                        /status. Without ADDRESS on this computer only; 0 picks
                        a free port. What has a slash in it is the path of a
                        Unix socket.
                        Nobody has to prove who he is, and nothing is
                        encrypted.

Limits options:
  --limit-rate RATE     Let each client read and write RATE bytes a second, both
                        together, and no more: 30M, 512K, ...
  --limit-iops N        Let each client make N requests a second.
  --limit-rate-total RATE
                        Let all clients of an export together read and write
                        RATE bytes a second, each of them an equal part.
  --limit-iops-total N  Let them make N requests a second together.
  --limit-burst SECONDS
                        Who has done nothing for a while may do as much as in
                        so many seconds at once (default: 0.1).
                        xnbd-wrapper-ctl --limit changes all five while it
                        runs. 0 is no limit.

Process options:
  -d, --daemonize       Go into the background once the wrapper listens.
  --user NAME[:GROUP]   Give root's rights up: become NAME, in its groups and in
                        GROUP instead of its main one, once the wrapper
                        listens and has opened its files. Numbers will do. What
                        that user cannot do later is said at the start.
  --max-clients N       Serve N clients at once, let others wait
                        [default: 4096].
  --limits FILE         Take limits from FILE, at the start and at each reload:
                        lines like "max-clients 100". They go before the options
                        of these names: max-clients, handshake-timeout,
                        max-queue-size, max-buf-size, and those that begin
                        with limit-.
  -L, --logpath FILE    Append the log to FILE, the servers' too. Without it:
                        standard error, or syslog with --daemonize.
  -S, --syslog          Log to syslog, the servers too; with --logpath to both.
  --log-format FORMAT   text, or json: each line is an object, the servers'
                        lines too, see xnbd-server(8) (default: text).
  --slow-log MILLISECONDS
                        Have the servers log requests that took longer, see
                        xnbd-server(8).

Other options:
  -h, --help            Show this text.
  --version             Show the version.

COMMAND is split into words as a shell does. Proxies check fetched blocks as
with --verify first, and ask for as much at once as suits their origin
(--fetch-size); if all exports are proxies, COMMAND may say otherwise, see
xnbd-server(8).

Signals: TERM or INT stops the wrapper and its servers, a second one at once.
HUP reads the files of the configuration again and opens the log file again, as
xnbd-wrapper-ctl --reload does, which also tells whether it worked.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import List, NoReturn, Optional

from .. import __version__
from .program import begin, run_program
from .values import parse_command_line

PROGRAM = "xnbd-wrapper"


def main(argv: Optional[List[str]] = None) -> NoReturn:
    """The program: leaves with status 0, 1 (it failed) or 2 (its command line makes no sense)."""
    words = sys.argv[1:] if argv is None else argv

    def body() -> int:
        if words and words[0].startswith("--take-over"):
            from .wrapper_taking_over import take_over

            return take_over(PROGRAM, __doc__, words)
        line = parse_command_line(PROGRAM, __doc__, words, f"{PROGRAM} {__version__}")
        from ..system.process import keep_standard_streams
        from .wrapper_options import wrapper_options
        from .wrapping import wrap

        keep_standard_streams()
        return wrap(wrapper_options(line, partial(begin, PROGRAM)), words)

    def complain(message: str) -> None:
        from ..logs import complain

        complain(PROGRAM, message, super_server=False)

    run_program(PROGRAM, body, complain)
