"""What the steering programs print of an upgrade."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

from ..control.client import Message, shown
from ..errors import ConfigurationError
from ..text import counted


@contextmanager
def refusal_by_older(what: str) -> Iterator[None]:
    """A *what* that does not know the command is told of in words that help."""
    try:
        yield
    except ConfigurationError as error:
        if str(error).startswith("there is no command"):
            raise ConfigurationError(f"the {what} is of a version that cannot be upgraded: restart it") from None
        raise


def upgraded(answer: Message) -> str:
    """The line for the outcome of an upgrade, or of a check of one. Raises `KeyError`."""
    if "clients" in answer:
        change = shown(f"{answer['from']} -> {answer['to']}")
        return f"{change} is possible, with {counted(answer['clients'], 'client')}; nothing was changed\n"
    from ..server.upgrade.outcome import Outcome

    return f"{shown(Outcome.parse(answer))}\n"
