#!/usr/bin/env python3
"""A TCP relay that behaves like a long, slow or broken link, for the benchmark and for tests.

Usage:
  wanrelay.py [--delay MS] [--rate MBITS] [--control] PORT TARGET_HOST TARGET_PORT
  wanrelay.py --help

Options:
  --delay MS     Hold back what is sent for this long, each way: a round trip
                 takes twice that longer (0).
  --rate MBITS   Megabits per second each way, which all connections share
                 (0: no limit).
  --control      Read commands from standard input, and end with it.
  -h, --help     Show this text.

Listens on 127.0.0.1; PORT 0 is a free one. Prints "listening on PORT" when it is ready.

Commands are lines; each is answered with one line once it is carried out:
  stall             move no byte any more, accept nobody; connections stay open
  resume            go on after stall
  cut               reset all connections; new ones are accepted
  cut-after COUNT   the same when COUNT more bytes have come back from the target
  refuse            listen no more
  accept            listen again after refuse
  target PORT       connect to this port from now on
  bytes             answers "ok" and the bytes moved to the target and back
The answer is "ok" or "error" and what is wrong.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
import time
from collections import deque
from typing import Callable, Deque, Dict, List, NamedTuple, Optional, Tuple

import docopt

_CHUNK = 128 << 10
_MOST_HELD = 64 << 20
"""Bytes that one way of a connection holds at most; any more stay with the sender."""

_QUEUE_TIME = 0.05
"""Seconds of data that wait for a link with a limited rate: what its router would buffer."""

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: on, 0 s."""

_FOREVER = float("inf")


class Direction:
    """One way of the link, which all connections share; delay in seconds, rate in bytes per second (0: no limit)."""

    def __init__(self, delay: float, rate: float) -> None:
        self.moved = 0
        self.most: Optional[int] = None
        """How many bytes may still move before the link breaks."""
        self._delay = delay
        self._rate = rate
        self._free_at = 0.0

    def takes_from(self) -> float:
        """When it takes more: a link that lags behind leaves the rest to its senders."""
        return self._free_at - _QUEUE_TIME

    def arrival(self, now: float, length: int) -> float:
        """When the last of *length* bytes that are sent now will have come out at the other end."""
        if self._rate:
            self._free_at = max(self._free_at, now) + length / self._rate
            now = self._free_at
        return now + self._delay

    def count(self, length: int) -> None:
        self.moved += length
        if self.most is not None:
            self.most -= length


class Lane:
    """One way of one connection: what was received waits in a queue until it is due."""

    def __init__(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        self.source = source
        self.sink = sink
        self.finished = False
        self._direction = direction
        self._queue: Deque[Tuple[float, memoryview]] = deque()
        self._held = 0
        self._at_end = False

    def takes_from(self) -> float:
        """When it wants more from the source."""
        return _FOREVER if self._at_end or self._held >= _MOST_HELD else self._direction.takes_from()

    def gives_from(self) -> float:
        """When it has something for the sink."""
        return self._queue[0][0] if self._queue else _FOREVER

    def take(self, now: float) -> None:
        """Receive once; raises OSError when the connection is broken."""
        data = self.source.recv(_CHUNK)
        if not data:
            self._at_end = True  # travels as far as data does
        self._queue.append((self._direction.arrival(now, len(data)), memoryview(data)))
        self._held += len(data)

    def give(self, now: float) -> None:
        """Send what is due, as far as the sink takes it; raises OSError when the connection is broken."""
        direction = self._direction
        while self._queue and self._queue[0][0] <= now:
            due, data = self._queue.popleft()
            if not data:
                self.sink.shutdown(socket.SHUT_WR)
                self.finished = True
                return
            sent = self.sink.send(data[: direction.most])
            direction.count(sent)
            self._held -= sent
            if sent < len(data):
                self._queue.appendleft((due, data[sent:]))
                return


class Connection(NamedTuple):
    """A client's socket, the one to the target, and the two ways between them."""

    client: socket.socket
    target: socket.socket
    lanes: List[Lane]

    def reset(self) -> None:
        for sock in (self.client, self.target):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sock.close()

    def is_finished(self) -> bool:
        return all(lane.finished for lane in self.lanes)

    def close(self) -> None:
        self.client.close()
        self.target.close()


class Relay:
    """The link and everything on it."""

    def __init__(self, port: int, target: Tuple[str, int], delay: float, rate: float) -> None:
        self._there = Direction(delay, rate)
        self._back = Direction(delay, rate)
        self._connections: List[Connection] = []
        self._target = target
        self._stalled = False
        self._listener: Optional[socket.socket] = _listen(port)
        self.port: int = self._listener.getsockname()[1]
        self._commands: Dict[str, Callable[..., Optional[str]]] = {
            "stall": self._stall,
            "resume": self._resume,
            "cut": self._cut,
            "cut-after": self._cut_after,
            "refuse": self._refuse,
            "accept": self._accept_again,
            "target": self._retarget,
            "bytes": self._bytes,
        }

    def serve(self, control: Optional[Control]) -> None:
        """Move bytes until *control*, if there is one, comes to its end."""
        while True:
            now = time.monotonic()
            lanes = [] if self._stalled else [lane for one in self._connections for lane in one.lanes]
            takes, gives = [(lane.takes_from(), lane) for lane in lanes], [(lane.gives_from(), lane) for lane in lanes]
            reading = {lane.source: lane for when, lane in takes if when <= now}
            writing = {lane.sink: lane for when, lane in gives if when <= now}
            later = min((when for when, _ in takes + gives if now < when < _FOREVER), default=None)
            others = [one for one in (control, None if self._stalled else self._listener) if one]
            # select() waits with microseconds; poll() and epoll know milliseconds only.
            readable, writable, _ = select.select(
                [*others, *reading], list(writing), [], None if later is None else later - now
            )
            self._move([reading[s] for s in readable if s in reading], [writing[s] for s in writable])
            if self._listener in readable:
                self._accept()
            if control in readable and control and not control.obey(self.obey):
                return

    def obey(self, line: str) -> str:
        """Carry out one command; what to answer."""
        name, *arguments = line.split() or [""]
        command = self._commands.get(name)
        if command is None:
            return f"error there is no command {name!r}"
        try:
            return " ".join(["ok", command(*arguments) or ""]).rstrip()
        except (TypeError, ValueError, OSError) as error:
            return f"error {name}: {error}"

    def _move(self, taking: List[Lane], giving: List[Lane]) -> None:
        broken = set()
        for lanes, act in ((taking, Lane.take), (giving, Lane.give)):
            for lane in lanes:
                try:
                    act(lane, time.monotonic())
                except BlockingIOError:
                    pass
                except OSError:
                    broken.add(lane)
        if self._back.most == 0:
            self._back.most = None
            self._cut()
        for one in self._connections[:]:
            if broken.intersection(one.lanes):
                one.reset()
            elif one.is_finished():
                one.close()
            else:
                continue
            self._connections.remove(one)

    def _accept(self) -> None:
        assert self._listener
        client, _ = self._listener.accept()
        target = socket.socket()
        for sock in (client, target):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lanes = [Lane(client, target, self._there), Lane(target, client, self._back)]
        one = Connection(client, target, lanes)
        self._connections.append(one)
        try:
            target.connect(self._target)
        except BlockingIOError:
            pass  # a failure shows when it is read from
        except OSError:
            one.reset()
            self._connections.remove(one)

    def _stall(self) -> None:
        self._stalled = True

    def _resume(self) -> None:
        self._stalled = False

    def _cut(self) -> None:
        while self._connections:
            self._connections.pop().reset()

    def _cut_after(self, count: str) -> None:
        if int(count) < 1:
            raise ValueError("COUNT must be at least 1")
        self._back.most = int(count)

    def _refuse(self) -> None:
        if self._listener:
            self._listener.close()
            self._listener = None

    def _accept_again(self) -> None:
        if not self._listener:
            self._listener = _listen(self.port)

    def _retarget(self, port: str) -> None:
        self._target = (self._target[0], int(port))

    def _bytes(self) -> str:
        return f"{self._there.moved} {self._back.moved}"


class Control:
    """Commands on standard input, answers on standard output."""

    def __init__(self) -> None:
        self._rest = b""

    def fileno(self) -> int:
        return 0

    def obey(self, answer: Callable[[str], str]) -> bool:
        """Read what has come and *answer* each whole line; False at the end of the input."""
        data = os.read(0, 4096)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            print(answer(line.decode(errors="replace")), flush=True)
        return bool(data)


def _listen(port: int) -> socket.socket:
    """A listening socket, also on a *port* whose last connections are not quite over."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(128)
    listener.setblocking(False)
    return listener


def _start(arguments: Dict[str, str]) -> Relay:
    """Raises ValueError or OSError that say what is wrong with the command line."""
    delay, rate = float(arguments["--delay"] or 0), float(arguments["--rate"] or 0)
    port, target_port = int(arguments["PORT"]), int(arguments["TARGET_PORT"])
    if not (0 <= delay < _FOREVER and 0 <= rate < _FOREVER):
        raise ValueError("--delay and --rate cannot be negative")
    if not (0 <= port < 65536 and 0 < target_port < 65536):
        raise ValueError("a port is a number below 65536")
    host = socket.gethostbyname(arguments["TARGET_HOST"])
    return Relay(port, (host, target_port), delay / 1e3, rate * 1e6 / 8)


def main() -> int:
    try:
        arguments = docopt.docopt(__doc__)
    except docopt.DocoptExit as error:
        print(error, file=sys.stderr)
        return 2
    try:
        relay = _start(arguments)
    except (ValueError, OSError) as error:
        print(f"wanrelay.py: {error}", file=sys.stderr)
        return 1
    try:
        print(f"listening on {relay.port}", flush=True)
        relay.serve(Control() if arguments["--control"] else None)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
