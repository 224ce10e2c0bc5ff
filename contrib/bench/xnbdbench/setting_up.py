"""What a run needs before the first sample: programs, the load generator, an image."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Iterable, List, Optional

from .errors import BenchmarkError
from .flavours import FLAVOURS, LIMIT_SOURCE, ORIGIN_SIZE, SMALL_ORIGIN_SIZE, SNAPSHOT_FLAVOURS, use_tls

NBDLOAD = Path(__file__).resolve().parent.parent / "nbdload.c"
"""The load generator."""

_TLS_SOURCE = NBDLOAD.with_name("nbdload_tls.c")
_TLS_HEADER = Path("/usr/include/openssl/ssl.h")
"""Where it is, the load generator knows TLS."""

_SHARED_MEMORY = Path("/dev/shm")
_ROOM_TO_SPARE = 64 << 20
_ROOM_FOR_PROXIES = 3 * ORIGIN_SIZE + 2 * SMALL_ORIGIN_SIZE
_CHUNK = 4 << 20


def require_programs(flavours: Iterable[str], *, fio: bool) -> None:
    """Raises BenchmarkError that names the Debian packages to install."""
    wanted = {FLAVOURS[name].version[0]: FLAVOURS[name].package for name in flavours if FLAVOURS[name].package}
    wanted |= {"cc": "gcc libc6-dev", "nbdcopy": "libnbd-bin"}
    if fio:
        wanted["fio"] = "fio"
    if use_tls(flavours):
        wanted["certtool"] = "gnutls-bin"
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # a user's own lacks nbd-server
    missing = [package for program, package in wanted.items() if not shutil.which(program)]
    if use_tls(flavours) and not _TLS_HEADER.exists():
        missing.append("libssl-dev")
    if missing:
        raise BenchmarkError(f"programs are missing: apt-get install {' '.join(sorted(missing))}")


def compile_programs(flavours: Iterable[str]) -> Path:
    """The load generator, and what *flavours* need beside it; returns the former."""
    if any(FLAVOURS[name].compiled for name in flavours):
        _compile([LIMIT_SOURCE])
    tls = ["-DWITH_TLS", "-lssl", "-lcrypto"] if _TLS_HEADER.exists() else []
    return _compile([NBDLOAD, _TLS_SOURCE], *tls)


def _compile(sources: List[Path], *options: str) -> Path:
    """The program beside its first source, compiled anew if one of them or the library has changed."""
    program = sources[0].with_suffix("")
    changes = [source.stat().st_mtime for source in sources]
    if _TLS_HEADER.exists():
        changes.append(_TLS_HEADER.stat().st_ctime)  # when it was installed
    if program.exists() and program.stat().st_mtime > max(changes):
        return program
    # Replaced in one step, for another run may be using it.
    fresh = program.with_name(f"{program.name}.{os.getpid()}")
    try:
        done = subprocess.run(
            ["cc", "-O2", "-pthread", "-o", str(fresh), *map(str, sources), *options],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            raise BenchmarkError(f"cannot compile {sources[0]}:\n{done.stderr}")
        fresh.replace(program)
    finally:
        fresh.unlink(missing_ok=True)
    return program


def room_besides(flavours: List[str], size: int) -> int:
    """Bytes that servers need besides the image of *size*: proxies' origins and caches, and a snapshot."""
    proxies = _ROOM_FOR_PROXIES if any(FLAVOURS[name].origin for name in flavours) else 0
    return max(proxies, size if SNAPSHOT_FLAVOURS.intersection(flavours) else 0)


def choose_directory(wanted: Optional[str], size: int) -> Path:
    """Where there is room for *size* bytes: *wanted*, or else memory before disk."""
    candidates: List[Path] = [Path(wanted)] if wanted else [_SHARED_MEMORY, Path(tempfile.gettempdir())]
    for directory in candidates:
        if directory.is_dir() and shutil.disk_usage(directory).free > size + _ROOM_TO_SPARE:
            return directory
    raise BenchmarkError(f"no room for {size >> 20} MiB in {' or '.join(map(str, candidates))}: see --dir")


def make_image(path: Path, size: int) -> None:
    """A file of *size* random bytes."""
    with path.open("wb") as image:
        for offset in range(0, size, _CHUNK):
            image.write(os.urandom(min(_CHUNK, size - offset)))
