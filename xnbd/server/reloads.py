"""Reading the configuration again, in a master or a wrapper: all of it, or nothing changes."""

from __future__ import annotations

from contextlib import suppress
from typing import Callable, Generic, List, TypeVar

from ..errors import ConfigurationError
from ..logs import log
from ..system.service_manager import ServiceManager

T = TypeVar("T")


class Reloads(Generic[T]):
    """*read* reads and checks it, *adopt* puts it into use and returns what has changed, for people.

    Both raise `ConfigurationError` or `OSError` for what cannot be, *adopt* before it changes anything.
    """

    def __init__(self, read: Callable[[], T], adopt: Callable[[T], List[str]], manager: ServiceManager) -> None:
        self._read = read
        self._adopt = adopt
        self._manager = manager
        self.failure = ""
        """Why the last one has failed."""

    def reload(self) -> List[str]:
        """Returns and raises like *adopt*. Handshakes that begin after this has returned know the new one."""
        self._manager.reloading()
        try:
            changes = self._adopt(self._read())
        except (ConfigurationError, OSError) as error:
            self.failure = f"the last reload failed: {error}"
            log.error("the configuration stays as it was: %s", error)
            raise
        finally:
            self._manager.ready()
        self.failure = ""
        log.info("configuration read again: %s", ", ".join(changes) or "nothing has changed")
        return changes

    def on_hangup(self) -> None:
        """The same for SIGHUP, of which nobody waits for an answer."""
        with suppress(ConfigurationError, OSError):  # the log has them
            self.reload()
