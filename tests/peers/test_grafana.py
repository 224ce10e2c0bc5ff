"""contrib/grafana: the dashboard's types, its metrics, and that a real Prometheus can evaluate all it asks for."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set, Tuple

from certificates import Certificates
from conftest import Start
from prometheus_server import Prometheus, prometheus
from proxies import Proxy, bgctl, make_disk
from rawclient import READ, RawClient
from scraping import metrics_port, scrape
from server_process import ROOT, Server, wait_until

CONTRIB = ROOT / "contrib" / "grafana"
DASHBOARD: Dict[str, Any] = json.loads((CONTRIB / "xnbd.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
STARTS = [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
CHOICES = [choice["query"]["query"] for choice in DASHBOARD["templating"]["list"] if choice["type"] == "query"]


def test_the_types_are_those_of_grafana_and_the_file_is_up_to_date(tmp_path: Path) -> None:
    assert (CONTRIB / "node_modules").exists(), "run contrib/setup --tests"
    compiler = ["node", "node_modules/typescript/bin/tsc"]
    checked = subprocess.run(compiler, cwd=CONTRIB, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert checked.returncode == 0, checked.stdout
    subprocess.run(["node", "build/write.js", tmp_path / "made.json"], cwd=CONTRIB, check=True)
    made = (tmp_path / "made.json").read_text()
    assert made == (CONTRIB / "xnbd.json").read_text(), "run npm run build in contrib/grafana"


def test_no_two_panels_are_in_one_place() -> None:
    taken: Set[Tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not taken & cells, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)


def asked(expression: str, export: str = ".*") -> str:
    """As Grafana asks for it, with servers of a test."""
    return expression.replace("$__rate_interval", "5s").replace("$instance", ".*").replace("$export", export)


@contextmanager
def busy(*servers: Server) -> Iterator[None]:
    """Each has a client that reads, writes, and is refused something, all the time."""
    ended = threading.Event()

    def work(server: Server) -> None:
        with RawClient(server.connect()) as client:
            client.negotiate()
            while not ended.wait(0.05):
                client.read(0, 4096)
                client.write(4096, bytes(4096))
                client.request(READ, 1 << 40, 4096)
                client.simple_reply(0)

    threads = [threading.Thread(target=work, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def values(running: Prometheus, expression: str) -> List[str]:
    return [sample["value"][1] for sample in running.ask("query", query=asked(expression))["result"]]


def test_prometheus_evaluates_every_expression(
    start: Start, tmp_path: Path, image: Path, certificates: Certificates
) -> None:
    far = make_disk(tmp_path)
    origin, another = start("--target", "--readonly", far), start("--target", "--readonly", far)
    options = ("--origin", another.uri, "--cache-limit", "2M", "--metrics", 0, "--exportname", "far away")
    proxy = Proxy(start, tmp_path, origin.uri, *options)
    target = start("--target", "--metrics", 0, "--control", tmp_path / "target.ctl", image)
    secure = start("--target", "--readonly", "--metrics", 0, "--tls", certificates.server, image)
    for server in (target, secure):
        server.wait_for_log("INFO: metrics on ")
    ports = [metrics_port(server.log()) for server in (proxy.server, target, secure)]
    with prometheus(tmp_path, ports) as running, busy(proxy.server, target):
        bgctl("--snapshot", tmp_path / "target.ctl")

        def missing() -> List[str]:
            return [expression for expression in EXPRESSIONS if not values(running, expression)]

        wait_until(lambda: not missing(), "a value of every expression")
        assert [values(running, expression) for expression in STARTS] == [[]]
        for metric, label in (re.fullmatch(r"label_values\((.*), (\w+)\)", choice).groups() for choice in CHOICES):  # type: ignore[union-attr]
            assert values(running, f"group by ({label}) ({metric})")
        assert running.value(asked(title("Clients"))) == {"": 2}
        assert running.value(asked(title("Clients"), export="far away")) == {"": 1}
        assert running.value(asked(title("Requests")))[""] > 0
        told = set().union(*(scrape(port).names for port in ports))
        shown = set(re.findall(r"xnbd_[a-z0-9_]+", " ".join([*EXPRESSIONS, *STARTS])))
        assert told - {re.sub(r"_(bucket|sum|count|total|info)$", "", name) for name in shown} == set()


def title(text: str) -> str:
    """The expression of the first panel with that title."""
    return str(next(panel for panel in PANELS if panel["title"] == text)["targets"][0]["expr"])
