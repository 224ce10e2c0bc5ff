"""What the wrapper can serve: names, and what stands behind them.

Pure: nothing here opens a file or asks an origin.
"""

from __future__ import annotations

import os
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Type, Union

from ..errors import ConfigurationError
from ..origin.address import is_uri, parse_origin
from ..origin.base import OriginAddress
from ..origin.nbd.address import NbdAddress
from ..protocol.constants import MAXIMUM_STRING


class TargetExport(NamedTuple):
    """A disk image on this computer."""

    image_path: str

    @property
    def mode(self) -> str:
        return "target"


class ProxyExport(NamedTuple):
    """The disk of another server, cached here; *remote_export_name* is empty for that server's default.

    Where that server listens on a Unix socket or speaks TLS there is a *remote_uri*, and the
    other three are empty.
    """

    image_path: str
    bitmap_path: str
    control_socket_path: str
    remote_host: str
    remote_port: str
    remote_export_name: str = ""
    remote_uri: str = ""

    @property
    def mode(self) -> str:
        return "proxy"

    @property
    def origin(self) -> OriginAddress:
        if self.remote_uri:
            return parse_origin(self.remote_uri)
        return parse_origin(self.remote_host, self.remote_port, self.remote_export_name or None)

    @property
    def origin_words(self) -> List[str]:
        """Where the origin is, as our programs take it: host and port, or a URI. The export's name is extra.

        Several URIs with blanks between them are one word.
        """
        return [self.remote_uri] if self.remote_uri else [self.remote_host, self.remote_port]


StoredExport = Union[TargetExport, ProxyExport]
_KINDS: Dict[str, Type[StoredExport]] = {"target": TargetExport, "proxy": ProxyExport}
_PATHS = ("image_path", "bitmap_path", "control_socket_path")
_HOST_AND_NAME = ("remote_host", "remote_port", "remote_export_name")


def export_from_fields(fields: Dict[str, Any]) -> StoredExport:
    """The export that *fields*, an entry of the database, describes; raises `ConfigurationError`."""
    kind = _KINDS.get(fields["mode"]) if isinstance(fields.get("mode"), str) else None
    if kind is None:
        raise ConfigurationError('"mode" is neither "target" nor "proxy"')
    values = {name: value for name, value in fields.items() if name != "mode"}
    if isinstance(values.get("remote_port"), int) and not isinstance(values["remote_port"], bool):
        values["remote_port"] = str(values["remote_port"])
    if "remote_export_name" in values and values["remote_export_name"] is None:
        values["remote_export_name"] = ""
    for name, value in values.items():
        if name not in kind._fields:
            raise ConfigurationError(f"there is no field {name!r} in the mode {fields['mode']}")
        if not isinstance(value, str) or "\0" in value:
            raise ConfigurationError(f"{name!r} is no text")
    if "remote_uri" in values:
        values.update(_fields_of_uri(values))
    for name in kind._fields:
        if name not in values and name not in kind._field_defaults:
            raise ConfigurationError(f"{name!r} is missing")
    return _checked(kind(**values))


def _fields_of_uri(values: Dict[str, str]) -> Dict[str, str]:
    """A URI, with an export's name beside it perhaps, taken apart as far as that is possible."""
    uri, name = values["remote_uri"], values.get("remote_export_name")
    if "remote_host" in values or "remote_port" in values:
        raise ConfigurationError("'remote_uri' stands in place of 'remote_host' and 'remote_port'")
    if not is_uri(uri):
        raise ConfigurationError(f"{uri}: expected an NBD URI like nbd+unix:///name?socket=PATH")
    address = parse_origin(uri, None, name or None)
    if not isinstance(address, NbdAddress) or address.unix_path or address.encryption:
        return {**dict.fromkeys(_HOST_AND_NAME, ""), "remote_uri": str(address)}
    remote = (address.host, str(address.port), address.export_name)
    return {**dict(zip(_HOST_AND_NAME, remote)), "remote_uri": ""}


def _checked(export: StoredExport) -> StoredExport:
    for name, path in paths_of(export).items():
        if not os.path.isabs(path):
            raise ConfigurationError(f"{name} {path!r} is no absolute path")
    if isinstance(export, ProxyExport):
        if len(set(paths_of(export).values())) != len(_PATHS):
            raise ConfigurationError("cache, bitmap and control socket have to be three different files")
        if is_uri(export.remote_host):
            raise ConfigurationError(f"{export.remote_host}: a host's name or address is wanted here, not a URI")
        str(export.origin)
    return export


def fields_of(export: StoredExport) -> Dict[str, Optional[str]]:
    """The entry of the database for *export*; None stands for the origin's default export, as in the C xNBD's."""
    fields: Dict[str, Optional[str]] = {"mode": export.mode, **export._asdict()}
    if isinstance(export, ProxyExport):
        for name in _HOST_AND_NAME if export.remote_uri else ["remote_uri"]:
            del fields[name]
        if fields.get("remote_export_name") == "":
            fields["remote_export_name"] = None
    return fields


def split_fields(fields: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """An entry of the database: what its mode has, with whole paths, and what is not known.

    Relative paths are those of the working directory, as for the C xNBD. Raises
    `ConfigurationError` if there is none.
    """
    kind = _KINDS.get(fields["mode"]) if isinstance(fields.get("mode"), str) else None
    known, unknown = {}, {}
    for name, value in fields.items():
        if kind is not None and name not in kind._fields and name != "mode":
            unknown[name] = value
            continue
        known[name] = value
        if name in _PATHS and isinstance(value, str) and value and "\0" not in value and not os.path.isabs(value):
            known[name] = _whole_path(name, value)
    return known, unknown


def _whole_path(field: str, path: str) -> str:
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise ConfigurationError(f"{field} {path!r} is relative, and the working directory is gone") from None


def paths_of(export: StoredExport) -> Dict[str, str]:
    return {name: path for name, path in export._asdict().items() if name in _PATHS}


def check_name(name: object) -> str:
    """*name*, if clients can ask for it. Raises `ConfigurationError`."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ConfigurationError(f"an export's name has at least one character and no NUL: {name!r}")
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"export name {name!r} is not UTF-8") from None
    if len(encoded) > MAXIMUM_STRING:
        raise ConfigurationError(f"an export's name has at most {MAXIMUM_STRING} bytes, this one {len(encoded)}")
    return name


def find_export(exports: Mapping[str, StoredExport], aliases: Mapping[str, StoredExport], name: str) -> Optional[str]:
    """The name in *exports* of what is asked for as *name*, which may be one of *aliases*; the own names go first."""
    if name in exports:
        return name
    wanted = aliases.get(name)
    if wanted is None:
        return None
    return next((real for real, export in exports.items() if export == wanted), None)


def check_room(exports: Dict[str, StoredExport], name: str, new: StoredExport) -> None:
    """Raises `ConfigurationError` if *new* cannot be added to *exports* as *name*.

    Targets may share an image; nothing else shares a file, because a proxy's three
    belong together.
    """
    if name in exports:
        raise ConfigurationError(f"there is an export {name!r} already: remove it first, or choose another name")
    wanted = set(paths_of(new).values())
    for other, export in exports.items():
        if export.mode == new.mode == "target":
            continue
        for path in wanted.intersection(paths_of(export).values()):
            raise ConfigurationError(f"{path} is in use by the export {other!r}")


def names_by_file(exports: Dict[str, StoredExport], path: str) -> List[str]:
    """The exports whose disk or cache image is the file *path*."""
    return [name for name, export in exports.items() if export.image_path == path]
