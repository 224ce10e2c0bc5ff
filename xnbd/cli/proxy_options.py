"""What the command line of ``xnbd-server --proxy`` asks for; only a proxy needs the modules that this one imports."""

from __future__ import annotations

from typing import Mapping, NamedTuple, Optional

from ..errors import ConfigurationError
from ..origin.address import is_uri, parse_origin, with_others
from ..origin.base import OriginAddress
from ..proxy.fetch_queue import PIECE
from ..proxy.image import DEFAULT_READAHEAD
from ..proxy.origin_link import Patience
from ..proxy.verification import Verify
from ..storage.blocks import BLOCK
from .options import cache_limit
from .values import USAGE_ERROR, CommandLine


class ProxyOptions(NamedTuple):
    """The disk of *origin*, cached here; *readahead*, *fetch_size* (None: by its kind) and *cache_limit* in bytes.

    With *clear* nothing counts as cached yet.
    """

    origin: OriginAddress
    cache_path: str
    bitmap_path: str
    readonly: bool = False
    clear: bool = False
    adopt: bool = False
    patience: Patience = Patience()
    readahead: int = DEFAULT_READAHEAD
    fetch_size: Optional[int] = None
    verify: Verify = Verify.FIRST
    cache_limit: Optional[int] = None


def proxy_options(line: CommandLine, paths: Mapping[str, str]) -> ProxyOptions:
    """Raises `ConfigurationError`."""
    connect = line.seconds("--connect-timeout") if line.has("--connect-timeout") else Patience().connect
    answer = line.seconds("--origin-timeout") if line.has("--origin-timeout") else None
    readahead = line.size_or_zero("--readahead") if line.has("--readahead") else DEFAULT_READAHEAD
    return ProxyOptions(
        origin=with_others(_origin(line), line.texts("--origin")),
        cache_path=paths["CACHE_DISK_IMAGE"],
        bitmap_path=paths["CACHE_BITMAP_IMAGE"],
        readonly=line.has("--readonly"),
        clear=line.has("--clear-bitmap"),
        adopt=line.has("--adopt-cache"),
        patience=Patience(connect, answer),
        readahead=readahead,
        fetch_size=_fetch_size(line) if line.has("--fetch-size") else None,
        verify=_verify(line),
        cache_limit=cache_limit(line),
    )


def _fetch_size(line: CommandLine) -> int:
    size = line.size_or_zero("--fetch-size")
    if size & (size - 1) or not BLOCK <= size <= PIECE * BLOCK:
        raise ConfigurationError("--fetch-size: expected 4K, 8K, 16K, 32K, 64K, 128K or 256K", USAGE_ERROR)
    return size


def _verify(line: CommandLine) -> Verify:
    text = line.text("--verify")
    try:
        return Verify.FIRST if text is None else Verify(text)
    except ValueError:
        raise ConfigurationError(f"--verify {text}: that is never, first or always", USAGE_ERROR) from None


def _origin(line: CommandLine) -> OriginAddress:
    uri, name = line.text("REMOTE_URI"), line.text("--target-exportname")
    if uri is None:
        return parse_origin(line.needed("REMOTE_HOST"), line.needed("REMOTE_PORT"), name)
    if not is_uri(uri):
        raise ConfigurationError(
            f"{uri} is no URI; with a host the arguments are REMOTE_HOST REMOTE_PORT CACHE_DISK_IMAGE "
            "CACHE_BITMAP_IMAGE CONTROL_SOCKET_PATH",
            USAGE_ERROR,
        )
    return parse_origin(uri, None, name)
