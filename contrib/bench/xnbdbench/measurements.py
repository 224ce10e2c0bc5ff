"""What is measured: one entry of `MEASUREMENTS` each, with the target it has to reach.

The first contender is the subject; the others are what it is compared with.
"""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Tuple

from .caching import CacheAll, Cold, ColdLatency, FetchedShare, HitLatency, Warmed
from .flavours import FLAVOURS, ORIGIN_SIZE
from .footprint import BusyMemory, IdleCpu, WorkerMemory
from .load import KIB, MIB, Beside, Crowded, Filled, Fio, FirstRead, FirstSecond, Load
from .results import LIMIT, Goal, Panel, Unit, at_least, at_most, ratio
from .snapshots import Writes, take_qemu, take_xnbd
from .startup import InetdTime, VersionTime
from .trial import Probe

PEERS = ["nbdkit", "qemu-nbd", "nbd-server"]
COW_PEERS = ["nbdkit-cow", "qemu-nbd -s"]
PROXY_PEERS = ["nbdkit-cache", "qemu-nbd-cor"]
TLS_PEERS = ["nbdkit --tls", "qemu-nbd --tls"]

_LARGE = ["xnbd-large", "nbdkit-large", "qemu-nbd-large"]
_LARGE_LIMIT = f"{LIMIT}-large"

_BARE = "bare origin"


class Contender(NamedTuple):
    """A server (a name in `FLAVOURS`, or None if the probe starts its own) and what to do with it."""

    server: Optional[str]
    probe: Probe


class Measurement(NamedTuple):
    """``name`` is for ``--only``, ``title`` for people; ``panel`` is where the plot shows it.

    ``most_rounds`` bounds the rounds of what takes long and varies little. Contenders
    in ``references`` are shown, but the subject need not be better.
    """

    name: str
    title: str
    unit: Unit
    goal: Goal
    contenders: Dict[str, Contender]
    panel: Panel = ""
    most_rounds: int = 1000
    references: Tuple[str, ...] = ()


def compare(probe: Probe, subject: str = "xnbd", others: Optional[List[str]] = None) -> Dict[str, Contender]:
    """The same *probe* on several flavours."""
    return {name: Contender(name, probe) for name in [subject, *(PEERS if others is None else others)]}


def _compare_with_limit(probe: Probe) -> Dict[str, Contender]:
    """The same *probe* on ours, on all peers, and on the C program that has our technique, which is only shown."""
    return {**compare(probe), LIMIT: Contender(LIMIT, probe)}


def asleep(name: str, title: str, goal: Goal, probe: Probe) -> Measurement:
    """What is left where nobody polls, of which the C program of the same technique has the most there is."""
    return Measurement(name, title, "iops", goal, compare(probe, "xnbd --spin 0", ["limit --spin 0"]))


def measured(name: str, title: str, probe: Probe) -> Measurement:
    """What it costs to count and to look at the clock for each batch."""
    return Measurement(name, title, "iops", ratio(0.98), compare(probe, "xnbd --metrics", ["xnbd"]))


def alone(probe: Probe) -> Dict[str, Contender]:
    """A *probe* of xnbd that nothing is compared with."""
    return {"xnbd": Contender("xnbd", probe)}


def process(probe: Probe) -> Dict[str, Contender]:
    """A *probe* that starts xnbd-server itself."""
    return {"xnbd": Contender(None, probe)}


def small(name: str, title: str, goal: Goal, probe: Probe) -> Measurement:
    """4 KiB requests, counted per second."""
    return Measurement(name, title, "iops", goal, _compare_with_limit(probe), "small", references=(LIMIT,))


def large(name: str, title: str, goal: Goal, op: str, size: int) -> Measurement:
    """Sequential requests of *size* bytes, as throughput."""
    contenders = _compare_with_limit(_large_load(op, size))
    return Measurement(name, title, "MB/s", goal, contenders, "throughput", references=(LIMIT,))


def _large_load(op: str, size: int) -> Load:
    """4 in flight."""
    return Load(op, bytes=size, depth=4, unit="mb_per_s")


def copied(name: str, title: str, probe: Probe, others: List[str]) -> Measurement:
    """What a copy-on-write disk costs beside the plain target, once its blocks are where they belong.

    Both are started anew for every sample: a process that has served the disk for
    long has all of it mapped.
    """
    return Measurement(name, title, "iops", ratio(0.85), compare(probe, "xnbd-cow", others), most_rounds=5)


def cold(name: str, title: str, unit: Unit, goal: Goal, probe: Cold, subject: Optional[Probe] = None) -> Measurement:
    """*probe* of new proxies with an empty cache, of which ours may have a *subject* of its own; and of the origin."""
    contenders = {
        "xnbd-proxy": Contender("xnbd-proxy", subject or probe),
        **{peer: Contender(peer, probe) for peer in PROXY_PEERS},
        _BARE: Contender("origin", probe),
    }
    return Measurement(name, title, unit, goal, contenders, references=(_BARE,))


def web(name: str, title: str, unit: Unit, goal: Goal, probe: Cold, subject: Optional[Probe] = None) -> Measurement:
    """*probe* of new proxies of a file on a web server, of which ours may have a *subject* of its own."""
    contenders = {
        "xnbd-proxy": Contender("xnbd-proxy-web", subject or probe),
        "nbdkit-cache": Contender("nbdkit-cache-web", probe),
    }
    return Measurement(name, title, unit, goal, contenders)


def rbd(name: str, title: str, unit: Unit, goal: Goal, probe: Cold, subject: Optional[Probe] = None) -> Measurement:
    """*probe* of new proxies of an image in Ceph, of which ours may have a *subject*; and without a cache."""
    contenders = {
        "xnbd-proxy": Contender("xnbd-proxy-rbd", subject or probe),
        "qemu-nbd-cor": Contender("qemu-nbd-cor-rbd", probe),
        "qemu-nbd": Contender("qemu-nbd-rbd", probe),
    }
    return Measurement(name, title, unit, goal, contenders, references=("qemu-nbd",))


def warm(name: str, title: str, unit: Unit, load: Load) -> Measurement:
    """A proxy that has everything, beside a plain target on the same data."""
    probe = Warmed(load)
    contenders = {"xnbd-proxy": Contender("xnbd-proxy-kept", probe), "xnbd": Contender("origin", probe)}
    return Measurement(name, title, unit, ratio(0.9), contenders)


def far(name: str, title: str, unit: Unit, goal: Goal, proxy: Probe, link: Probe) -> Measurement:
    """A proxy whose origin is a round trip of 20 ms away, beside the same link without it."""
    contenders = {"xnbd-proxy": Contender("xnbd-proxy-far", proxy), "bare link": Contender("far-origin", link)}
    return Measurement(name, title, unit, goal, contenders, most_rounds=3)


def hits(name: str, title: str, depth: int) -> Measurement:
    """Reads of cached blocks while others of the same client wait for a stalled origin, and while none do."""
    contenders = {
        "misses wait": Contender("xnbd-proxy-far", HitLatency(depth, pending=32)),
        "no misses": Contender("xnbd-proxy-far", HitLatency(depth)),
    }
    return Measurement(name, title, "µs", ratio(0.5), contenders, most_rounds=5)


def proxy_alone(
    name: str, title: str, unit: Unit, goal: Goal, probe: Probe, flavour: str = "xnbd-proxy"
) -> Measurement:
    return Measurement(name, title, unit, goal, {"xnbd-proxy": Contender(flavour, probe)}, most_rounds=3)


def snapshot(name: str, title: str, unit: Unit, goal: Goal, sample: str) -> Measurement:
    """Random writes while the disk is copied as it was at one instant; and before and after, which is only shown."""
    contenders = {
        "meanwhile": Contender("xnbd-steered", Writes(take_xnbd, "during", sample)),
        "before": Contender("xnbd-steered", Writes(take_xnbd, "before", sample)),
        "after": Contender("xnbd-steered", Writes(take_xnbd, "after", sample)),
        "qemu meanwhile": Contender("qemu-sd", Writes(take_qemu, "during", sample)),
        "qemu before": Contender("qemu-sd", Writes(take_qemu, "before", sample)),
        "qemu after": Contender("qemu-sd", Writes(take_qemu, "after", sample)),
    }
    references = ("before", "after", "qemu before", "qemu after")
    return Measurement(name, title, unit, goal, contenders, most_rounds=3, references=references)


def encrypted(name: str, title: str, unit: Unit, goal: Goal, probe: Probe, most_rounds: int = 1000) -> Measurement:
    """*probe* over TLS 1.3 with certificates on both sides."""
    return Measurement(name, title, unit, goal, compare(probe, "xnbd --tls", TLS_PEERS), most_rounds=most_rounds)


def _far_stream(most: int) -> Cold:
    return Cold(bytes=128 * KIB, depth=1, most=most)


_COLD_RANDOM = Cold("randread", bytes=4 * KIB, depth=32, unit="iops", most=ORIGIN_SIZE // 4)
_SLOW_COPY = CacheAll("link_percent")
_EMPTY_COPY = CacheAll("seconds")

_SNAPSHOT_TIMES = {
    "xnbd": Contender("xnbd-steered", Writes(take_xnbd, "takes")),
    "qemu": Contender("qemu-sd", Writes(take_qemu, "takes")),
}

_ONE_IN_FLIGHT = ratio(1.0, of_limit=0.85)
_MANY_IN_FLIGHT = ratio(1.0, of_limit=0.75)

_BUSY = Load(depth=16, connections=8)
_WRITE = Load("randwrite", depth=32)

MEASUREMENTS: List[Measurement] = [
    small("randread-1", "random read, 1 in flight", _ONE_IN_FLIGHT, Load(depth=1)),
    small("randread-1-busy", "random read, 1 in flight, busy neighbours", _ONE_IN_FLIGHT, Beside(Load(depth=1))),
    asleep("randread-1-asleep", "random read, 1 in flight, without polling", ratio(0.95), Load(depth=1)),
    small("randread-16", "random read, 16 in flight", ratio(2.3), Load(depth=16)),
    small("randread-64", "random read, 64 in flight", _MANY_IN_FLIGHT, Load(depth=64)),
    small("randwrite-32", "random write, 32 in flight", _MANY_IN_FLIGHT, Load("randwrite", depth=32)),
    small("randread-4x16", "random read, 4 clients, 16 each", ratio(3.3), Load(depth=16, connections=4)),
    small("fio-1", "fio random read, 1 in flight", ratio(2.0), Fio(1)),
    small("fio-32", "fio random read, 32 in flight", ratio(1.3), Fio(32)),
    large("read-256k", "read 256 KiB, 4 in flight", ratio(1.2), "read", 256 * KIB),
    large("read-1m", "read 1 MiB, 4 in flight", ratio(1.2), "read", 1 * MIB),
    large("write-256k", "write 256 KiB, 4 in flight", ratio(1.0), "write", 256 * KIB),
    Measurement(
        "first-second",
        "64 GiB, first second of random reads, 16 in flight",
        "iops",
        ratio(1.0),
        {name: Contender(name, FirstSecond(Load(depth=16))) for name in (*_LARGE, _LARGE_LIMIT)},
        most_rounds=5,
        references=(_LARGE_LIMIT,),
    ),
    Measurement("first-read", "connect to first read", "ms", at_most(1.5), compare(FirstRead()), most_rounds=5),
    copied("cow-read", "cow, untouched random read, 16 in flight", Load(depth=16), others=["xnbd-new", *COW_PEERS]),
    copied(
        "cow-write", "cow, copied random write, 32 in flight", Filled(Load("randwrite", depth=32)), others=["xnbd-new"]
    ),
    Measurement(
        "cow-first-write",
        "cow, first random write, 32 in flight",
        "iops",
        ratio(2.0),
        compare(_WRITE, "xnbd-cow", COW_PEERS),
        most_rounds=5,
    ),
    Measurement(
        "memory",
        "idle worker, unique memory",
        "MiB",
        at_most(3.0),
        compare(WorkerMemory(), others=["nbd-server"]),
        most_rounds=3,
    ),
    Measurement("idle-cpu", "idle server, CPU", "%", at_most(0.1), alone(IdleCpu()), most_rounds=3),
    Measurement("crowd-cpu", "1,000 idle clients, CPU", "%", at_most(0.1), alone(IdleCpu(clients=1000)), most_rounds=3),
    measured("metrics-randread-64", "--metrics: random read, 64 in flight", Load(depth=64)),
    measured("metrics-randwrite-64", "--metrics: random write, 64 in flight", Load("randwrite", depth=64)),
    Measurement("version", "xnbd-server --version", "ms", at_most(100), process(VersionTime())),
    Measurement("inetd", "--inetd, exec to first read", "ms", at_most(200), process(InetdTime())),
    Measurement(
        "crowd",
        "8 busy clients, 16 each",
        "iops",
        ratio(0.9),
        {"1,000 idle": Contender("xnbd-new", Crowded(_BUSY, 1000)), "alone": Contender("xnbd-new", _BUSY)},
        most_rounds=5,
    ),
    snapshot("snapshot-writes", "snapshot: random write, 16 in flight", "iops", ratio(1.0), "iops"),
    snapshot("snapshot-p99", "snapshot: their p99", "µs", ratio(1.0), "p99_us"),
    Measurement(
        "snapshot-time", "snapshot: how long it takes meanwhile", "s", ratio(1.0), _SNAPSHOT_TIMES, most_rounds=3
    ),
    cold("proxy-read", "cold read 256 KiB, 8 in flight", "MB/s", ratio(1.1), Cold()),
    cold("proxy-randread", "cold random read 4 KiB, 32 in flight", "iops", ratio(1.5), _COLD_RANDOM),
    cold("proxy-cache-all", "--cache-all; others: cold read", "MB/s", ratio(1.6), Cold(), CacheAll()),
    warm("proxy-warm-16", "warm random read, 16 in flight", "iops", Load(depth=16)),
    warm("proxy-warm-64", "warm random read, 64 in flight", "iops", Load(depth=64)),
    warm("proxy-warm-256k", "warm read 256 KiB, 4 in flight", "MB/s", Load("read", 256 * KIB, 4, unit="mb_per_s")),
    far("proxy-far-read", "20 ms away, cold random read", "ms", ratio(0.87), ColdLatency(), ColdLatency()),
    far(
        "proxy-far-seq",
        "20 ms away, cold read 128 KiB, 1 in flight",
        "MB/s",
        ratio(10),
        _far_stream(128 * MIB),
        _far_stream(8 * MIB),
    ),
    hits("proxy-hits-1", "hits, 1 in flight, p99", 1),
    hits("proxy-hits-16", "hits, 16 in flight, p99", 16),
    proxy_alone("proxy-fetched", "fetched for reading the disk once", "disks", at_most(1.01), FetchedShare()),
    proxy_alone(
        "proxy-slow", "--cache-all, share of a 200 Mbit/s link", "%", at_least(90), _SLOW_COPY, "xnbd-proxy-slow"
    ),
    proxy_alone(
        "proxy-empty", "--cache-all of an empty disk of 1 TiB", "s", at_most(60), _EMPTY_COPY, "xnbd-proxy-empty"
    ),
    encrypted("tls-randread-16", "TLS: random read, 16 in flight", "iops", ratio(1.5), Load(depth=16)),
    encrypted("tls-read-256k", "TLS: read 256 KiB, 4 in flight", "MB/s", ratio(1.0), _large_load("read", 256 * KIB)),
    encrypted("tls-write-256k", "TLS: write 256 KiB, 4 in flight", "MB/s", ratio(1.0), _large_load("write", 256 * KIB)),
    encrypted("tls-first-read", "TLS: connect to first read", "ms", ratio(1.0), FirstRead(), most_rounds=5),
    Measurement(
        "tls-memory",
        "1,000 idle TLS clients, unique memory of a worker",
        "MiB",
        at_most(4.0),
        {"xnbd --tls": Contender("xnbd --tls", WorkerMemory(clients=1000))},
        most_rounds=1,
    ),
    Measurement(
        "proxy-tls-read",
        "cold read 256 KiB, 8 in flight, from a TLS origin",
        "MB/s",
        ratio(1.2),
        {
            "xnbd-proxy": Contender("xnbd-proxy-tls", Cold()),
            "nbdkit-cache": Contender("nbdkit-cache-tls", Cold()),
            _BARE: Contender("tls-origin", Cold()),
        },
        references=(_BARE,),
    ),
    web("proxy-web-read", "cold read 256 KiB, 8 in flight, from a web server", "MB/s", ratio(2.0), Cold()),
    web("proxy-web-randread", "cold random read 4 KiB, 32 in flight, from there", "iops", ratio(1.2), _COLD_RANDOM),
    web("proxy-web-cache-all", "--cache-all from there; nbdkit: cold read", "MB/s", ratio(2.0), Cold(), CacheAll()),
    proxy_alone(
        "proxy-web-slow",
        "--cache-all from a web server, share of a 200 Mbit/s link",
        "%",
        at_least(90),
        _SLOW_COPY,
        "xnbd-proxy-web-slow",
    ),
    proxy_alone(
        "proxy-web-memory",
        "cold read from a web server, memory of the worker",
        "MiB",
        at_most(80),
        BusyMemory(Cold()),
        "xnbd-proxy-web",
    ),
    rbd("proxy-rbd-read", "cold read 256 KiB, 8 in flight, from Ceph", "MB/s", ratio(2.0), Cold()),
    rbd("proxy-rbd-randread", "cold random read 4 KiB, 32 in flight, from there", "iops", ratio(1.2), _COLD_RANDOM),
    rbd("proxy-rbd-cache-all", "--cache-all from there; others: cold read", "MB/s", ratio(2.0), Cold(), CacheAll()),
    proxy_alone(
        "proxy-rbd-memory",
        "cold read from Ceph, memory of the worker",
        "MiB",
        at_most(80),
        BusyMemory(Cold()),
        "xnbd-proxy-rbd",
    ),
]


def flavours_of(measurements: List[Measurement]) -> List[str]:
    """The names of the servers that *measurements* need."""
    needed = {contender.server for one in measurements for contender in one.contenders.values()}
    return [name for name in FLAVOURS if name in needed]
