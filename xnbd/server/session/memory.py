"""How much memory requests that wait may hold: a share of what this process can still get.

What it can get is the least of what the computer, each cgroup around the process
(version 1 or 2) and its own resource limits have left. An eighth of each of them is
left alone. The rest shrinks as others take of it, and with it the share of each
client, so that all of them together never have it all, however many they are and
whichever servers they use.
"""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional, Tuple

from .parking import LEAST

_RESERVE = 8
_SHARE = 8
_UNKNOWN = 64 << 20
_NO_LIMIT = 1 << 60


class _Room(NamedTuple):
    """Memory of the computer, of a cgroup or within a limit: *free* bytes of *total*."""

    total: int
    free: int


class _Files(NamedTuple):
    """Files of a memory cgroup: limits, usage, and the field for what of that can be taken back at once."""

    limits: Tuple[str, ...]
    usage: str
    cache: str


_VERSIONS = {
    "cgroup2": _Files(("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


class Memory:
    """The memory that this process can still get."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._groups = list(self._find_groups())

    def share(self) -> int:
        """Bytes that the requests of one client may hold at this moment."""
        rooms = [*self._of_computer(), *self._of_groups(), *self._of_limits()]
        usable = min((room.free - room.total // _RESERVE for room in rooms), default=_UNKNOWN * _SHARE)
        return max(LEAST, usable // _SHARE)

    def _of_computer(self) -> Iterator[_Room]:
        found = dict(re.findall(r"(?m)^(\w+): +(\d+) kB$", _read(self._root / "proc/meminfo")))
        if "MemTotal" in found and "MemAvailable" in found:
            yield _Room(int(found["MemTotal"]) << 10, int(found["MemAvailable"]) << 10)

    def _of_groups(self) -> Iterator[_Room]:
        for directory, files in self._groups:
            limits = [_number(directory / name) for name in files.limits]
            used = _number(directory / files.usage)
            limit = min((limit for limit in limits if limit is not None), default=_NO_LIMIT)
            if limit >= _NO_LIMIT or used is None:
                continue
            cache = re.search(rf"(?m)^{files.cache} (\d+)$", _read(directory / "memory.stat"))
            yield _Room(limit, limit - used + (int(cache[1]) if cache else 0))

    def _of_limits(self) -> Iterator[_Room]:
        pages = _read(self._root / "proc/self/statm").split()
        for limit, column in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
            soft = resource.getrlimit(limit)[0]
            if soft != resource.RLIM_INFINITY and len(pages) > column:
                yield _Room(soft, soft - int(pages[column]) * resource.getpagesize())

    def _find_groups(self) -> Iterator[Tuple[Path, _Files]]:
        """The directories of the memory cgroups that this process is in, the innermost first."""
        paths = dict(_group_of(line) for line in _read(self._root / "proc/self/cgroup").splitlines())
        for kind, mount_root, mount_point in self._mounts():
            path = paths.get("memory" if kind == "cgroup" else "")
            if path is None:
                continue
            inside = os.path.relpath(path, mount_root)
            directory = self._root / mount_point.lstrip("/")
            parts = [] if inside.startswith("..") or inside == "." else inside.split("/")
            for count in range(len(parts), -1, -1):
                yield directory.joinpath(*parts[:count]), _VERSIONS[kind]

    def _mounts(self) -> Iterator[Tuple[str, str, str]]:
        """Kind, root and mount point of the hierarchies that may limit memory (``proc(5)``)."""
        for line in _read(self._root / "proc/self/mountinfo").splitlines():
            before, _, after = line.partition(" - ")
            fields, (kind, _, options) = before.split(), [*after.split(), "", "", ""][:3]
            if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
                yield kind, fields[3], fields[4]


def _group_of(line: str) -> Tuple[str, str]:
    """A line of ``/proc/self/cgroup``: ``memory`` if its hierarchy has that controller, nothing for version 2."""
    _, controllers, path = line.split(":", 2)
    return "memory" if "memory" in controllers.split(",") else controllers, path


def _read(path: Path) -> str:
    """Nothing where there is no such file."""
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""


def _number(path: Path) -> Optional[int]:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


_measured: List[Memory] = []


def share() -> int:
    """Bytes that the requests of one client may hold at this moment, in this process."""
    if not _measured:
        _measured.append(Memory())
    return _measured[0].share()
