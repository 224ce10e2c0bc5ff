"""Moving a proxy to another origin, while its clients go on."""

from __future__ import annotations

import json
from functools import partial
from typing import Generator, Optional, Sequence

from ...control.requests import Message, text_argument
from ...control.server import CommandTable, Reply
from ...errors import CommandError, TaskFailed
from ...logs import log
from ...origin.address import members_of, parse_origin
from ...origin.base import OriginAddress, OriginLost
from ...origin.probe import Found, probe_each
from ...proxy.origin_link import contradiction
from ...proxy.state.format import Steering
from ...scoreboard.layout import TARGET
from ...system.process import set_title
from .command_lock import CommandLock
from .duty import Cache, Context, Duty


class Moving(Duty):
    """Notes the address that an operator gives, if there is a disk of the right size."""

    def __init__(self, context: Context, cache: Cache, lock: CommandLock) -> None:
        self._scoreboard = context.scoreboard
        self._children = context.children
        self._source = cache.source
        self._lock = lock

    def commands(self) -> CommandTable:
        return {"reconnect": self._reconnect}

    def _reconnect(self, request: Message) -> Reply:
        name = text_argument(request, "exportname")
        uri = text_argument(request, "uri")
        if self._scoreboard.mode == TARGET:
            raise CommandError("this is a plain target: it has no origin any more")
        if uri is not None:
            address = parse_origin(uri, None, name)
        else:
            address = parse_origin(text_argument(request, "host") or "", text_argument(request, "port"), name)
        found = yield from self._ask_what_is_there(address)
        self._check(address, found)
        yield from self._lock.acquire("reconnect")
        try:
            self._reconnect_now(address, found)
        finally:
            self._lock.release()
        self._scoreboard.lines.wake_all()
        log.info("the origin is %s now", address)
        yield {"done": True, "address": str(address)}

    def _check(self, address: OriginAddress, found: Sequence[Optional[Found]]) -> None:
        """Raises `CommandError` unless all that was *found* is the disk."""
        there = [(place, what) for place, what in zip(members_of(address), found) if what is not None]
        for number, (place, what) in enumerate(there):
            if what.size != self._source.size:
                reason = f"has {what.size} bytes, not {self._source.size}"
                raise CommandError(f"the disk at {place} {reason}; nothing was changed")
            for other, theirs in there[:number]:
                reason = contradiction(place, what.version, other, theirs.version)
                if reason:
                    raise CommandError(f"origin {place}: {reason}; nothing was changed")

    def _reconnect_now(self, address: OriginAddress, found: Sequence[Optional[Found]]) -> None:
        """Raises `CommandError`, and then nothing was changed."""
        if self._scoreboard.mode == TARGET:
            raise CommandError("this is a plain target by now: it has no origin any more")
        try:
            for place, what in zip(members_of(address), found):
                version = "" if what is None else what.version
                noted = self._source.agree_on_version(place, version)
                if noted != version:
                    raise CommandError(f"the disk at {place} was {noted} and is {version} now; nothing was changed")
            self._source.steer(Steering(switched=False, address=str(address)))
        except ValueError as error:
            raise CommandError(str(error)) from error
        except OSError as error:
            raise CommandError(f"the address cannot be noted: {error.strerror}; nothing was changed") from error
        self._scoreboard.origin.bytes_before = self._scoreboard.lines.origin_bytes()
        self._scoreboard.origin.address = str(address)

    def _ask_what_is_there(
        self, address: OriginAddress
    ) -> Generator[Optional[Message], None, Sequence[Optional[Found]]]:
        """What the places at *address* have, asked by a child: an origin or a name server may take its time.

        Of several all but one may be away: None.
        """
        child = self._children.start(partial(_ask, address, self._source.patience.connect))
        try:
            while not child.is_done():
                yield None
        finally:
            child.stop()
            child.wait()
        if child.status:
            raise CommandError(f"{child.message or 'the process that asked it was stopped'}; nothing was changed")
        return [None if found is None else Found(*found) for found in json.loads(child.message)]


def _ask(address: OriginAddress, timeout: float) -> str:
    """The work of the child: what was found at each place, as JSON. Raises `TaskFailed`."""
    set_title("asking", str(address))
    places = members_of(address)
    outcomes = probe_each(places, timeout=timeout)
    found = [outcome if isinstance(outcome, Found) else None for outcome in outcomes]
    for place, outcome in zip(places, outcomes):
        if not isinstance(outcome, Found):
            text = outcome if isinstance(outcome, OriginLost) else f"origin {place}: {outcome.strerror}"
            if not any(found):
                raise TaskFailed(str(text))
            log.warning("%s; the others are asked", text)
    return json.dumps(found)
