"""The exports on disk: a JSON file, locked while a wrapper runs, replaced at every change.

What cannot be understood is refused, whole, and never written over. The file is
``{"version": 2, "images": {NAME: {"mode": ..., ...}}}``; members beyond those are
kept as they are.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import stat
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from ..errors import ConfigurationError
from ..logs import about, log
from ..making import give, is_at, make_afresh
from ..storage import space
from ..system.kept import Kept
from ..text import is_writable
from .exports import StoredExport, check_name, export_from_fields, fields_of, find_export, split_fields

VERSION = 2
_LARGEST = 64 << 20
_READ = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Unknown(NamedTuple):
    """Members of a database that this program does not know: beside the images, and by an export's name in it."""

    beside: Mapping[str, Any]
    within: Mapping[str, Mapping[str, Any]]


_NOTHING = Unknown({}, {})


def pack_database(exports: Dict[str, StoredExport], unknown: Unknown = _NOTHING) -> bytes:
    images = {name: {**fields_of(export), **unknown.within.get(name, {})} for name, export in exports.items()}
    return json.dumps({"version": VERSION, "images": images, **unknown.beside}, indent=2).encode() + b"\n"


def parse_database(data: bytes) -> Dict[str, StoredExport]:
    """The exports in *data*; raises `ConfigurationError` unless all of it makes sense."""
    return parse_all(data)[0]


def parse_all(data: bytes) -> Tuple[Dict[str, StoredExport], Unknown]:
    """The exports in *data*, and what it has besides; raises `ConfigurationError` unless all of it makes sense."""
    try:
        content = json.loads(data.decode(), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"it is no complete JSON ({_one_line(error)})") from None
    if not is_writable(json.dumps(content, ensure_ascii=False)):
        raise ConfigurationError("half of a UTF-16 pair stands alone in it, which no name or path can have")
    if not isinstance(content, dict) or type(content.get("version")) is not int:
        raise ConfigurationError("it has no version")
    if content["version"] != VERSION:
        raise ConfigurationError(f"it is of version {content['version']}, and this program knows version {VERSION}")
    images = content.pop("images", {})
    if not isinstance(images, dict):
        raise ConfigurationError('its "images" are no JSON object')
    entries = {check_name(name): _parse_entry(name, fields) for name, fields in images.items()}
    exports = {name: export for name, (export, _) in entries.items()}
    del content["version"]
    return exports, Unknown(content, {name: rest for name, (_, rest) in entries.items() if rest})


def _parse_entry(name: str, fields: object) -> Tuple[StoredExport, Dict[str, Any]]:
    """An export, and the fields of its entry that are not known."""
    if not isinstance(fields, dict):
        raise ConfigurationError(f"the entry of {name!r} is no JSON object")
    try:
        known, unknown = split_fields(fields)
        return export_from_fields(known), unknown
    except ConfigurationError as error:
        raise ConfigurationError(f"the entry of {name!r}: {error}") from error


def _without_repetition(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class Database:
    """The exports of the wrapper that holds the file at *path*.

    ``exports`` is what the file says; it is changed by `change` only. ``aliases``
    are further names, not in the file, of what they stand for: see `find_export`.
    """

    def __init__(self, path: str) -> None:
        """Open or make the file and lock it. Raises `ConfigurationError`."""
        self.path = path
        self.aliases: Dict[str, StoredExport] = {}
        self._indexes: Dict[str, int] = {}
        self._last_index = 0
        self._generation_fd = os.memfd_create("xnbd-database")  # shared with the processes forked later
        os.ftruncate(self._generation_fd, mmap.PAGESIZE)
        self._generation = mmap.mmap(self._generation_fd, mmap.PAGESIZE)
        try:
            self._fd = self._open()
            self.exports, self._unknown = parse_all(_read_all(self._fd))
        except OSError as error:
            raise ConfigurationError(f"cannot use database {path}: {_reason(error)}") from error
        except ConfigurationError as error:
            raise ConfigurationError(
                f"database {path} is left alone: {error}; repair it, move it away, or choose another --dbpath"
            ) from error
        self._known = _identity(os.fstat(self._fd))
        self._seen = self._read_generation()
        self._number()
        self._tell_unknown()

    def pack(self, kept: Kept) -> Dict[str, Any]:
        """For the next program of this process. The lock ends when the process closes any descriptor of the file."""
        return {
            "path": self.path,
            "fd": kept(self._fd),
            "known": self._known,
            "content": pack_database(self.exports, self._unknown).decode(),
            "indexes": self._indexes,
            "last_index": self._last_index,
            "generation": kept(self._generation_fd),
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> Database:
        """That of the program before."""
        database = cls.__new__(cls)
        database.path, database.aliases = packed["path"], {}
        database._indexes, database._last_index = packed["indexes"], packed["last_index"]
        database._fd, database._known = packed["fd"], tuple(packed["known"])
        database.exports, database._unknown = parse_all(packed["content"].encode())
        database._generation_fd = packed["generation"]
        database._generation = mmap.mmap(database._generation_fd, mmap.PAGESIZE)
        database._seen = database._read_generation()
        return database

    def change(self, exports: Dict[str, StoredExport]) -> None:
        """Make *exports* the content, on disk first. Raises `ConfigurationError`, then nothing has changed."""
        try:
            self._refuse_foreign_changes()
            fd = self._write_new(pack_database(exports, self._unknown))
        except OSError as error:
            raise ConfigurationError(f"cannot write database {self.path}: {_reason(error)}") from error
        os.close(self._fd)
        self._fd, self._known, self.exports = fd, _identity(os.fstat(fd)), exports
        self._unknown = Unknown(
            self._unknown.beside, {name: rest for name, rest in self._unknown.within.items() if name in exports}
        )
        self._number()
        self._seen += 1
        self._generation[:8] = self._seen.to_bytes(8, "little")

    def current(self) -> Dict[str, StoredExport]:
        """The exports as they are now, for a process that was forked from the wrapper some time ago.

        Raises `ConfigurationError` if they cannot be read.
        """
        generation = self._read_generation()
        if generation != self._seen:
            try:
                with open(self.path, "rb") as file:
                    self.exports = parse_database(file.read())
            except OSError as error:
                raise ConfigurationError(f"cannot read database {self.path}: {error.strerror}") from error
            self._seen = generation
        return self.exports

    def index_of(self, name: str) -> int:
        """The number of the export *name*, which it has from its coming on and nobody gets after it."""
        return self._indexes[name]

    def name_of(self, export: StoredExport) -> str:
        """The first name of *export*; empty if it was removed."""
        return next((name for name, other in self.exports.items() if other == export), "")

    def real_name(self, name: str) -> Optional[str]:
        """The name in ``exports`` of what an operator or a client calls *name*."""
        return find_export(self.exports, self.aliases, name)

    def _number(self) -> None:
        for name in self.exports:
            if name not in self._indexes:
                self._last_index += 1
                self._indexes[name] = self._last_index
        self._indexes = {name: index for name, index in self._indexes.items() if name in self.exports}

    def _tell_unknown(self) -> None:
        """A field that is not known may be one that was mistyped."""
        places = {f"export {name!r}": rest for name, rest in self._unknown.within.items()}
        for place, rest in {"file": self._unknown.beside, **places}.items():
            if rest:
                log.warning("database %s: the %s has what is not known, and keeps it: %s", self.path, place, list(rest))

    def close(self) -> None:
        """Let the next wrapper have it."""
        os.close(self._fd)
        os.close(self._generation_fd)

    def _read_generation(self) -> int:
        return int.from_bytes(self._generation[:8], "little")

    def _open(self) -> int:
        """A descriptor of the file, locked and for sure the one that stands at the path."""
        while True:
            try:
                fd = os.open(self.path, _READ)
            except FileNotFoundError:
                self._create()
                continue
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise OSError(errno.EINVAL, "it is no regular file")
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_at(self.path, fd):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _create(self) -> None:
        """An empty database, unless somebody else is quicker."""
        directory = os.path.dirname(self.path)
        if not os.path.isdir(directory):
            _make_directory(directory)
        temporary = f"{self.path}.{os.getpid()}.new"
        fd = make_afresh(temporary)
        try:
            _write_all(fd, pack_database({}))
            os.fsync(fd)
            os.link(temporary, self.path)
        except FileExistsError:
            pass
        finally:
            os.close(fd)
            os.unlink(temporary)
        _sync_directory(directory)

    def _refuse_foreign_changes(self) -> None:
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return
        if _identity(found) != self._known:
            raise ConfigurationError(
                f"database {self.path} was changed by somebody else and is left alone: restart the wrapper to read it"
            )

    def _write_new(self, data: bytes) -> int:
        """Replace the file; a descriptor of the new one, which is locked before anybody can see it."""
        temporary = f"{self.path}.new"
        fd = make_afresh(temporary)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(fd, stat.S_IMODE(os.fstat(self._fd).st_mode))
            _write_all(fd, data)
            os.fsync(fd)
            os.rename(temporary, self.path)
        except BaseException:
            os.close(fd)
            os.unlink(temporary)
            raise
        _sync_directory(os.path.dirname(self.path))
        return fd


def _make_directory(path: str) -> None:
    os.mkdir(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        give(fd)
    finally:
        os.close(fd)


def _identity(status: os.stat_result) -> Tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_all(fd: int) -> bytes:
    if os.fstat(fd).st_size > _LARGEST:
        raise ConfigurationError(f"it has more than {_LARGEST} bytes")
    return os.pread(fd, _LARGEST, 0)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _sync_directory(path: str) -> None:
    """Make a new name durable; where that fails the file is there all the same, so it is no failure of the change."""
    try:
        space.sync_directory(path)
    except OSError as error:
        log.warning("cannot sync directory %s: %s", path, error.strerror, extra=about(error=error))


def _reason(error: OSError) -> str:
    if error.errno in (errno.EAGAIN, errno.EACCES) and error.filename is None:
        return "another wrapper uses it: stop that one, or choose another --dbpath"
    if error.errno == errno.ELOOP:
        return "it is a symbolic link, which is not followed: name the file itself"
    if error.errno == errno.ENOENT:
        return f"{error.strerror}: make its directory, or choose another --dbpath"
    return error.strerror or str(error)
