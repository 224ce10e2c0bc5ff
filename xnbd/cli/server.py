"""xnbd-server: serve a disk image to NBD clients.

Usage:
  xnbd-server --target [--laddr ADDRESS]... [options] DISK_IMAGE
  xnbd-server --cow-target [--laddr ADDRESS]... [options] BASE_DISK_IMAGE
  xnbd-server --proxy [--laddr ADDRESS]... [--origin URI]... [options]
              REMOTE_HOST REMOTE_PORT CACHE_DISK_IMAGE CACHE_BITMAP_IMAGE
              CONTROL_SOCKET_PATH
  xnbd-server --proxy [--laddr ADDRESS]... [--origin URI]... [options]
              REMOTE_URI CACHE_DISK_IMAGE CACHE_BITMAP_IMAGE
              CONTROL_SOCKET_PATH
  xnbd-server --help
  xnbd-server --version

Mode options:
  -t, --target          Serve DISK_IMAGE, a file or a block device; clients'
                        writes go to it.
  -c, --cow-target      Serve BASE_DISK_IMAGE, which never changes: what
                        clients write goes to a file without a name, which is
                        gone when the server ends.
  -p, --proxy           Serve the disk of another NBD server, REMOTE_HOST
                        REMOTE_PORT or an NBD URI, or of a web server, an object
                        store or Ceph: https://HOST/PATH, s3://BUCKET/KEY,
                        gs://BUCKET/KEY, az://CONTAINER/KEY,
                        rbd:POOL/IMAGE@SNAPSHOT. What clients read is kept in
                        CACHE_DISK_IMAGE, and so is what they write, which never
                        goes to the other server. The files are made if they are
                        not there. xnbd-bgctl steers the proxy through
                        CONTROL_SOCKET_PATH.

Listening options:
  -l, --lport PORT      TCP port (default: 8520); 0 picks a free one.
  --laddr ADDRESS       Address to listen on, may be given several times
                        (default: all addresses, IPv4 and IPv6).
  --unix PATH           Listen on a Unix socket; without --lport and --laddr on
                        nothing else.
  -i, --inetd           Serve the one client on standard input, negotiation
                        included.
  -F, --connected-fd NUMBER
                        Serve the one client on this descriptor, with whom a
                        wrapper has negotiated already; begin with its first
                        request.
  --negotiated FEATURES
                        What that wrapper has negotiated, separated by commas:
                        newstyle, structured, allocation, cached, written.
                        Without it replies are simple ones in the order of the
                        requests, which suits every client.

Access options:
  --tls-authz FILE      Let clients open the disk as FILE says, and nobody else:
                        lines "IDENTITY EXPORT rw" or "... ro" (read only). The
                        first one that fits decides. IDENTITY is the subject of
                        a certificate, dns:NAME, uri:NAME, email:NAME, psk:NAME
                        or, on Unix sockets, uid:N.

Disk options:
  --create SIZE         Make DISK_IMAGE as a sparse file if it does not exist:
                        512M, 1G, ...
  --cow-dir DIR         Directory for what clients of a --cow-target write
                        (default: beside the image, else $TMPDIR).
  --file-mode MODE      Permissions of files that are made, in octal: 0640
                        lets the group read them (default: 0600). A snapshot
                        has those of its image.
  -r, --readonly        Disconnect a client that writes.
  --exportname NAME     Name to answer to besides the empty one (default: file
                        name of the image).
  --oldstyle            Speak the oldstyle negotiation, for old clients and
                        proxies.

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

Proxy options:
  --target-exportname NAME
                        Name of the disk on the other server (default: the
                        empty one).
  --origin URI          The same disk is there, too; may be given several times.
                        Who fails or is slow is left for the others within a
                        second, and comes back by itself; they share the load.
  --clear-bitmap        Forget which blocks are cached, what clients have
                        written included. Default: go on with what the files
                        hold.
  --adopt-cache         Believe that CACHE_DISK_IMAGE holds all that
                        CACHE_BITMAP_IMAGE says, whatever speaks against it:
                        after they were restored, moved or changed together.
  --verify WHEN         Check blocks that were fetched against their checksums:
                        "first" does when a block is first read after the start,
                        "always" whenever it is read, "never" not at all. A
                        damaged one is fetched again (default: first).
  --cache-limit SIZE    Keep at most SIZE of what was fetched, 1M or more: what
                        clients have not used for the longest time is let go
                        again, and its space with it. What clients write is kept
                        besides, all of it (default: no limit).
  -Q, --max-queue-size N
                        Requests of one client that may wait for the other
                        server before no more are received from it (default: 0,
                        any number).
  -B, --max-buf-size BYTES
                        Data of one client that may wait likewise (default: 0,
                        any amount). Whatever these two say, a client is not
                        listened to while memory is short.
  --readahead SIZE      Fetch up to so much ahead of a client that reads in
                        order; adapts by itself up to that; 0 fetches nothing
                        ahead (default: 8M).
  --fetch-size SIZE     Ask the other server for so much at once, at least,
                        where so much is missing: 4K, 8K, ... 256K (default: 4K
                        of an NBD server, 64K of Ceph, 256K of a web server or
                        a store).
  --connect-timeout SECONDS
                        Try so long to reach the other server, then again
                        (default: 10).
  --origin-timeout SECONDS
                        Answer with an error what has waited so long for the
                        other server (default: wait, and try again, for ever).

Limits options:
  --limit-rate RATE     Let each client read and write RATE bytes a second, both
                        together, and no more: 30M, 512K, ...
  --limit-iops N        Let each client make N requests a second.
  --limit-rate-total RATE
                        Let all clients of the disk together read and write RATE
                        bytes a second, each of them an equal part.
  --limit-iops-total N  Let them make N requests a second together.
  --limit-burst SECONDS
                        Who has done nothing for a while may do as much as in
                        so many seconds at once (default: 0.1).
                        xnbd-bgctl --limit changes all five while it
                        runs. 0 is no limit.

Process options:
  -d, --daemonize       Go into the background once the server listens.
  --pidfile FILE        Write the master's process id to FILE, and remove it at
                        the end.
  --user NAME[:GROUP]   Give root's rights up: become NAME, in its groups and in
                        GROUP instead of its main one, once the server
                        listens and has opened its files. Numbers will do. What
                        that user cannot do later is said at the start.
  --max-clients N       Serve N clients at once, let others wait
                        [default: 4096].
  --spare-workers N     Keep N processes ready for new clients [default: 4].
  --handshake-timeout SECONDS
                        Drop a client that has not negotiated by then
                        [default: 10].
  --limits FILE         Take limits from FILE, at the start and at each reload:
                        lines like "max-clients 100". They go before the options
                        of these names: max-clients, spare-workers,
                        handshake-timeout, max-queue-size, max-buf-size, and
                        those that begin with limit-.
  --control PATH        Listen there for xnbd-bgctl: --query, --snapshot,
                        or --reload. A proxy has its own argument for that.
  --spin MICROSECONDS   Poll for the next request for so long before sleeping;
                        adapts by itself to a slower client, 0 never polls,
                        10000 at most [default: 150].

Metrics options:
  --metrics [ADDRESS:]PORT
                        Answer HTTP there: a page for browsers at /, figures for
                        Prometheus at /metrics, what xnbd-bgctl --query tells at
                        /status, as JSON.
                        Without ADDRESS on this computer only; 0 picks a free
                        port. What has a slash in it is the path of a Unix
                        socket. Nobody has to prove who he is, and nothing is
                        encrypted.

Logging options:
  -L, --logpath FILE    Append to FILE. Without it: standard error, or syslog
                        with --daemonize or --inetd.
  -S, --syslog          Log to syslog; also to FILE if --logpath is given.
  --log-format FORMAT   text, or json: each line is an object with time, level,
                        program, pid and message, and with what the line is
                        about: export, peer, identity, command, offset, length,
                        errno (default: text).
  --slow-log MILLISECONDS
                        Log requests that took longer, from their arrival to
                        the departure of their replies, and where the time
                        went: waiting for the origin, for a block that another
                        process has locked, for the disk, for the client.
  --verbose             Log more.
  --quiet               Log warnings and errors only.

Other options:
  -h, --help            Show this text.
  -v, --version         Show the version.

Signals, to the master: TERM or INT stops it in good order, a second one at
once. HUP reads the files of the configuration again and opens the log file
again, as xnbd-bgctl --reload does, which also tells whether it worked. USR1
makes a snapshot, DISK_IMAGE.snapshot.SECONDS, while clients go on; a proxy
refuses. USR2 makes a proxy a plain target, if every block is cached;
from then on it has snapshots too, CACHE_DISK_IMAGE.snapshot.SECONDS.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from typing import List, NoReturn, Optional

from .. import __version__
from ..system.process import is_super_servers_child, keep_standard_streams, take_client_socket
from .program import begin, run_program
from .values import parse_command_line

PROGRAM = "xnbd-server"

_INETD = re.compile(r"--in|-[tcprdS]*i")
"""Begin of a word that says ``--inetd``, abbreviated perhaps, or its letter after others that take no value."""


def main(argv: Optional[List[str]] = None) -> NoReturn:
    """The program: leaves with status 0, 1 (it failed) or 2 (its command line makes no sense)."""
    words = sys.argv[1:] if argv is None else argv
    client: Optional[int] = None

    def body() -> int:
        nonlocal client
        if words and words[0].startswith("--take-over"):
            from .taking_over import take_over

            return take_over(PROGRAM, __doc__, words)
        client = take_client_socket(0) if any(map(_INETD.match, words)) or is_super_servers_child() else None
        line = parse_command_line(PROGRAM, __doc__, words, f"{PROGRAM} {__version__}")
        keep_standard_streams()
        from .server_options import server_options
        from .serving import serve

        return serve(server_options(line, partial(begin, PROGRAM)), client, words)

    def complain(message: str) -> None:
        from ..logs import complain

        complain(PROGRAM, message, super_server=client is not None)

    run_program(PROGRAM, body, complain)
