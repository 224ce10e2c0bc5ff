"""A client of --metrics, and what it gets, by the parsers of Prometheus' own Python client."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple, Union

from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from server_process import children_of, title_of, wait_until

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
"""What Prometheus accepts."""

Where = Union[int, Path]


class Answer:
    """A response: its *status*, *headers* by lower case names, and *body*."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


def connect(where: Where) -> socket.socket:
    """*where* is a port of this computer or a Unix socket."""
    if isinstance(where, int):
        return socket.create_connection(("127.0.0.1", where), timeout=60)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(str(where))
    return sock


def ask(sock: socket.socket, path: str = "/metrics", method: str = "GET", **headers: str) -> Answer:
    """One request on a connection that stays open, and its answer."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *(f"{name}: {text}" for name, text in headers.items())]
    sock.sendall("\r\n".join([*lines, "", ""]).encode())
    return read_answer(sock, method)


def read_answer(sock: socket.socket, method: str = "GET") -> Answer:
    """The next answer; raises `EOFError` if there is none any more."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _receive(sock)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): text for name, _, text in (line.partition(": ") for line in lines)}
    length = 0 if method == "HEAD" else int(headers["content-length"])
    while len(body) < length:
        body += _receive(sock)
    return Answer(int(first.split()[1]), headers, body)


def _receive(sock: socket.socket) -> bytes:
    data = sock.recv(1 << 16)
    if not data:
        raise EOFError("the server has closed the connection")
    return data


def get(where: Where, path: str = "/metrics", **headers: str) -> Answer:
    """One answer over a connection of its own."""
    with connect(where) as sock:
        return ask(sock, path, **headers)


Sample = Tuple[str, Tuple[Tuple[str, str], ...]]


class Scrape:
    """All samples of one look at ``/metrics``."""

    def __init__(self, text: str, *, plain: bool = False) -> None:
        parse: Any = text_string_to_metric_families if plain else openmetrics.text_string_to_metric_families
        self.families = list(parse(text))
        self.samples: Dict[Sample, float] = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.families
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """The one sample of that name that has these labels, and others perhaps."""
        found = self.find(name, **labels)
        assert len(found) == 1, (name, labels, found)
        return found[0]

    def find(self, name: str, **labels: str) -> List[float]:
        """All of them."""
        wanted = labels.items()
        return [value for (found, has), value in self.samples.items() if found == name and wanted <= dict(has).items()]

    @property
    def names(self) -> Set[str]:
        """Of all families."""
        return {family.name for family in self.families}

    @property
    def counters(self) -> Dict[Sample, float]:
        """What must never get less."""
        names = {
            sample.name
            for family in self.families
            if family.type in ("counter", "histogram")
            for sample in family.samples
        }
        return {sample: value for sample, value in self.samples.items() if sample[0] in names}


def scrape(where: Where, **headers: str) -> Scrape:
    """As Prometheus does it."""
    answer = get(where, Accept=OPENMETRICS, **headers)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    return Scrape(answer.body.decode())


def status(where: Where, path: str = "/status") -> Dict[str, Any]:
    return dict(json.loads(get(where, path).body))


def metrics_port(log: str) -> int:
    """Where metrics are, as the log says."""
    return int(re.findall(r"metrics on \S+:(\d+)", log)[-1])


def observer_of(pid: int) -> Optional[int]:
    """The process that answers, of the server or wrapper *pid*."""
    return next((child for child in children_of(pid) if ": metrics" in title_of(child)), None)


def kill_observer(pid: int) -> None:
    """And wait for the next one."""
    former = observer_of(pid)
    assert former is not None
    os.kill(former, signal.SIGKILL)
    wait_until(lambda: observer_of(pid) not in (None, former), "another observer")


def check_by_promtool(text: bytes) -> str:
    """What promtool has to say of metrics in the older format; nothing if all is well."""
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return result.stdout.decode() or ("" if not result.returncode else f"status {result.returncode}")
