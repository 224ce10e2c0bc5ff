"""What is inside a guest: busybox, the drivers, and programs of this computer."""

from __future__ import annotations

import importlib.util
import os
import py_compile
import re
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Dict, Iterable, List, Sequence

from .archive import Archive, find_program
from .errors import GuestError
from .packages import Packages

PROGRAMS = ("nbd-client", "mkfs.ext4", "e2fsck", "mkswap", "fstrim", "blkdiscard")
"""What every guest has beside busybox; these names win over busybox's own."""

_DRIVERS = ("virtio_pci", "virtio_console", "virtio_net", "virtio_blk", "nbd")

_UNWANTED = {"test", "tests", "idlelib", "tkinter", "lib2to3", "distutils", "ensurepip", "pydoc_data", "turtledemo"}
_UNWANTED |= {"site-packages", "dist-packages", "unittest", "asyncio", "sqlite3", "curses", "dbm", "wsgiref"}


KERNEL_TLS = ("tls", "gcm", "ctr", "ghash-generic")
"""Modules with which the kernel encrypts TLS; the file of one is named with hyphens where it has any."""


def basic_system(packages: Packages, modules: Sequence[str] = ()) -> Archive:
    """Enough for shell commands, file systems and NBD's client; *modules* of the kernel are loaded as well."""
    archive = Archive()
    archive.add_bytes("/init", (Path(__file__).parent / "init").read_bytes(), 0o755)
    archive.add_bytes("/etc/passwd", b"root:x:0:0:root:/:/bin/sh\n")
    archive.add_bytes("/etc/group", b"root:x:0:\n")
    archive.add_bytes("/etc/hosts", b"127.0.0.1 localhost\n10.0.2.2 host\n")
    archive.add_symlink("/etc/mtab", "/proc/mounts")
    archive.add_file(packages.busybox, "/bin/busybox")
    for program in PROGRAMS:
        archive.add_program(find_program(program), f"/usr/sbin/{program}")
    for number, module in enumerate(_with_dependencies(packages.modules, (*_DRIVERS, *modules))):
        archive.add_file(module, f"/modules/{number:02d}-{module.name}")
    return archive


def add_python(archive: Archive) -> None:
    """The running interpreter with its standard library, under the same paths as here."""
    archive.add_program(Path(sys.executable).resolve())
    archive.add_symlink("/usr/local/bin/python3", str(Path(sys.executable).resolve()))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in _files_of(library):
        if path.suffix == ".so":
            archive.add_program(path)
        elif path.suffix in (".py", ".pyc"):
            archive.add_file(path)


def add_package(archive: Archive, source: Path, directory: str) -> None:
    """A Python module or package at *source*, under *directory* in the guest, compiled: that is slow in a guest."""
    for path in [source] if source.is_file() else list(_files_of(source)):
        name = f"{directory}/{path.relative_to(source.parent)}"
        if path.suffix == ".so":
            archive.add_program(path, name)
        elif path.suffix == ".py":
            archive.add_file(path, name)
            tag = sys.implementation.cache_tag
            cached = f"{os.path.dirname(name)}/__pycache__/{path.stem}.{tag}.pyc"
            archive.add_bytes(cached, _compiled(path, name))


def _compiled(path: Path, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "compiled"
        py_compile.compile(str(path), str(target), name, doraise=True)
        return target.read_bytes()


def _files_of(directory: Path) -> Iterable[Path]:
    for parent, directories, files in os.walk(directory):
        directories[:] = sorted(d for d in directories if d not in _UNWANTED and not d.startswith("config-"))
        yield from (Path(parent) / file for file in sorted(files))


def _with_dependencies(modules: Path, wanted: Iterable[str]) -> List[Path]:
    """The files of kernel modules, in the order in which they have to be loaded; those built in are left out."""
    files = {path.stem: path for path in modules.rglob("*.ko")}
    ordered: Dict[str, Path] = {}

    def visit(name: str) -> None:
        if name in files and name not in ordered:
            depends = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
            for other in depends[1].decode().split(",") if depends else []:
                visit(other.replace("-", "_"))
            ordered[name] = files[name]

    for name in wanted:
        visit(name)
    return list(ordered.values())


def add_xnbd(archive: Archive, root: Path) -> None:
    """The checkout at *root* as /opt/xnbd, and what it imports; ``python3 /opt/xnbd/bin/xnbd-server`` runs there."""
    add_package(archive, root / "xnbd", "/opt/xnbd")
    for program in sorted((root / "bin").iterdir()):
        archive.add_file(program, f"/opt/xnbd/bin/{program.name}")
    for name in ("docopt", "psutil", "setproctitle", "xxhash"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise GuestError(f"the Python module {name} is not installed")
        origin = Path(spec.origin)
        add_package(archive, origin.parent if origin.name == "__init__.py" else origin, "/opt/xnbd")
