"""The servers that are measured: one entry of `FLAVOURS` each.

A peer runs with the best of its ordinary settings. All serve the same image on
127.0.0.1.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, Iterable, List, NamedTuple

from .errors import ProbeFailed

ROOT = Path(__file__).resolve().parents[3]
"""The checkout under test."""

XNBD_SERVER = [sys.executable, str(ROOT / "bin" / "xnbd-server")]
XNBD_BGCTL = [sys.executable, str(ROOT / "bin" / "xnbd-bgctl")]
LIMIT_SOURCE = ROOT / "contrib" / "bench" / "limit.c"
_CEPH = [sys.executable, str(ROOT / "contrib" / "bench" / "cephorigin.py")]
_RELAY = [sys.executable, str(ROOT / "contrib" / "bench" / "wanrelay.py")]

ORIGIN_SIZE = 256 << 20
"""Bytes of the disk behind the proxies, or as much as the image has."""

SMALL_ORIGIN_SIZE = 64 << 20
"""Bytes of the disk behind a slow link."""

EMPTY_ORIGIN_SIZE = 1 << 40

LARGE_SIZE = 64 << 30
"""Bytes of a sparse image that is larger than what a server has mapped in its first second."""

ONE_WAY_DELAY = 10
"""Milliseconds; a round trip takes twice this."""

SLOW_RATE = 200
"""Megabits per second."""


_PIECE = 4 << 20

_NGINX = """daemon off; master_process off; pid {where}/pid; error_log {where}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;
    client_body_temp_path {where}/body; proxy_temp_path {where}/proxy; fastcgi_temp_path {where}/fastcgi;
    uwsgi_temp_path {where}/uwsgi; scgi_temp_path {where}/scgi;
    server {{ listen 127.0.0.1:{port}; root {where}; }}
}}
"""


class Place(NamedTuple):
    """Where a server works: its TCP port, and a directory of its own for what it needs besides the image.

    ``origin_port`` is where a proxy finds its origin.
    """

    image: Path
    port: int
    directory: Path
    origin_port: int = 0

    @property
    def certificates(self) -> Path:
        """The directory of keys and certificates of the whole run, for servers and clients."""
        return self.directory.parent / "certificates"

    @property
    def pid_file(self) -> Path:
        """Written by servers that go into the background."""
        return self.directory / "pid"

    @property
    def control_socket(self) -> Path:
        """Of our servers, or the monitor of qemu's."""
        return self.directory / "control"


class Flavour(NamedTuple):
    """A way to run a server.

    ``command`` makes its command line and writes what that needs into the place's
    directory. ``fresh`` gives every sample a new process in an empty directory, for
    servers that remember what they have done. ``daemon`` is for those that cannot
    stay in the foreground: they write ``Place.pid_file``. ``origin`` is the flavour
    that a proxy or a relay has behind it, and which is kept running. ``version`` is
    empty where another flavour's says it. ``compiled`` is for what the benchmark
    brings along in C. A server with ``tls`` accepts nobody who does not use it, one with ``foreign`` speaks no NBD.
    """

    command: Callable[[Place], List[str]]
    version: List[str]
    package: str = ""
    export: str = ""
    fresh: bool = False
    daemon: bool = False
    origin: str = ""
    compiled: bool = False
    tls: bool = False
    foreign: bool = False


def _xnbd(place: Place) -> List[str]:
    return [*XNBD_SERVER, "--target", "--quiet", *_xnbd_listening(place), str(place.image)]


def _xnbd_listening(place: Place) -> List[str]:
    return ["--laddr", "127.0.0.1", "--lport", str(place.port)]


def _xnbd_sleeping(place: Place) -> List[str]:
    return [*_xnbd(place), "--spin", "0"]


def _xnbd_measured(place: Place) -> List[str]:
    return [*_xnbd(place), "--metrics", "0"]


def _limit(place: Place) -> List[str]:
    return [str(LIMIT_SOURCE.with_suffix("")), str(place.port), str(place.image)]


def _limit_sleeping(place: Place) -> List[str]:
    return [*_limit(place), "--spin", "0"]


def _xnbd_tls(place: Place) -> List[str]:
    return [*_xnbd(place), "--tls", str(place.certificates)]


def _nbdkit(place: Place) -> List[str]:
    return [*_nbdkit_listening(place), "file", str(place.image)]


def _nbdkit_tls(place: Place) -> List[str]:
    tls = ["--tls=require", f"--tls-certificates={place.certificates}", "--tls-verify-peer"]
    return [*_nbdkit_listening(place), *tls, "file", str(place.image)]


def _nbdkit_listening(place: Place) -> List[str]:
    return ["nbdkit", "--foreground", "--ipaddr", "127.0.0.1", "--port", str(place.port)]


def _qemu_nbd(place: Place) -> List[str]:
    return [*_qemu_nbd_listening(place), "--format=raw", str(place.image)]


def _qemu_nbd_tls(place: Place) -> List[str]:
    credentials = f"tls-creds-x509,id=tls,dir={place.certificates},endpoint=server,verify-peer=on"
    tls = ["--object", credentials, "--tls-creds=tls"]
    return [*_qemu_nbd_listening(place), *tls, "--format=raw", str(place.image)]


def _qemu_nbd_listening(place: Place) -> List[str]:
    listening = ["--persistent", "--shared=64", "--bind=127.0.0.1", f"--port={place.port}"]
    return ["qemu-nbd", *listening, "--cache=writeback", "--aio=threads"]


def _xnbd_cow(place: Place) -> List[str]:
    cow = ["--cow-dir", str(place.directory), str(place.image)]
    return [*XNBD_SERVER, "--cow-target", "--quiet", *_xnbd_listening(place), *cow]


def _nbdkit_cow(place: Place) -> List[str]:
    command = [*_nbdkit_listening(place), "--filter=cow", "file", str(place.image)]
    return ["env", f"TMPDIR={place.directory}", *command]


def _qemu_nbd_snapshot(place: Place) -> List[str]:
    return ["env", f"TMPDIR={place.directory}", *_qemu_nbd(place), "--snapshot"]


def _xnbd_steered(place: Place) -> List[str]:
    return [*_xnbd(place), "--control", str(place.control_socket)]


def _qemu_storage_daemon(place: Place) -> List[str]:
    # Without locks: qemu-nbd, which other measurements keep, has the same image.
    disk = f"driver=file,node-name=disk,filename={place.image},cache.direct=off,aio=threads,locking=off"
    listening = f"addr.type=inet,addr.host=127.0.0.1,addr.port={place.port},max-connections=0"
    return [
        *["qemu-storage-daemon", "--blockdev", disk, "--nbd-server", listening],
        *["--export", "type=nbd,id=export,node-name=disk,name=bench,writable=on"],
        *["--chardev", f"socket,id=monitor,path={place.control_socket},server=on,wait=off"],
        *["--monitor", "chardev=monitor"],
    ]


def _nbd_server(place: Place) -> List[str]:
    config = place.directory / "config"
    config.write_text(
        f"[generic]\n\tlistenaddr = 127.0.0.1\n\tport = {place.port}\n[bench]\n\texportname = {place.image}\n"
    )
    return ["nbd-server", "-C", str(config), "-p", str(place.pid_file)]


def _xnbd_proxy(place: Place) -> List[str]:
    files = [str(place.directory / "cache"), str(place.directory / "bitmap"), str(place.control_socket)]
    origin = ["127.0.0.1", str(place.origin_port)]
    return [*XNBD_SERVER, "--proxy", "--quiet", *_xnbd_listening(place), *origin, *files]


def _xnbd_proxy_tls(place: Place) -> List[str]:
    files = [str(place.directory / "cache"), str(place.directory / "bitmap"), str(place.control_socket)]
    origin = f"nbds://127.0.0.1:{place.origin_port}/?tls-certificates={place.certificates}"
    return [*XNBD_SERVER, "--proxy", "--quiet", *_xnbd_listening(place), origin, *files]


def _nbdkit_cache(place: Place, *options: str) -> List[str]:
    origin = ["nbd", "hostname=127.0.0.1", f"port={place.origin_port}", *options]
    command = [*_nbdkit_listening(place), "--filter=cache", *origin, "cache-on-read=true"]
    return ["env", f"TMPDIR={place.directory}", *command]


def _nbdkit_cache_tls(place: Place) -> List[str]:
    return _nbdkit_cache(place, "tls=require", f"tls-certificates={place.certificates}")


def _nginx(place: Place) -> List[str]:
    """The disk is ``disk.img`` in the place's own directory (`_origin`)."""
    configuration = place.directory / "nginx.conf"
    configuration.write_text(_NGINX.format(where=place.directory, port=place.port))
    return ["nginx", "-c", str(configuration)]


def _web_url(place: Place) -> str:
    return f"http://127.0.0.1:{place.origin_port}/disk.img"


def _xnbd_proxy_web(place: Place) -> List[str]:
    files = [str(place.directory / "cache"), str(place.directory / "bitmap"), str(place.control_socket)]
    return [*XNBD_SERVER, "--proxy", "--quiet", *_xnbd_listening(place), _web_url(place), *files]


def _nbdkit_cache_web(place: Place) -> List[str]:
    origin = ["curl", f"url={_web_url(place)}", "cache-on-read=true"]
    return ["env", f"TMPDIR={place.directory}", *_nbdkit_listening(place), "--filter=cache", *origin]


def _ceph(place: Place) -> List[str]:
    return [*_CEPH, str(place.port), str(place.directory / "ceph"), str(place.image)]


def _ceph_configuration(place: Place) -> Path:
    return place.directory.parent / "rbd-origin" / "ceph" / "ceph.conf"


def _xnbd_proxy_rbd(place: Place) -> List[str]:
    files = [str(place.directory / "cache"), str(place.directory / "bitmap"), str(place.control_socket)]
    origin = f"rbd:rbd/disk@snap?conf={_ceph_configuration(place)}"
    return [*XNBD_SERVER, "--proxy", "--quiet", *_xnbd_listening(place), origin, *files]


def _qemu_nbd_rbd(place: Place) -> List[str]:
    """It keeps nothing."""
    return [*_qemu_nbd_listening(place), "--read-only", "--format=raw", _qemu_rbd_disk(place)]


def _qemu_rbd_disk(place: Place) -> str:
    return f"rbd:rbd/disk@snap:id=admin:conf={_ceph_configuration(place)}"


def _qemu_nbd_cor_rbd(place: Place) -> List[str]:
    return _qemu_nbd_copy_on_read(place, _qemu_rbd_disk(place))


def _qemu_nbd_copy_on_read(place: Place, disk: str = "") -> List[str]:
    """It keeps what is read of *disk*, by default the NBD server behind it."""
    overlay = place.directory / "overlay.qcow2"
    backing = ["-F", "raw", "-b", disk or f"nbd://127.0.0.1:{place.origin_port}/"]
    create = ["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(overlay)]
    made = subprocess.run(create, capture_output=True, text=True, timeout=60)
    if made.returncode:
        raise ProbeFailed(f"qemu-img: {made.stderr.strip()}")
    disk = f"driver=copy-on-read,file.driver=qcow2,file.file.driver=file,file.file.filename={overlay}"
    return [*_qemu_nbd_listening(place), "--image-opts", disk]


def _origin(size: int, serve: Callable[[Place], List[str]] = _xnbd) -> Callable[[Place], List[str]]:
    """Our target on the first *size* bytes of the image."""

    def command(place: Place) -> List[str]:
        disk = place.directory / "disk.img"
        with place.image.open("rb") as image, disk.open("wb") as copy:
            while copy.tell() < size:
                piece = image.read(min(_PIECE, size - copy.tell()))
                if not piece:
                    break
                copy.write(piece)
        return serve(place._replace(image=disk))

    return command


def _sparse(size: int, serve: Callable[[Place], List[str]]) -> Callable[[Place], List[str]]:
    """A server of *size* bytes that nobody has written."""

    def command(place: Place) -> List[str]:
        disk = place.directory / "disk.img"
        with disk.open("wb") as file:
            file.truncate(size)
        return serve(place._replace(image=disk))

    return command


def _link(*options: object) -> Callable[[Place], List[str]]:
    """A relay that is as good as its origin, but far away."""

    def command(place: Place) -> List[str]:
        return [*_RELAY, *map(str, options), str(place.port), "127.0.0.1", str(place.origin_port)]

    return command


_XNBD_VERSION = [*XNBD_SERVER, "--version"]
_NBDKIT_VERSION = ["nbdkit", "--version"]
_NGINX_VERSION = ["nginx", "-v"]
_QEMU_NBD_VERSION = ["qemu-nbd", "--version"]


def _proxy(origin: str, fresh: bool = True) -> Flavour:
    return Flavour(_xnbd_proxy, _XNBD_VERSION, fresh=fresh, origin=origin)


FLAVOURS: Dict[str, Flavour] = {
    "xnbd": Flavour(_xnbd, _XNBD_VERSION),
    "xnbd --spin 0": Flavour(_xnbd_sleeping, _XNBD_VERSION),
    "xnbd --metrics": Flavour(_xnbd_measured, _XNBD_VERSION),
    "limit": Flavour(_limit, [], compiled=True),
    "limit --spin 0": Flavour(_limit_sleeping, [], compiled=True),
    "xnbd-new": Flavour(_xnbd, _XNBD_VERSION, fresh=True),
    "xnbd-large": Flavour(_sparse(LARGE_SIZE, _xnbd), _XNBD_VERSION, fresh=True),
    "nbdkit-large": Flavour(_sparse(LARGE_SIZE, _nbdkit), _NBDKIT_VERSION, "nbdkit", fresh=True),
    "qemu-nbd-large": Flavour(_sparse(LARGE_SIZE, _qemu_nbd), _QEMU_NBD_VERSION, "qemu-utils", fresh=True),
    "limit-large": Flavour(_sparse(LARGE_SIZE, _limit), [], compiled=True, fresh=True),
    "nbdkit": Flavour(_nbdkit, _NBDKIT_VERSION, "nbdkit"),
    "qemu-nbd": Flavour(_qemu_nbd, _QEMU_NBD_VERSION, "qemu-utils"),
    "xnbd-cow": Flavour(_xnbd_cow, _XNBD_VERSION, fresh=True),
    "nbdkit-cow": Flavour(_nbdkit_cow, _NBDKIT_VERSION, "nbdkit", fresh=True),
    "qemu-nbd -s": Flavour(_qemu_nbd_snapshot, _QEMU_NBD_VERSION, "qemu-utils", fresh=True),
    "xnbd-steered": Flavour(_xnbd_steered, _XNBD_VERSION, fresh=True),
    "qemu-sd": Flavour(
        _qemu_storage_daemon, ["qemu-storage-daemon", "--version"], "qemu-system-common", export="bench", fresh=True
    ),
    "nbd-server": Flavour(_nbd_server, ["nbd-server", "-V"], "nbd-server", export="bench", daemon=True),
    "origin": Flavour(_origin(ORIGIN_SIZE), _XNBD_VERSION),
    "xnbd-proxy": _proxy("origin"),
    "xnbd-proxy-kept": _proxy("origin", fresh=False),
    "nbdkit-cache": Flavour(_nbdkit_cache, _NBDKIT_VERSION, "nbdkit", fresh=True, origin="origin"),
    "qemu-nbd-cor": Flavour(_qemu_nbd_copy_on_read, _QEMU_NBD_VERSION, "qemu-utils", fresh=True, origin="origin"),
    "empty-origin": Flavour(_sparse(EMPTY_ORIGIN_SIZE, _xnbd), _XNBD_VERSION),
    "xnbd-proxy-empty": _proxy("empty-origin"),
    "far-origin": Flavour(_link("--delay", ONE_WAY_DELAY), [], origin="origin"),
    "xnbd-proxy-far": _proxy("far-origin"),
    "small-origin": Flavour(_origin(SMALL_ORIGIN_SIZE), _XNBD_VERSION),
    "slow-origin": Flavour(_link("--delay", ONE_WAY_DELAY, "--rate", SLOW_RATE), [], origin="small-origin"),
    "xnbd-proxy-slow": _proxy("slow-origin"),
    "xnbd --tls": Flavour(_xnbd_tls, _XNBD_VERSION, tls=True),
    "nbdkit --tls": Flavour(_nbdkit_tls, _NBDKIT_VERSION, "nbdkit", tls=True),
    "qemu-nbd --tls": Flavour(_qemu_nbd_tls, _QEMU_NBD_VERSION, "qemu-utils", tls=True),
    "tls-origin": Flavour(_origin(ORIGIN_SIZE, _xnbd_tls), _XNBD_VERSION, tls=True),
    "xnbd-proxy-tls": Flavour(_xnbd_proxy_tls, _XNBD_VERSION, fresh=True, origin="tls-origin"),
    "nbdkit-cache-tls": Flavour(_nbdkit_cache_tls, _NBDKIT_VERSION, "nbdkit", fresh=True, origin="tls-origin"),
    "web-origin": Flavour(_origin(ORIGIN_SIZE, _nginx), _NGINX_VERSION, "nginx-light", foreign=True),
    "xnbd-proxy-web": Flavour(_xnbd_proxy_web, _XNBD_VERSION, fresh=True, origin="web-origin"),
    "nbdkit-cache-web": Flavour(_nbdkit_cache_web, _NBDKIT_VERSION, "nbdkit", fresh=True, origin="web-origin"),
    "web-small-origin": Flavour(_origin(SMALL_ORIGIN_SIZE, _nginx), _NGINX_VERSION, "nginx-light", foreign=True),
    "web-slow-origin": Flavour(
        _link("--delay", ONE_WAY_DELAY, "--rate", SLOW_RATE), [], origin="web-small-origin", foreign=True
    ),
    "rbd-origin": Flavour(_origin(ORIGIN_SIZE, _ceph), ["ceph-osd", "--version"], "ceph-osd", foreign=True),
    "xnbd-proxy-rbd": Flavour(_xnbd_proxy_rbd, _XNBD_VERSION, fresh=True, origin="rbd-origin"),
    "qemu-nbd-cor-rbd": Flavour(_qemu_nbd_cor_rbd, _QEMU_NBD_VERSION, "qemu-utils", fresh=True, origin="rbd-origin"),
    "qemu-nbd-rbd": Flavour(_qemu_nbd_rbd, _QEMU_NBD_VERSION, "qemu-utils", fresh=True, origin="rbd-origin"),
    "xnbd-proxy-web-slow": Flavour(_xnbd_proxy_web, _XNBD_VERSION, fresh=True, origin="web-slow-origin"),
}

SNAPSHOT_FLAVOURS = frozenset({"xnbd-steered", "qemu-sd"})
"""Those that are told to copy the whole image."""


def use_tls(flavours: Iterable[str]) -> bool:
    """Whether one of them does, or the server behind it."""
    return any(FLAVOURS[name].tls or (FLAVOURS[name].origin and use_tls([FLAVOURS[name].origin])) for name in flavours)
