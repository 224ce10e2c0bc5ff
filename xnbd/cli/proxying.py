"""From the options of ``xnbd-server --proxy`` to its disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..errors import ConfigurationError
from ..logs import log
from ..origin.address import members_of, parse_origin
from ..origin.base import OriginAddress, OriginLost
from ..origin.probe import Found, probe_each
from ..proxy.origin_link import CHANGED, contradiction
from ..proxy.source import ProxySettings, ProxySource
from ..proxy.state.belonging import is_marked_bitmap
from ..proxy.state.entry import AFRESH
from ..proxy.state.known import Known, has_cached_blocks, known_state
from ..proxy.state.opening import open_state
from ..proxy.state.shared import SharedState
from ..proxy.verification import Verify
from ..storage import space
from ..storage.image_use import BITMAPS, DISK, ImageInUse, OtherBitmap, stranger_in_the_way
from ..storage.target import LARGEST_FILE, create_sparse, open_disk
from .proxy_options import ProxyOptions


def open_proxy(options: ProxyOptions, *, alone: bool) -> ProxySource:
    """The disk. With *alone* this server has no siblings that were asked for the same disk a moment ago.

    Raises `ConfigurationError`.
    """
    cache_path, bitmap_path = options.cache_path, options.bitmap_path
    known = None if options.clear else known_state(bitmap_path)
    here = _whereabouts(options.origin, known)
    found = _find(here, known, options.patience.connect, ask=alone)
    size = found.size
    cache_fd = _open_cache(cache_path, size, must_exist=not options.clear and has_cached_blocks(bitmap_path))
    grow = space.device_size(cache_fd) < size
    state = _open_state(options, cache_fd, size)
    for place, version in found.versions:
        _pin(state, place, version, anew=options.adopt)
    if grow:
        _grow(cache_fd, cache_path, size)
    return ProxySource(cache_fd, state, _settings(options, size))


def inherit_proxy(options: ProxyOptions, packed: Mapping[str, Any]) -> ProxySource:
    """The disk as the program before had it. Raises `ConfigurationError` if its files are of no use here."""
    return ProxySource.unpack(packed, _settings(options, packed["size"]))


def _settings(options: ProxyOptions, size: int) -> ProxySettings:
    if len(members_of(options.origin)) > 1:  # others than this process have asked them, and loaded what that takes
        from ..origin.nbd import connection  # noqa: F401
        from ..origin.several import origin  # noqa: F401
    return ProxySettings(
        path=options.cache_path,
        size=size,
        readonly=options.readonly,
        address=options.origin,
        patience=options.patience,
        readahead=options.readahead,
        fetch_size=options.fetch_size,
        verify=options.verify,
    )


def _open_state(options: ProxyOptions, cache_fd: int, size: int) -> SharedState:
    path = options.cache_path
    try:
        return open_state(
            options.bitmap_path,
            cache_fd,
            disk_size=size,
            origin=str(options.origin),
            clear=options.clear,
            adopt=options.adopt,
            thorough=options.verify is Verify.NEVER,  # else whoever reads a block looks at its bits as well
            cache_limit=options.cache_limit,
        )
    except OtherBitmap:
        raise ConfigurationError(
            stranger_in_the_way(cache_fd, path, BITMAPS)
            or f"{path} is the cache of a running proxy with another bitmap: name that one, or another cache"
        ) from None
    except ImageInUse:
        raise ConfigurationError(
            stranger_in_the_way(cache_fd, path, DISK)
            or f"{path} is served as a disk by itself (--target, --cow-target, or a proxy that was switched): "
            "stop that server first"
        ) from None


class _Finding(NamedTuple):
    """What there is to cache: the disk's *size* in bytes, and its version in each place that was asked and has one."""

    size: int
    versions: Sequence[Tuple[OriginAddress, str]] = ()


def _find(here: OriginAddress, known: Optional[Known], timeout: float, *, ask: bool) -> _Finding:
    """What the origin says of the disk, or the state file if the origin is away or need not be asked."""
    if known is not None and not ask:
        return _Finding(known.size)
    for warning in here.warnings():
        log.warning("%s", warning)
    places = members_of(here)
    found = _those_there(places, known, timeout)
    if known is not None:
        found = [(place, what) for place, what in found if _is_of_size(place, what, known.size, alone=len(places) == 1)]
    size = found[0][1].size if found else known.size if known is not None else 0
    if len(places) > 1:
        found = [pair for number, pair in enumerate(found) if _is_same(pair, found[:number], known)]
    return _Finding(size, [(place, what.version) for place, what in found if what.version])


def _those_there(
    places: Sequence[OriginAddress], known: Optional[Known], timeout: float
) -> List[Tuple[OriginAddress, Found]]:
    """What is found at which of *places*. Raises `ConfigurationError` if nothing is, and nothing is *known*."""
    found, lost = [], []
    for place, outcome in zip(places, probe_each(places, timeout=timeout)):
        if isinstance(outcome, Found):
            found.append((place, outcome))
        else:
            lost.append(outcome if isinstance(outcome, OriginLost) else OriginLost(f"origin {place}: {outcome}"))
    if known is None and not found:
        advice = "" if lost[0].refused else "; a proxy's first start needs its origin"
        raise ConfigurationError(f"{lost[0]}{advice}") from lost[0]
    for reason in lost:
        log.warning("%s; %s", reason, "the others are asked" if found else "cached blocks are served, the others wait")
    for place, what in found:
        if not what.size:
            raise ConfigurationError(f"origin {place}: its disk is empty (0 bytes)")
        if what.size > LARGEST_FILE:
            raise ConfigurationError(f"origin {place}: its disk has {what.size} bytes, more than any file can have")
    return found


def _is_of_size(place: OriginAddress, what: Found, size: int, *, alone: bool) -> bool:
    """Whether *what* was found may be the disk that is known; what is wrong with one *alone* is told later, too."""
    if what.size == size or (alone and not what.version):
        return True
    text = f"origin {place}: it has {what.size} bytes, not {size} as before"
    if alone:
        log.error(CHANGED, text)
    else:
        log.error("%s; it is not used", text)
    return False


def _is_same(
    new: Tuple[OriginAddress, Found], others: Sequence[Tuple[OriginAddress, Found]], known: Optional[Known]
) -> bool:
    """Whether *new* may be the disk of the *others*. Raises `ConfigurationError` if not, and none is *known*."""
    place, what = new
    for other, theirs in others:
        reason = contradiction(place, what.version, other, theirs.version)
        if what.size != theirs.size:
            reason = f"its disk has {what.size} bytes, and that of {other} {theirs.size}"
        if reason and known is None:
            raise ConfigurationError(f"origin {place}: {reason}: name origins of one and the same disk")
        if reason:
            log.error("origin %s: %s; it is not used", place, reason)
            return False
    return True


def _pin(state: SharedState, here: OriginAddress, version: str, *, anew: bool) -> None:
    """Note the *version* of the disk, or say that it is another one than the cached one; *anew*: it need not be."""
    try:
        noted = state.agree_on_version(here.place, version, anew=anew)
    except OSError as error:
        raise ConfigurationError(f"the version of the origin's disk cannot be noted: {error.strerror}") from error
    if noted != version:
        log.error(CHANGED, f"origin {here}: it has {version}, no more {noted}")


def _whereabouts(address: OriginAddress, known: Optional[Known]) -> OriginAddress:
    """Where the origin is by now: *address*, unless an operator has moved the proxy to another one."""
    if known is None or not known.moved_to:
        return address
    moved = parse_origin(known.moved_to)
    if moved == address or address.overrules(moved):
        return address
    log.info("the origin has been moved to %s", moved)
    return moved


def _open_cache(path: str, size: int, *, must_exist: bool) -> int:
    """The cache image, made with *size* bytes if there is none; one that is too short has to grow yet."""
    if not os.path.exists(path):
        if must_exist:
            raise _lost(f"{path} is gone")
        create_sparse(path, size)
    elif Path(path).is_file() and not Path(path).stat().st_size:
        if must_exist:
            raise _lost(f"{path} is empty")
        os.truncate(path, size)
    fd = open_disk(path, readonly=False)
    if is_marked_bitmap(fd):
        raise ConfigurationError(f"{path} is the bitmap of a cache and no cache image")
    found = space.device_size(fd)
    if found >= size:
        return fd
    if not os.path.isfile(path):
        raise ConfigurationError(f"{path} has {found} bytes, too few for a disk of {size}")
    if must_exist:
        raise _lost(f"{path} has {found} bytes of {size}")
    return fd


def _lost(what: str) -> ConfigurationError:
    return ConfigurationError(f"{what}, but its bitmap has cached blocks: put it back {AFRESH}")


def _grow(fd: int, path: str, size: int) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        raise ConfigurationError(f"cannot make {path} {size} bytes long: {error.strerror}") from error
