#!/usr/bin/env python3
"""Move a running qemu machine to another host, and its disk after it.

Usage:
  migrate.py [--bgctl COMMAND] [--keep-source] SOURCE_QMP DESTINATION_QMP URI CONTROL_SOCKET
  migrate.py --help

SOURCE_QMP and DESTINATION_QMP are the QMP sockets of the running machine and of the
one that waits with -incoming; the latter's disk is an xnbd-server --proxy, whose
control socket is CONTROL_SOCKET and that has cached nothing yet. URI is where the destination waits, seen from the
source: tcp:HOST:PORT. Sockets of another host can be brought here with ssh -L.

Options:
  --bgctl COMMAND  How to call xnbd-bgctl, for example "ssh host2 xnbd-bgctl" [default: xnbd-bgctl].
  --keep-source    Do not end the source's qemu, which has stopped then.
  -h, --help       Show this text.

When it has ended with status 0 nothing needs the source host any more: its xnbd-server
may be stopped. If the migration fails (status 1) the machine goes on where it was.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import List, NamedTuple, Optional

import docopt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "guest"))

from xnbdguest.errors import GuestError
from xnbdguest.qmp import Qmp

_POLL = 0.02
_START_TIME = 30.0
"""Seconds that the destination may take to run once the source has sent everything."""


class Migration(NamedTuple):
    """How long the machine stood still, as qemu measured it, and how long all took; in seconds."""

    downtime: float
    total: float


def move_machine(source: Path, destination: Path, uri: str, *, keep_source: bool = False) -> Migration:
    """Migrate; returns when the destination runs. GuestError if it failed: then the source runs on."""
    with Qmp(source) as here, Qmp(destination) as there:
        here.execute("migrate", uri=uri)
        while True:
            state = here.execute("query-migrate")
            if state["status"] == "completed":
                break
            if state["status"] in ("failed", "cancelled"):
                raise GuestError(
                    f"the migration has {state['status']}: {state.get('error-desc', 'no reason is given')}"
                )
            time.sleep(_POLL)
        _wait_until_running(there)
        if not keep_source:
            here.execute("quit")
    return Migration(state["downtime"] / 1000, state["total-time"] / 1000)


def _wait_until_running(machine: Qmp) -> None:
    deadline = time.monotonic() + _START_TIME
    while not machine.execute("query-status")["running"]:
        if time.monotonic() > deadline:
            raise GuestError("the machine has moved, but does not run; look at the destination's qemu")
        time.sleep(_POLL)


def check_proxy(bgctl: List[str], control: str) -> None:
    """GuestError if the proxy has cached anything yet: the running machine may write those blocks once more."""
    done = subprocess.run(
        [*bgctl, "--query", "--json", control], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise GuestError("the proxy cannot be asked, nothing was moved")
    cached = json.loads(done.stdout)["blocks"]["cached"]
    if cached:
        raise GuestError(
            f"the proxy has cached blocks already ({cached}) that the machine may still change; nothing was moved."
            " Start proxy (with --clear-bitmap) and waiting qemu again, with the disk's geometry given"
        )


def move_disk(bgctl: List[str], control: str) -> None:
    """Fetch what the destination's cache lacks, then make it independent of the source; GuestError if that fails."""
    for action in ("--cache-all", "--switch"):
        done = subprocess.run([*bgctl, action, control], stdin=subprocess.DEVNULL)
        if done.returncode:
            raise GuestError(f"{shlex.join([*bgctl, action, control])} has failed; the source is still needed")


def main(argv: Optional[List[str]] = None) -> int:
    arguments = docopt.docopt(__doc__, argv)
    bgctl, control = shlex.split(arguments["--bgctl"]), arguments["CONTROL_SOCKET"]
    began = time.monotonic()
    try:
        check_proxy(bgctl, control)
        moved = move_machine(
            Path(arguments["SOURCE_QMP"]),
            Path(arguments["DESTINATION_QMP"]),
            arguments["URI"],
            keep_source=arguments["--keep-source"],
        )
        print(f"machine moved: it stood still for {moved.downtime:.3f} s, {moved.total:.3f} s in all", flush=True)
        move_disk(bgctl, control)
    except (GuestError, OSError) as error:
        print(f"migrate.py: {error}", file=sys.stderr)
        return 1
    print(f"disk moved: {time.monotonic() - began:.3f} s since the start; the source may be stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
