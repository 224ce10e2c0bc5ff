"""One process's own line: its way through the gate, and what it tells of itself."""

from __future__ import annotations

import mmap
import os
from typing import List, NamedTuple, Optional, Sequence, Tuple

from ..system.file_locks import RangeLocks
from .counters import Counts, wrapped
from .gate import Door
from .layout import HEAD, LINE, NOT_NEEDED, ORIGINS, REACHED, TROUBLE, UNREACHABLE, put
from .lines import Lines, clock
from .tally import Tally

_MODE_AT = LINE.at["mode"]
_COUNTERS_AT, _COUNTERS = LINE.at["counters"], LINE.form["counters"]
_pack_counters = _COUNTERS.pack
_LETTINGS = slice(HEAD.at["lettings"], HEAD.at["lettings"] + HEAD.form["lettings"].size)


COPYING_PEER = "(copying all blocks)"
"""Stands in a line in place of a client. What begins with a parenthesis is none."""


class Visit(NamedTuple):
    """A client's time at a server, whichever of its processes served it: *since* when (as of `clock`); what it did."""

    since: float
    counts: Counts


class Place(Door):
    """The line that this process has taken of *lines*. Begins outside the gate, without a client.

    What it tells, the *tally* is told, too.
    """

    def __init__(self, memory: mmap.mmap, locks: RangeLocks, lines: Lines, tally: Optional[Tally] = None) -> None:
        self.tally = tally
        self._at = at = lines.take()
        super().__init__(memory, at, locks)
        self._counters = slice(at + _COUNTERS_AT, at + _COUNTERS_AT + _COUNTERS.size)
        self.counts: List[int] = list(_COUNTERS.unpack_from(memory, at + _COUNTERS_AT))
        """What `tell` publishes; goes on from what an earlier process in this line has counted."""
        if tally is not None:
            tally.begin(self.counts)
        self.holding = False
        """Whether it is told that this process holds replies which point into the cache (`scoreboard.holders`)."""
        self._spell = int.from_bytes(os.urandom(3), "little")  # not that of a dead process in this line
        self._put("holding", 0)
        self._put("coming", 0)
        self.tell_origin(NOT_NEEDED, "")
        self._put("origins", *[0] * (2 * ORIGINS))
        self._sent = list(LINE.form["origin_bytes"].unpack_from(memory, at + LINE.at["origin_bytes"]))
        self.welcome("")
        lines.tell_name(at)

    def welcome(self, peer: str, visit: Optional[Visit] = None) -> None:
        """The client is *peer* from now on; empty for none. It goes on with a *visit* that began at another process.

        As long as what is told is partly of the client before, nobody is named: see `Lines.living`.
        """
        self._put("peer", b"")
        self.tell()
        self.visit_began = clock() if visit is None else visit.since
        before = Counts(self.counts) if visit is None else Counts(self.counts).minus(visit.counts)
        self._before = wrapped(before)
        self._put("since", self.visit_began)
        self._put("counters_before", *self._before)
        self.tell_queue(0, 0)
        self.tell_identity("")
        if self.tally is not None:
            self.tally.tell("clients", int(bool(peer) and not peer.startswith("(")))
        self._put("peer", peer.encode()[: LINE.form["peer"].size])

    def tell_identity(self, identity: str, encryption: str = "") -> None:
        """Who the client has proved to be, and how it is encrypted; empty for nobody, and for not at all."""
        self._put("encryption", encryption.encode()[: LINE.form["encryption"].size])
        self._put("identity", identity.encode("utf-8", "backslashreplace")[: LINE.form["identity"].size])

    @property
    def visit(self) -> Visit:
        """What there is to tell of the client's time here."""
        return Visit(self.visit_began, wrapped(Counts(self.counts).minus(self._before)))

    def tell(self) -> None:
        """Publish `counts`."""
        if self.tally is not None:
            self.tally.follow(self.counts)
        self._map[self._counters] = _pack_counters(*self.counts)

    @property
    def lettings(self) -> bytes:
        """Another number whenever who holds such replies has to copy them."""
        return self._map[_LETTINGS]

    def tell_holding(self, holds: bool) -> None:
        """This process holds such replies, or none any more."""
        if holds != self.holding:
            self.holding = holds
            self._spell = self._spell % 0xFFFFFFFF + 1
            self._put("holding", self._spell if holds else 0)

    def tell_coming(self, blocks: int) -> None:
        """So many clean blocks are counted as come (`scoreboard.room`) and are still on their way."""
        self._put("coming", blocks)

    def tell_mode(self, mode: int) -> None:
        """This process works in *mode* now."""
        self._map[self._at + _MODE_AT] = mode

    def tell_queue(self, requests: int, buffered: int) -> None:
        """So many requests wait for blocks, with so many bytes."""
        self._put("queue", requests, buffered)
        if self.tally is not None:
            self.tally.tell("waiting", requests)
            self.tally.tell("waiting_bytes", buffered)

    def tell_origin(self, health: int, trouble: str) -> None:
        """*health* is `layout.REACHED` or its like; *trouble* why the origin cannot be reached."""
        self._put("origin", health)
        if self.tally is not None:
            self.tally.tell("origin_connected", int(health == REACHED))
            self.tally.tell("origin_unreachable", int(health == UNREACHABLE))
        self._put("trouble", _fitted(trouble))

    def tell_origins(self, standings: Sequence[Tuple[int, float, int, str]]) -> None:
        """How several origins are (`Background.news`); what they have sent is added to what they had."""
        figures = [0] * (2 * ORIGINS)
        for number, (health, latency, sent, trouble) in enumerate(standings):
            figures[2 * number : 2 * number + 2] = health, min(int(latency * 1e6), 0xFFFFFFFF)
            self._sent[number] += sent
            if trouble:
                at = HEAD.at["origin_troubles"] + number * TROUBLE
                self._map[at : at + TROUBLE] = _fitted(trouble).ljust(TROUBLE, b"\0")
        self._put("origins", *figures)
        self._put("origin_bytes", *self._sent)

    def _put(self, name: str, *values: object) -> None:
        put(self._map, self._at + LINE.at[name], LINE.form[name], *values)


def _fitted(trouble: str) -> bytes:
    """The text of *trouble* as it fits into a field; dots show that it was longer."""
    text = trouble.encode("utf-8", "backslashreplace")
    return text if len(text) <= TROUBLE else text[: TROUBLE - 3] + b"..."
