"""What the operator can ask of a running wrapper, by its control socket (``xnbd-wrapper-ctl``).

A command yields lines for the operator, or None where it has to wait: the wrapper
goes on meanwhile. Requests and replies are described in ``xnbd-wrapper-ctl(8)``.
"""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional

from ..errors import CommandError, ConfigurationError
from ..logs import about, log
from ..proxy.state.known import known_size
from ..storage.target import usable_size
from ..system.sockets import is_listening
from .child_output import ChildOutput, check
from .children import Children
from .database import Database
from .exports import (
    ProxyExport,
    StoredExport,
    TargetExport,
    check_name,
    check_room,
    export_from_fields,
    fields_of,
    names_by_file,
)
from .proxy_steering import ProxySteering
from .servers import Servers

Message = Dict[str, Any]
Reply = Iterator[Optional[Message]]


class WrapperControls(NamedTuple):
    """What the wrapper lets commands do.

    *end* ends it, and leaves the servers alive if told so; it *has_ended* then. *reload* tells what has changed.
    *upgrade* has it become the next program. *limit* says how fast clients of an export may be.
    """

    end: Callable[[bool], None]
    has_ended: Callable[[], bool]
    count_clients: Callable[[], Mapping[str, int]]
    reload: Callable[[], List[str]]
    upgrade: Callable[[Message], Reply]
    limit: Callable[[Message], Reply]


class WrapperCommands:
    """The commands over *database*, those for proxies by *steering*."""

    def __init__(
        self,
        database: Database,
        children: Children,
        servers: Servers,
        steering: ProxySteering,
        controls: WrapperControls,
    ) -> None:
        self._database = database
        self._children = children
        self._servers = servers
        self._steering = steering
        self._controls = controls

    def table(self) -> Mapping[str, Callable[[Message], Reply]]:
        return {
            "list": self._list,
            "add-target": self._add,
            "add-proxy": self._add,
            "remove-by-exportname": self._remove_by_name,
            "remove-by-file": self._remove_by_file,
            "remove-by-index": self._remove_by_index,
            "bgctl-query": self._query,
            "bgctl-cache-all": self._cache_all,
            "bgctl-switch": self._switch,
            "bgctl-reconnect": self._reconnect,
            "save": self._save,
            "reload": self._reload,
            "upgrade": self._controls.upgrade,
            "limit": self._controls.limit,
            "orphan": self._orphan,
            "shutdown": self._shutdown,
        }

    # The exports

    def _list(self, request: Message) -> Reply:
        clients = self._controls.count_clients()
        for name, export in list(self._database.exports.items()):
            index = self._database.index_of(name)
            yield {"export": {"index": index, "name": name, **fields_of(export), "clients": clients.get(name, 0)}}

    def _add(self, request: Message) -> Reply:
        name = check_name(request.get("name"))
        fields = {key: value for key, value in request.items() if key not in ("command", "name")}
        export = export_from_fields({**fields, "mode": request["command"].rpartition("-")[2]})
        check_room(self._database.exports, name, export)
        self._check_origin(export)
        if isinstance(export, TargetExport):
            yield from self._check_disk(export.image_path)
            check_room(self._database.exports, name, export)  # somebody may have been quicker
        self._database.change({**self._database.exports, name: export})
        log.info("export %r added: %s", name, _summary(export), extra=about(export=name))

    def _check_origin(self, export: StoredExport) -> None:
        """Raises `CommandError` if the servers could not find it."""
        if isinstance(export, ProxyExport) and export.remote_uri and not self._servers.extended:
            raise CommandError(f"{self._servers.program} knows no URIs: it can only use an origin on TCP, without TLS")

    def _check_disk(self, path: str) -> Reply:
        """Look whether *path* is a disk, in a process of its own: the file may hang."""
        readonly = self._servers.readonly or self._servers.cow

        def open_it() -> None:
            try:
                os.stat(path)
            except OSError as error:
                raise CommandError(f"cannot use {path}: {error.strerror}") from error
            usable_size(path, readonly=readonly)

        child = ChildOutput(self._children, check(open_it))
        try:
            while child.status is None:
                yield None
            if child.status:
                raise CommandError(child.errors() or f"cannot use {path}")
        finally:
            child.forget()

    def _remove_by_name(self, request: Message) -> Reply:
        asked = str(request.get("name"))
        name = self._database.real_name(asked)
        if name is None:
            raise CommandError(f"there is no export {asked!r}")
        return self._remove([name])

    def _remove_by_index(self, request: Message) -> Reply:
        index = request.get("index")
        names = [name for name in self._database.exports if self._database.index_of(name) == index]
        if not names:
            raise CommandError(f"there is no export with the index {index}")
        return self._remove(names)

    def _remove_by_file(self, request: Message) -> Reply:
        path = request.get("image_path")
        if not isinstance(path, str):
            raise CommandError("image_path: expected the path of a disk or cache image")
        names = names_by_file(self._database.exports, path)
        if not names:
            raise CommandError(f"there is no export of {path}")
        return self._remove(names)

    def _remove(self, names: List[str]) -> Reply:
        exports = {name: export for name, export in self._database.exports.items() if name not in names}
        self._database.change(exports)
        clients = self._controls.count_clients()
        for name in names:
            log.info("export %r removed; clients that stay: %d", name, clients.get(name, 0), extra=about(export=name))
            yield {"removed": name}

    def _save(self, request: Message) -> Reply:
        self._database.change(self._database.exports)
        yield {"saved": self._database.path}

    def _reload(self, request: Message) -> Reply:
        changes = self._controls.reload()
        yield {"done": True, "changes": changes, "clients": sum(self._controls.count_clients().values())}

    # Proxies

    def _proxy(self, request: Message) -> ProxyExport:
        export = self._database.exports.get(str(request.get("name")))
        if export is None:
            raise CommandError(f"there is no export {request.get('name')!r}")
        if not isinstance(export, ProxyExport):
            raise CommandError(f"the export {request['name']!r} is a target: there is nothing to copy or to switch")
        return export

    def _query(self, request: Message) -> Reply:
        return self._steering.steer(self._proxy(request), ["--query"], stop_early=True)

    def _cache_all(self, request: Message) -> Reply:
        return self._steering.steer(self._proxy(request), ["--cache-all"], stop_early=True)

    def _switch(self, request: Message) -> Reply:
        name, export = request.get("name", ""), self._proxy(request)
        target = TargetExport(export.image_path)
        return self._steering.steer(export, ["--switch"], then=lambda: self._replace(name, export, target))

    def book_switch(self, name: str, image_path: str) -> None:
        """A proxy was made a target by ``xnbd-bgctl`` itself; unless the export is another one by now."""
        export = self._database.exports.get(name)
        if isinstance(export, ProxyExport) and export.image_path == image_path:
            try:
                self._replace(name, export, TargetExport(image_path))
            except ConfigurationError as error:
                log.error("%s", error)

    def _reconnect(self, request: Message) -> Reply:
        name, export = request.get("name", ""), self._proxy(request)
        kept = {key: value for key, value in fields_of(export).items() if not key.startswith("remote_")}
        origin = {key: value for key, value in request.items() if key.startswith("remote_")}
        new = export_from_fields({**kept, **origin})
        assert isinstance(new, ProxyExport)
        self._check_origin(new)
        if known_size(export.bitmap_path) is None and not is_listening(export.control_socket_path):
            # Nobody has served it yet; else its files know the former address, and have to hear of the new one.
            self._replace(name, export, new)
            yield {"output": f"{name} has never been used: its first server will use the new address\n"}
            return
        words = ["--exportname", new.remote_export_name] if new.remote_export_name else []
        options = [*words, "--reconnect"]
        yield from self._steering.steer(
            export, options, new.origin_words, then=lambda: self._replace(name, export, new)
        )

    def _replace(self, name: str, old: StoredExport, new: StoredExport) -> None:
        """Change an entry that is still what it was."""
        exports = self._database.exports
        if exports.get(name) != old:
            log.warning("export %r was changed or removed meanwhile and stays as it is", name, extra=about(export=name))
            return
        self._database.change({key: new if key == name else export for key, export in exports.items()})
        log.info("export %r is now: %s", name, _summary(new), extra=about(export=name))

    # The end

    def _orphan(self, request: Message) -> Reply:
        return self._end(orphan=True)

    def _shutdown(self, request: Message) -> Reply:
        return self._end(orphan=False)

    def _end(self, *, orphan: bool) -> Reply:
        self._controls.end(orphan)
        while not self._controls.has_ended():
            yield None


def _summary(export: StoredExport) -> str:
    return " ".join(filter(None, fields_of(export).values()))
